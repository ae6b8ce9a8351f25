"""What ``make run`` does once all is built: starts a server on the sample models and asks it a first question.

    python deploy/samples/first_inference.py MODELS [--once]

The question goes through tritonclient, as any client's would. Afterwards the server keeps serving until it is
interrupted; with ``--once`` it is stopped and the script ends with 0 when all went well. The server's own options can
be given in the environment (``MMCORE_GRPC_PORT=0 make run``).
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

#: Sepal length and width, petal length and width, in cm: one flower of each of the three species.
FLOWERS = np.array([[5.1, 3.5, 1.4, 0.2], [6.4, 3.2, 4.5, 1.5], [7.1, 3.0, 5.9, 2.1]], dtype=np.float32)
#: How long a first inference may take: the model is loaded for it.
TIMEOUT_S = 60.0


def main() -> int:
    """Run the steps; the exit code is the server's, or 1 when a step failed."""
    parser = argparse.ArgumentParser(description="Serve the sample models and send a first inference.")
    parser.add_argument("models", type=Path, help="folder of models to serve")
    parser.add_argument("--model", default="iris-sklearn", help="the model to ask (default: %(default)s)")
    parser.add_argument("--once", action="store_true", help="stop the server after the first inference")
    options = parser.parse_args()

    with serving(options.models) as (server, ready):
        say(f"Serving {ready['models']} models from {options.models} at {ready['grpc']}")
        try:
            outputs, took_s = infer(ready["grpc"], options.model)
        except InferenceServerException as error:
            say(f"The first inference failed: {error}")
            return 1
        say(f"First inference, with tritonclient: {options.model} on {len(FLOWERS)} flowers, {took_s * 1000:.1f} ms")
        for name, array in outputs.items():
            say(f"  {name} = {array.tolist()}")
        if not options.once:
            command, target = Path(sys.prefix, "bin", "mmcore"), f"--target {ready['grpc']}"
            say(f"Ask it more:  {command} models {target}")
            say(f"              {command} infer {options.model} {target} --input '[[5.1, 3.5, 1.4, 0.2]]'")
            say("Ctrl-C ends it.")
            server.wait()
    return server.returncode


@contextmanager
def serving(models: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A server on the folder and its ready line; it is told to drain at the end, and waited for.

    Raises:
        SystemExit: it ended before it was ready; it has said why on standard error.
    """
    command = [sys.executable, "-m", "mmcore.cli.main", "serve", "--models", str(models)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    # Whoever ends this script means the server.
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line:
            raise SystemExit(server.wait() or 1)
        yield server, json.loads(line)
    except KeyboardInterrupt:
        # The terminal has interrupted the server as well.
        server.wait()
    finally:
        if server.poll() is None:
            server.terminate()
            server.wait()


def infer(address: str, model: str) -> tuple[dict[str, NDArray[Any]], float]:
    """The model's answers for the flowers by output name, and the seconds it took."""
    with triton.InferenceServerClient(address) as client:
        described = client.get_model_metadata(model, client_timeout=TIMEOUT_S)
        question = triton.InferInput(described.inputs[0].name, FLOWERS.shape, described.inputs[0].datatype)
        question.set_data_from_numpy(FLOWERS.astype(triton_to_np_dtype(described.inputs[0].datatype)))
        started = time.perf_counter()
        answer = client.infer(model, [question], client_timeout=TIMEOUT_S)
        took_s = time.perf_counter() - started
        names = [output.name for output in answer.get_response().outputs]
        return {name: answer.as_numpy(name) for name in names}, took_s


def say(line: str) -> None:
    """One line of progress, at once."""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
