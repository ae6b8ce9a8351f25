"""Makes models with TensorFlow's and Keras's own Python packages: ``python tensorflow_models.py FOLDER``.

A program of its own: importing them takes seconds, and the tests are about doing without. Beside each model lies an
``.npz`` with inputs and what the framework itself answers to them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

random = np.random.default_rng(17)
ROWS = random.normal(size=(6, 4)).astype(np.float32)
DTYPES = (
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64", "string"),
)


class Network(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = tf.Variable(random.normal(size=(4, 16)).astype(np.float32))
        self.last = tf.Variable(random.normal(size=(16, 3)).astype(np.float32))

    @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float32, name="x")])
    def __call__(self, x: Any) -> Any:
        scores = tf.nn.relu(x @ self.hidden) @ self.last
        return {"probabilities": tf.nn.softmax(scores), "best": tf.argmax(scores, axis=1)}

    @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float32, name="rows")])
    def doubled(self, rows: Any) -> Any:
        return {"twice": rows * 2}


class Words(tf.Module):
    """A table that is filled from a file of the model, and texts in and out."""

    def __init__(self, vocabulary: Path) -> None:
        super().__init__()
        self.vocabulary = tf.saved_model.Asset(str(vocabulary))
        lines = tf.lookup.TextFileInitializer(
            *(self.vocabulary, tf.string, tf.lookup.TextFileIndex.WHOLE_LINE),
            *(tf.int64, tf.lookup.TextFileIndex.LINE_NUMBER),
        )
        self.table = tf.lookup.StaticHashTable(lines, -1)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="words")])
    def __call__(self, words: Any) -> Any:
        return {"places": self.table.lookup(words), "shouted": tf.strings.join([tf.strings.upper(words), "!"])}


class Echoes(tf.Module):
    def signature(self, dtype: str) -> Any:
        @tf.function(input_signature=[tf.TensorSpec(None, tf.as_dtype(dtype), name="x")])
        def echo(x: Any) -> Any:
            return {"y": tf.identity(x)}

        return echo.get_concrete_function()


def save(module: Any, folder: Path, **signatures: Any) -> None:
    tf.saved_model.save(module, str(folder), signatures=signatures)


def answered(folder: Path, signature: str = "serving_default", **inputs: Any) -> None:
    """What the framework answers, beside the model."""
    function = tf.saved_model.load(str(folder)).signatures[signature]
    outputs = function(**{name: tf.constant(value) for name, value in inputs.items()})
    np.savez(folder.with_suffix(".npz"), **inputs, **{name: value.numpy() for name, value in outputs.items()})


def main(folder: Path) -> None:
    network = Network()
    save(
        *(network, folder / "network"),
        serving_default=network.__call__.get_concrete_function(),
        other=network.doubled.get_concrete_function(),
    )
    answered(folder / "network", x=ROWS)
    frozen = convert_variables_to_constants_v2(network.__call__.get_concrete_function())
    (folder / "frozen.pb").write_bytes(frozen.graph.as_graph_def().SerializeToString())
    vocabulary = folder / "vocabulary.txt"
    vocabulary.write_text("sun\nmoon\nstar\n")
    words = Words(vocabulary)
    save(words, folder / "words", serving_default=words.__call__.get_concrete_function())
    echoes = Echoes()
    save(echoes, folder / "echoes", **{dtype: echoes.signature(dtype) for dtype in DTYPES})

    layers = [keras.Input((4,), name="flowers"), keras.layers.Dense(8, "relu"), keras.layers.Dense(3, "softmax")]
    sequence = keras.Sequential(layers)
    for name in ("sequence.keras", "sequence.h5"):
        sequence.save(folder / name)
    np.savez(folder / "sequence.npz", x=ROWS, y=sequence.predict(ROWS, verbose=0))
    code = keras.Sequential([keras.Input((4,)), keras.layers.Lambda(lambda x: x * 2)])
    code.save(folder / "code.keras")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
