"""Very many small models of mixed formats, no two with the same content, made at hundreds a second.

    python -m bench.model_zoo DIR [--models 1000] [--seed 1]

A few dozen templates are trained for real, one for each format and size; every model is its template with some of its
numbers changed in place, so that files load, differ, and have answers of their own. A seed and a number give the same
model everywhere. Right answers are the frameworks', asked with the very bytes that are served.
"""

from __future__ import annotations

import argparse
import io
import re
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

#: Sizes of the templates' files in bytes, about; a model is of the next size with this probability.
SIZES: Final = tuple(2048 * 2**step for step in range(10))
LARGER: Final = 0.6
ROWS: Final = 2
TRAINING_ROWS: Final = 400
#: Numbers changed for each model, at most: enough for another answer, few enough to be quick.
CHANGED: Final = 512
#: Decimal digits that are changed, of numbers written as text.
DIGITS: Final = re.compile(rb"[0-9]{7,}")

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Question:
    """What a model is asked, and what its framework answers."""

    input: str
    datatype: str
    array: Array
    output: str
    expected: Array


@dataclass(frozen=True, slots=True)
class Slot:
    """Bytes of a file that may be others: an array of floats, or where ``dtype`` is None decimal digits."""

    offset: int
    length: int
    dtype: np.dtype[Any] | None = None


@dataclass(frozen=True, slots=True)
class Template:
    """A trained model's file."""

    content: bytes
    slots: tuple[Slot, ...]
    features: int

    def varied(self, random: np.random.Generator) -> bytes:
        """The file with other numbers in its slots."""
        content = bytearray(self.content)
        for slot in self.slots:
            end = slot.offset + slot.length
            if slot.dtype is None:
                digits = random.integers(ord("1"), ord("9"), slot.length, np.uint8, endpoint=True).tobytes()
                content[slot.offset : end] = digits
            else:
                values = np.frombuffer(self.content, slot.dtype, slot.length // slot.dtype.itemsize, slot.offset)
                factors = random.uniform(0.5, 1.5, len(values))
                content[slot.offset : end] = (values * factors).astype(slot.dtype).tobytes()
        return bytes(content)


@dataclass(frozen=True, slots=True)
class Kind:
    """One format: its model's file, how a template is trained, and how the framework itself answers.

    ``train(size_bytes, features, targets)`` writes about so many bytes; ``answer`` gets the file's bytes and the rows.
    """

    format: str
    file: str
    input: str
    output: str
    train: Callable[[int, Array, Array], Template]
    answer: Callable[[bytes, Array], Array]


@dataclass(frozen=True, slots=True)
class Zoo:
    """Models by number, each in a folder of its own."""

    seed: int = 1
    _templates: dict[tuple[int, int], Template] = field(default_factory=dict)

    def name(self, number: int) -> str:
        """The model's name, which is its folder's."""
        return f"zoo-{number:05}"

    def kind(self, number: int) -> Kind:
        """The model's format."""
        return KINDS[number % len(KINDS)]

    def content(self, number: int) -> bytes:
        """The model's file."""
        random = self._random(number)
        return self._template(number, random).varied(random)

    def write(self, folder: Path, numbers: Iterable[int]) -> list[Path]:
        """The models' files, each in ``folder``/name/."""
        written = []
        for number in numbers:
            file = folder / self.name(number) / self.kind(number).file
            file.parent.mkdir(parents=True)
            file.write_bytes(self.content(number))
            written.append(file)
        return written

    def question(self, number: int) -> Question:
        """A request for the model, and the right answer to it."""
        kind = self.kind(number)
        random = self._random(number)
        template = self._template(number, random)
        content = template.varied(random)
        array = random.normal(size=(ROWS, template.features)).astype(np.float32)
        return Question(kind.input, "FP32", array, kind.output, kind.answer(content, array))

    def _random(self, number: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, number))

    def _template(self, number: int, random: np.random.Generator) -> Template:
        step = min(int(random.geometric(1 - LARGER)), len(SIZES)) - 1
        key = number % len(KINDS), step
        if key not in self._templates:
            data = np.random.default_rng((self.seed, step))
            features = data.normal(size=(TRAINING_ROWS, 4 + 2 * step))
            targets = features @ data.normal(size=features.shape[1]) + np.sin(features[:, 0] * 3)
            self._templates[key] = self.kind(number).train(SIZES[step], features, targets)
        return self._templates[key]


def _floats(content: bytes, features: int, arrays: Iterable[Array]) -> Template:
    """A template whose slots are the first numbers of arrays that lie in the file as they do in memory."""
    slots = []
    for array in arrays:
        length = min(array.size, CHANGED) * array.itemsize
        slots.append(Slot(content.index(array.tobytes()), length, array.dtype))
    return Template(content, tuple(slots), features)


