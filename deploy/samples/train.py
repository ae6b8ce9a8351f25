"""Trains the sample models and writes them where a server can be pointed at them.

    python deploy/samples/train.py [--all] [DIR]          # build/samples by default

Everything is small and seeded, and learned from data that scikit-learn brings along: nothing is downloaded. A second
run does nothing unless this script, the classes beside it or a framework's version has changed; one that comes while
another is at it waits for that. Each model's folder appears whole or not at all, so that a server may be watching DIR.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

HERE: Final = Path(__file__).resolve().parent
DEFAULT: Final = HERE.parents[1] / "build" / "samples"
STAMP: Final = ".made-by"
SEED: Final = 7
FRAMEWORKS: Final = ("scikit-learn", "joblib", "lightgbm", "onnx", "xgboost-cpu", "openvino", "tensorflow-cpu", "torch")

#: ONNX versions that every onnxruntime since 1.20 reads.
OPSET: Final = 17
IR_VERSION: Final = 8


def main() -> int:
    """Make what is missing; the exit code is 0, or 1 where a framework is not installed."""
    parser = argparse.ArgumentParser(description="Train the sample models.")
    parser.add_argument(
        "folder", type=Path, nargs="?", default=DEFAULT, help="where to write them (default: %(default)s)"
    )
    parser.add_argument("--all", action="store_true", help="those of large frameworks too, where they are installed")
    parser.add_argument("--force", action="store_true", help="make them again")
    options = parser.parse_args()
    folder: Path = options.folder

    wanted = dict(MODELS)
    if options.all:
        wanted |= {name: (make, what) for name, (make, what, module) in LARGE_MODELS.items() if find_spec(module)}
    folder.mkdir(parents=True, exist_ok=True)
    fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX)  # until this process ends
    recipe = recipe_digest(wanted)
    stamp = folder / STAMP
    if not options.force and made(folder, stamp, recipe, wanted):
        print(f"The sample models in {folder} are up to date")
        return 0
    stamp.unlink(missing_ok=True)
    for name, (make, what) in wanted.items():
        began = time.monotonic()
        try:
            install(folder, name, make)
        except ImportError as error:
            print(f"{name}: {error}; install what the samples need with: pip install '.[samples]'", file=sys.stderr)
            return 1
        print(f"  {name:<20} {what} ({time.monotonic() - began:.1f} s)", flush=True)
    stamp.write_text(recipe)
    print(f"{len(wanted)} sample models are in {folder}")
    return 0


def recipe_digest(wanted: Iterable[str]) -> str:
    """A digest of all that decides what is written: names, this folder's sources and the frameworks' versions."""
    digest = hashlib.sha256(repr(sorted(wanted)).encode())
    for source in (Path(__file__), *files(HERE / "python")):
        digest.update(source.read_bytes())
    for framework in FRAMEWORKS:
        try:
            digest.update(f"{framework} {version(framework)}\n".encode())
        except ImportError:
            digest.update(f"{framework} missing\n".encode())
    return digest.hexdigest()


def made(folder: Path, stamp: Path, recipe: str, wanted: Iterable[str]) -> bool:
    """Whether an earlier run has finished with the same recipe and all its models are still there."""
    return stamp.is_file() and stamp.read_text() == recipe and all((folder / name).is_dir() for name in wanted)


def install(folder: Path, name: str, make: Callable[[Path], None]) -> None:
    """Make one model's folder aside, then put it in its place at once."""
    aside = folder / f".{name}.{os.getpid()}.tmp"
    try:
        aside.mkdir()
        make(aside)
        shutil.rmtree(folder / name, ignore_errors=True)
        aside.rename(folder / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def iris() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Fisher's irises: four lengths in cm, three species."""
    from sklearn.datasets import load_iris

    data = load_iris()
    return data.data.astype(np.float32), data.target.astype(np.int64)


def iris_sklearn(folder: Path) -> None:
    """A classifier: ``predict`` INT64 [n, 1], ``predict_proba`` FP64 [n, 3], ``decision_function`` FP64 [n, 3]."""
    import joblib
    from sklearn.linear_model import LogisticRegression

    flowers, species = iris()
    classifier = LogisticRegression(max_iter=1000, random_state=SEED).fit(flowers.astype(np.float64), species)
    joblib.dump(classifier, folder / "model.joblib")


def diabetes_sklearn(folder: Path) -> None:
    """A regressor behind a scaler, in one pipeline: ``predict`` FP64 [n, 1] from ten measurements."""
    import joblib
    from sklearn.datasets import load_diabetes
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    patients, progression = load_diabetes(return_X_y=True, scaled=False)
    joblib.dump(
        make_pipeline(StandardScaler(), Ridge(random_state=SEED)).fit(patients, progression), folder / "model.joblib"
    )


def iris_xgboost(folder: Path) -> None:
    """A booster of 3 × 10 trees: ``predict`` FP32 [n, 3], the probability of each species."""
    import xgboost

    flowers, species = iris()
    options: dict[str, Any] = {
        "objective": "multi:softprob", "num_class": 3, "max_depth": 3, "eta": 0.3, "seed": SEED, "nthread": 1,
    }  # fmt: skip
    booster = xgboost.train(options, xgboost.DMatrix(flowers, label=species), num_boost_round=10)
    booster.save_model(folder / "model.json")


def iris_lightgbm(folder: Path) -> None:
    """A booster of 3 × 10 trees: ``predict`` FP64 [n, 3], the probability of each species."""
    import lightgbm

    flowers, species = iris()
    options: dict[str, Any] = {
        "objective": "multiclass", "num_class": 3, "num_leaves": 7, "min_data_in_leaf": 5, "learning_rate": 0.3,
        "seed": SEED, "deterministic": True, "num_threads": 1, "verbose": -1,
    }  # fmt: skip
    lightgbm.train(options, lightgbm.Dataset(flowers, species), num_boost_round=10).save_model(folder / "model.txt")


def mlp_weights() -> list[NDArray[np.float32]]:
    """A network of one hidden layer over the irises: weights [4, 16] and [16, 3], biases [16] and [3]."""
    from sklearn.neural_network import MLPClassifier

    flowers, species = iris()
    network = MLPClassifier((16,), solver="lbfgs", alpha=0.1, max_iter=500, random_state=SEED).fit(flowers, species)
    return [np.asarray(values, dtype=np.float32) for values in (*network.coefs_, *network.intercepts_)]


def mlp_onnx(folder: Path) -> None:
    """The network: ``input`` FP32 [batch, 4] to ``probabilities`` FP32 [batch, 3]."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    names = ("w1", "w2", "b1", "b2")
    weights = [numpy_helper.from_array(values, name) for name, values in zip(names, mlp_weights(), strict=True)]
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["input", "w1", "b1"], ["hidden"]),
            helper.make_node("Relu", ["hidden"], ["activated"]),
            helper.make_node("Gemm", ["activated", "w2", "b2"], ["scores"]),
            helper.make_node("Softmax", ["scores"], ["probabilities"], axis=1),
        ],
        "iris-mlp",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 3])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    onnx.save(model, folder / "model.onnx")


def mlp_torchscript(folder: Path) -> None:
    """The network with its tensors named by a schema: ``INPUT__0`` FP32 [n, 4] to ``OUTPUT__0`` FP32 [n, 3]."""
    import torch

    layers = (torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3), torch.nn.Softmax(1))
    network = torch.nn.Sequential(*layers).eval()
    first, last, first_bias, last_bias = (torch.from_numpy(values) for values in mlp_weights())
    network.load_state_dict({"0.weight": first.T, "0.bias": first_bias, "2.weight": last.T, "2.bias": last_bias})
    with warnings.catch_warnings():  # it is deprecated, and what people have
        warnings.simplefilter("ignore", DeprecationWarning)
        module: Any = torch.jit.script(network)
        module.save(folder / "model.pt")
    schema = {
        "inputs": [{"name": "INPUT__0", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [{"name": "OUTPUT__0", "datatype": "FP32", "shape": [-1, 3]}],
    }
    (folder / "_schema.json").write_text(json.dumps(schema, indent=2) + "\n")


def mlp_openvino(folder: Path) -> None:
    """The network: ``input`` FP32 [n, 4] to ``probabilities`` FP32 [n, 3]."""
    # It tells its maker of its use otherwise.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino
    from openvino import opset13

    first, last, first_bias, last_bias = mlp_weights()
    flowers = opset13.parameter([-1, 4], np.float32, name="input")
    hidden = opset13.relu(opset13.add(opset13.matmul(flowers, first, False, False), first_bias))
    answer = opset13.softmax(opset13.add(opset13.matmul(hidden, last, False, False), last_bias), 1)
    answer.output(0).get_tensor().set_names({"probabilities"})
    model = openvino.Model([answer], [flowers], "iris-mlp")
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)


def mlp_savedmodel(folder: Path) -> None:
    """The network: ``input`` FP32 [n, 4] to ``probabilities`` FP32 [n, 3]."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow

    first, last, first_bias, last_bias = weights = [tensorflow.Variable(values) for values in mlp_weights()]

    def classify(flowers: Any) -> dict[str, Any]:
        hidden = tensorflow.nn.relu(flowers @ first + first_bias)
        return {"probabilities": tensorflow.nn.softmax(hidden @ last + last_bias)}

    network = tensorflow.Module()
    network.weights = weights
    taken = tensorflow.TensorSpec([None, 4], tensorflow.float32, name="input")
    signature = tensorflow.function(classify, input_signature=[taken]).get_concrete_function()
    tensorflow.saved_model.save(network, str(folder / "1" / "model.savedmodel"), signatures=signature)


def python_class(name: str) -> Callable[[Path], None]:
    """A maker that copies the class (and its config.pbtxt) kept beside this script."""

    def copy(folder: Path) -> None:
        for source in files(HERE / "python" / name):
            target = folder / source.relative_to(HERE / "python" / name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    return copy


def files(folder: Path) -> Iterator[Path]:
    """A sample's sources; what Python has compiled of them stays behind."""
    return (path for path in sorted(folder.rglob("*")) if path.suffix in (".py", ".pbtxt"))


MODELS: Final[dict[str, tuple[Callable[[Path], None], str]]] = {
    "iris-sklearn": (iris_sklearn, "scikit-learn classifier, joblib"),
    "diabetes-sklearn": (diabetes_sklearn, "scikit-learn pipeline with a regressor, joblib"),
    "iris-xgboost": (iris_xgboost, "XGBoost booster, JSON"),
    "iris-lightgbm": (iris_lightgbm, "LightGBM booster, text"),
    "mlp-onnx": (mlp_onnx, "ONNX network"),
    "identity": (python_class("identity"), "Python class: FP32 of any shape, answered as it is"),
    "simple": (python_class("simple"), "Python class: sum and difference of two INT32 tensors"),
    "simple_string": (python_class("simple_string"), "Python class: the same over numbers written as text"),
}

#: Those of frameworks that are large: name to maker, description and the module that must be there.
LARGE_MODELS: Final[dict[str, tuple[Callable[[Path], None], str, str]]] = {
    "mlp-openvino": (mlp_openvino, "OpenVINO network", "openvino"),
    "mlp-savedmodel": (mlp_savedmodel, "TensorFlow network, SavedModel in a Triton repository", "tensorflow"),
    "mlp-torchscript": (mlp_torchscript, "TorchScript network with a _schema.json", "torch"),
}


if __name__ == "__main__":
    sys.exit(main())
