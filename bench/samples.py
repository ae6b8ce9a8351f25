"""The models of the v2 suite: the repository's samples, trained where they are missing, and an input for each."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from bench.processes import ROOT, PeerFailed

FOLDER: Final = ROOT / "build" / "samples"
#: One flower: sepal length and width, petal length and width in cm.
FLOWER: Final = np.array([[6.4, 3.2, 4.5, 1.5]], np.float32)


@dataclass(frozen=True, slots=True)
class Sample:
    """A case of the suite: the model's folder and file, and what it is asked."""

    case: str
    model: str
    file: Path
    input: str
    datatype: str
    array: NDArray[Any]


def samples(console: Console) -> list[Sample]:
    """Every case's sample.

    Raises:
        PeerFailed: training failed; holds what it said.
    """
    if not all(sample.file.exists() for sample in SAMPLES):
        console.print(f"training the sample models in {FOLDER.relative_to(ROOT)}")
        argv = [sys.executable, str(ROOT / "deploy" / "samples" / "train.py"), str(FOLDER)]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=180)
        if done.returncode:
            raise PeerFailed(f"deploy/samples/train.py failed: {(done.stderr or done.stdout)[-2000:]}")
    return list(SAMPLES)


SAMPLES: Final = (
    Sample("identity", "identity", FOLDER / "identity" / "model.py", "INPUT0", "FP32", np.arange(4, dtype=np.float32)),
    Sample("sklearn", "iris-sklearn", FOLDER / "iris-sklearn" / "model.joblib", "predict", "FP32", FLOWER),
    Sample("onnx", "mlp-onnx", FOLDER / "mlp-onnx" / "model.onnx", "input", "FP32", FLOWER),
    Sample("xgboost", "iris-xgboost", FOLDER / "iris-xgboost" / "model.json", "predict", "FP32", FLOWER),
)
