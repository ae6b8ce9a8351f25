"""The bare framework in a loop: what a request would cost if serving it cost nothing.

    python -m bench.peers.framework_loop FRAMEWORK PATH INPUT.npy

After the ready line (which holds the right outputs, in base64), each line of stdin is a number of seconds to call the
framework on that input, and is answered by ``{"calls": …, "seconds": …, "cpu_us": …}`` with the CPU time per call.
"""

from __future__ import annotations

import base64
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.peers import frameworks


def run(call: frameworks.Call, array: NDArray[Any], seconds: float) -> dict[str, float]:
    """Call for that long, the clock looked at once in 16 calls."""
    call(array)
    calls = 0
    began, cpu = time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - began) < seconds:
        for _ in range(16):
            call(array)
        calls += 16
    return {"calls": calls, "seconds": elapsed, "cpu_us": (time.process_time() - cpu) * 1e6 / calls}


def main(framework: str, path: str, input_path: str) -> None:
    """Serve lines until stdin ends."""
    call = frameworks.load(framework, Path(path))
    array = np.load(input_path)
    outputs = [
        {"name": name, "datatype": datatype, "data": base64.b64encode(output.tobytes()).decode("ascii")}
        for name, datatype, output in call(array)
    ]
    print(json.dumps({"event": "ready", "outputs": outputs}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(call, array, float(line))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
