"""Starts the tritonserver of nvidia-pytriton: Python backend models with dynamic batching.

    python -m bench.peers.triton ENVIRONMENT MODEL …
    python -m bench.peers.triton ENVIRONMENT --repository DIR

ENVIRONMENT is the folder of its virtual environment with ``backends`` beside ``lib``, each MODEL the JSON of a
``ServedModel``. With a repository it loads what it is told to load from there. No other backend comes with that
package, Triton's C identity neither.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from bench.environments import site_packages
from bench.peers.served import ServedModel, free_ports, keep

MAX_BATCH_SIZE: Final = 64
SHARED_MEMORY: Final = Path("/dev/shm")  # where its Python backend keeps its regions
MODEL_CODE: Final = Path(__file__).with_name("triton_model.py")


def config_pbtxt(model: ServedModel) -> str:
    """``config.pbtxt`` of one model: the Python backend, one instance, requests merged whenever some wait."""
    dims = ", ".join(map(str, model.shape))
    outputs = ",\n".join(
        f'  {{ name: "{name}" data_type: TYPE_{datatype} dims: [ -1 ] }}' for name, datatype in model.outputs
    )
    return f"""\
name: "{model.name}"
backend: "python"
max_batch_size: {MAX_BATCH_SIZE}
input [
  {{ name: "{model.input}" data_type: TYPE_{model.datatype} dims: [ {dims} ] }}
]
output [
{outputs}
]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
dynamic_batching {{ }}
parameters {{ key: "framework" value {{ string_value: "{model.framework}" }} }}
parameters {{ key: "path" value {{ string_value: "{model.path}" }} }}
"""


def remove_regions(prefix: str) -> None:
    """Remove the shared memory whose names start so: stubs that were killed leave it."""
    for region in SHARED_MEMORY.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


def write_model(folder: Path, model: ServedModel) -> None:
    """Make a model's folder."""
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(config_pbtxt(model))
    shutil.copyfile(MODEL_CODE, folder / "1" / "model.py")


def main(environment: Path, models: Sequence[ServedModel], repository: str | None = None) -> None:
    """Write the repository of models, or take ``repository`` for one, and serve it until ended."""
    port, http_port = free_ports(2)
    packages = site_packages(environment)
    bundled = packages / "pytriton" / "tritonserver"
    prefix = f"mmcore_bench_triton_{os.getpid()}_"
    control = ["--model-control-mode=explicit", "--strict-readiness=false"] if repository is not None else []
    with tempfile.TemporaryDirectory(prefix="mmcore-bench-triton-") as made:
        name = repository or made
        for model in models:
            write_model(Path(name) / model.name, model)
        argv = [
            str(bundled / "bin" / "tritonserver"), f"--model-repository={name}",
            f"--backend-directory={environment / 'backends'}", f"--cache-directory={bundled / 'caches'}",
            f"--backend-config=python,shm-region-prefix-name={prefix}", "--disable-auto-complete-config",
            "--grpc-address=127.0.0.1", f"--grpc-port={port}", "--http-address=127.0.0.1",
            f"--http-port={http_port}", "--allow-metrics=false", "--exit-timeout-secs=2", *control,
        ]  # fmt: skip
        # The stub dies, and loading hangs, unless it finds the wheel's libraries and the interpreter's. Its interpreter
        # is isolated: it reads no PYTHONPATH, but takes the environment of the first python3 on PATH, and the current
        # folder, from which the models import bench.
        libraries = f"{packages / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}"
        try:
            keep(
                argv,
                {
                    "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
                    "LD_LIBRARY_PATH": libraries,
                    "CUDA_VISIBLE_DEVICES": "",
                    "OMP_NUM_THREADS": "1",
                },
                port,
                http_port,
                models,
            )
        finally:
            remove_regions(prefix)


if __name__ == "__main__":
    if sys.argv[2:3] == ["--repository"]:
        main(Path(sys.argv[1]), (), sys.argv[3])
    else:
        main(Path(sys.argv[1]), [ServedModel.from_json(text) for text in sys.argv[2:]])