def _train_sklearn(size: int, features: Array, targets: Array) -> Template:
    import joblib
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.linear_model import Ridge
    from sklearn.neural_network import MLPRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    width = features.shape[1]
    estimator: Any
    if size == SIZES[0]:
        estimator = make_pipeline(StandardScaler(), Ridge())
    elif SIZES.index(size) % 2:
        estimator = RandomForestRegressor(max(1, size // 5500), max_leaf_nodes=31, random_state=1, n_jobs=1)
    else:
        # Beside its weights it keeps the optimizer's two moments of each.
        estimator = MLPRegressor(hidden_layer_sizes=(size // (3 * 8 * (width + 2)),), max_iter=3, random_state=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a network has not converged, and need not
        estimator.fit(features, targets)
    file = io.BytesIO()
    joblib.dump(estimator, file)
    if size == SIZES[0]:
        arrays = [estimator[-1].coef_]
    elif SIZES.index(size) % 2:
        arrays = [tree.tree_.value for tree in estimator.estimators_[:4]]
    else:
        arrays = [estimator.coefs_[0]]
    return _floats(file.getvalue(), width, arrays)


def _ask_sklearn(content: bytes, rows: Array) -> Array:
    import joblib

    return np.asarray(joblib.load(io.BytesIO(content)).predict(rows)).reshape(-1, 1)


def _train_xgboost(form: str, tree_bytes: int) -> Callable[[int, Array, Array], Template]:
    def train(size: int, features: Array, targets: Array) -> Template:
        import xgboost

        options = {"max_depth": 4, "nthread": 1, "seed": 1, "base_score": 0.123456789}
        booster = xgboost.train(options, xgboost.DMatrix(features, targets), max(1, size // tree_bytes))
        content = bytes(booster.save_raw(form))
        digits = DIGITS.search(content, content.index(b"base_score"))
        assert digits is not None
        return Template(content, (Slot(digits.start(), len(digits[0])),), features.shape[1])

    return train


def _ask_xgboost(content: bytes, rows: Array) -> Array:
    import xgboost

    booster = xgboost.Booster({"nthread": 1})
    booster.load_model(bytearray(content))
    return np.asarray(booster.inplace_predict(rows)).reshape(-1, 1)


def _train_lightgbm(size: int, features: Array, targets: Array) -> Template:
    import lightgbm

    options = {"num_leaves": 15, "num_threads": 1, "seed": 1, "verbosity": -1, "deterministic": True}
    trees = max(1, size // 1500 - 2)
    found = lightgbm.train(options, lightgbm.Dataset(features, targets), trees).model_to_string().encode()
    slots = []
    start = 0
    for _ in range(min(8, trees)):
        start = found.index(b"\nleaf_value=", start + 1)
        slots += [Slot(*_span(digits)) for digits in DIGITS.finditer(found, start, found.index(b"\n", start + 1))]
    return Template(found, tuple(slots), features.shape[1])


def _span(digits: re.Match[bytes]) -> tuple[int, int]:
    return digits.start(), len(digits[0])


def _ask_lightgbm(content: bytes, rows: Array) -> Array:
    import lightgbm

    booster = lightgbm.Booster(model_str=content.decode())
    return np.asarray(booster.predict(rows, num_threads=1)).reshape(-1, 1)


def _train_onnx(size: int, features: Array, targets: Array) -> Template:
    """A network of random weights whose last layer is fitted."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    width = features.shape[1]
    hidden = int((-(width + 2) + ((width + 2) ** 2 + size) ** 0.5) / 2) + 4
    random = np.random.default_rng(size)
    matrices = [(random.normal(size=shape) / np.sqrt(shape[0])) for shape in pairwise((width, hidden, hidden))]
    activations = features
    for matrix in matrices:
        activations = np.maximum(activations @ matrix, 0)
    matrices.append(np.linalg.lstsq(activations, targets[:, None], rcond=None)[0])
    weights = [matrix.astype(np.float32) for matrix in matrices]
    nodes, last = [], "input"
    for at in range(len(weights)):
        product = "output" if at == len(weights) - 1 else f"h{at}"
        nodes.append(helper.make_node("MatMul", [last, f"w{at}"], [product]))
        if product != "output":
            nodes.append(helper.make_node("Relu", [product], [f"a{at}"]))
        last = f"a{at}"
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 1])],
        [numpy_helper.from_array(array, f"w{at}") for at, array in enumerate(weights)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return _floats(model.SerializeToString(), width, weights[:1])


def _ask_onnx(content: bytes, rows: Array) -> Array:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["output"], {"input": rows})[0])


KINDS: Final = (
    Kind("sklearn", "model.joblib", "predict", "predict", _train_sklearn, _ask_sklearn),
    Kind("xgboost", "model.json", "predict", "predict", _train_xgboost("json", 1700), _ask_xgboost),
    Kind("lightgbm", "model.txt", "predict", "predict", _train_lightgbm, _ask_lightgbm),
    Kind("onnx", "model.onnx", "input", "output", _train_onnx, _ask_onnx),
    Kind("xgboost", "model.ubj", "predict", "predict", _train_xgboost("ubj", 1200), _ask_xgboost),
)


def main() -> None:
    """Write models into a folder."""
    parser = argparse.ArgumentParser(description="Write many small models of mixed formats.")
    parser.add_argument("folder", type=Path, help="the folder that is given to mmcore serve --models")
    parser.add_argument("--models", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="another seed makes other models (default: %(default)s)")
    options = parser.parse_args()
    began = time.monotonic()
    files = Zoo(options.seed).write(options.folder, range(options.models))
    seconds = time.monotonic() - began
    total = sum(file.stat().st_size for file in files)
    print(f"{len(files)} models, {total / 1e6:.0f} MB, in {options.folder}: {len(files) / seconds:.0f} models/s")


if __name__ == "__main__":
    main()
