"""The frameworks' own calls on the sample models, the same for the grpc.aio server, Triton and the bare loop.

Each takes the model's file and gives back a callable from the input array to the outputs (name, V2 datatype, array),
written as somebody would who serves that one model by hand. Nothing of mmcore is used.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from numpy.typing import NDArray

Output = tuple[str, str, NDArray[Any]]
Call = Callable[[NDArray[Any]], list[Output]]


def identity(path: Path) -> Call:
    """No framework: the input under the output's name."""
    return lambda array: [("OUTPUT0", "FP32", array)]


def sklearn(path: Path) -> Call:
    """``predict`` of an unpickled estimator."""
    import joblib

    predict = joblib.load(path).predict
    return lambda array: [("predict", "INT64", predict(array))]


def onnx(path: Path) -> Call:
    """``run`` of a session with one thread; all outputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    outputs = [output.name for output in session.get_outputs()]
    datatypes = [{"tensor(float)": "FP32", "tensor(int64)": "INT64"}[output.type] for output in session.get_outputs()]

    def call(array: NDArray[Any]) -> list[Output]:
        return list(zip(outputs, datatypes, session.run(outputs, {name: array}), strict=True))

    return call


def xgboost(path: Path) -> Call:
    """``inplace_predict`` of a Booster with one thread: no DMatrix is made."""
    from xgboost import Booster

    booster = Booster({"nthread": 1})
    booster.load_model(path)
    predict = booster.inplace_predict
    return lambda array: [("predict", "FP32", predict(array))]


def lightgbm(path: Path) -> Call:
    """``predict`` of a Booster with one thread."""
    from lightgbm import Booster

    predict: Callable[..., Any] = Booster(model_file=path).predict
    return lambda array: [("predict", "FP64", predict(array, num_threads=1))]


def torchscript(path: Path) -> Call:
    """A module with one thread, without gradients."""
    import torch

    torch.set_num_threads(1)
    load: Callable[[str], Any] = torch.jit.load
    module = load(str(path)).eval()

    def call(array: NDArray[Any]) -> list[Output]:
        with torch.inference_mode():
            return [("OUTPUT__0", "FP32", module(torch.from_numpy(array)).numpy())]

    return call


def openvino(path: Path) -> Call:
    """A compiled model with one stream of one thread, in full precision (the plugin may choose bfloat16 else)."""
    # It tells its maker of its use otherwise.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", options)
    return lambda array: [("probabilities", "FP32", compiled([array])[0])]


LOADERS: Final[dict[str, Callable[[Path], Call]]] = {
    "identity": identity,
    "sklearn": sklearn,
    "onnx": onnx,
    "xgboost": xgboost,
    "lightgbm": lightgbm,
    "torchscript": torchscript,
    "openvino": openvino,
}


def load(framework: str, path: Path) -> Call:
    """The call of one framework on one model file, threads of its numeric libraries kept to one."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return LOADERS[framework](path)
