"""Makes models with TensorFlow, Keras, PyTorch and OpenVINO themselves: ``python -m tests.framework_models FOLDER``.

A program of its own: importing them takes seconds. Their inputs are those of the archived release's example models.
``answers.npz`` beside them has what the frameworks answer to rows of a normal distribution, by the models' names.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

#: The input of each model: its name, and its shape without rows.
INPUTS: dict[str, tuple[str, tuple[int, ...]]] = {
    "tensorflow-1": ("inputs", (784,)),
    "tensorflow-2": ("inputs", (784,)),
    "keras": ("conv2d_input", (28, 28, 1)),
    "pytorch": ("INPUT__0", (3, 32, 32)),
    "openvino": ("Input3", (1, 28, 28)),
}
ROWS = 2

TORCH_CONFIG = """
platform: "pytorch_libtorch" max_batch_size: 8
input [ { name: "INPUT__0" data_type: TYPE_FP32 dims: [ 3, 32, 32 ] } ]
output [ { name: "OUTPUT__0" data_type: TYPE_FP32 dims: [ 10 ] } ]
"""
TORCH_SCHEMA = {
    "inputs": [{"name": "INPUT__0", "datatype": "FP32", "shape": [-1, 3, 32, 32]}],
    "outputs": [{"name": "OUTPUT__0", "datatype": "FP32", "shape": [-1, 10]}],
}


def rows(name: str) -> Any:
    """What a model is asked for."""
    return np.random.default_rng(28).normal(size=(ROWS, *INPUTS[name][1])).astype(np.float32)


def main(folder: Path) -> None:
    """Write all."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    answers = {**tensorflow_models(folder), "pytorch": pytorch_model(folder), "openvino": openvino_model(folder)}
    np.savez(folder / "answers.npz", **answers)


def tensorflow_models(folder: Path) -> dict[str, Any]:
    import keras
    import tensorflow as tf

    def saved(number: int) -> Any:
        module = tf.Module()
        module.weights = tf.Variable(np.random.default_rng(number).normal(size=(784, 10)).astype(np.float32))
        taken = [tf.TensorSpec([None, 784], tf.float32, name="inputs")]

        def classify(inputs: Any) -> dict[str, Any]:
            return {"scores": tf.nn.softmax(inputs @ module.weights / 28.0)}

        signature = tf.function(classify, input_signature=taken).get_concrete_function()
        tf.saved_model.save(module, str(folder / f"tensorflow-{number}"), signatures=signature)
        return signature(tf.constant(rows("tensorflow-1")))["scores"].numpy()

    answers = {f"tensorflow-{number}": saved(number) for number in (1, 2)}
    keras.utils.set_random_seed(14)
    layers = [keras.layers.Conv2D(2, 3), keras.layers.Flatten(), keras.layers.Dense(10, "softmax")]
    network = keras.Sequential([keras.Input((28, 28, 1), name="conv2d_input"), *layers])
    (folder / "keras").mkdir()
    network.save(folder / "keras" / "mnist.h5")
    return {**answers, "keras": network(rows("keras")).numpy()}


def pytorch_model(folder: Path) -> Any:
    """Twice the same: with Triton's configuration, and bare for a schema that is named elsewhere."""
    import torch

    torch.manual_seed(21)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 5), torch.nn.Flatten(), torch.nn.Linear(2 * 28 * 28, 10))
    given = torch.from_numpy(rows("pytorch"))
    with warnings.catch_warnings(), torch.no_grad():  # it is deprecated, and what people have
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(network.eval(), given)
        answer: Any = traced(given).numpy()
    for file in ("pytorch/1/model.pt", "pytorch-bare/model.pt"):
        (folder / file).parent.mkdir(parents=True)
        traced.save(folder / file)
    (folder / "pytorch/config.pbtxt").write_text(TORCH_CONFIG)
    (folder / "schema.json").write_text(json.dumps(TORCH_SCHEMA))
    return answer


def openvino_model(folder: Path) -> Any:
    # It tells its maker of its use otherwise.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino
    from openvino import opset13

    weights = np.random.default_rng(16).normal(size=(784, 10)).astype(np.float32)
    image = opset13.parameter([-1, 1, 28, 28], np.float32, name="Input3")
    flat = opset13.reshape(image, np.array([-1, 784]), special_zero=False)
    scores = opset13.matmul(flat, weights, False, False)
    scores.output(0).get_tensor().set_names({"Plus214_Output_0"})
    model = openvino.Model([scores], [image], "mnist")
    (folder / "openvino").mkdir()
    openvino.save_model(model, folder / "openvino" / "mnist.xml", compress_to_fp16=False)
    return rows("openvino").reshape(ROWS, 784) @ weights


if __name__ == "__main__":
    main(Path(sys.argv[1]))
