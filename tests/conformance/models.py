"""The models that the tests with other people's clients ask."""

from __future__ import annotations

from pathlib import Path

from tests.serving import ADD_SUB, FAILING, IDENTITY, WAITING, write_model

DATATYPES = (
    *("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"),
    *("FP16", "BF16", "FP32", "FP64", "BYTES"),
)

SCORES = """
class Model:
    inputs = [("INPUT0", "FP32", [-1, 4])]
    outputs = [("SCORES", "FP32", [-1, 4])]

    def predict(self, inputs):
        return {"SCORES": inputs["INPUT0"]}
"""

LABELLED = """
outputs:
  - {name: SCORES, datatype: FP32, shape: [-1, 4], labels: [ant, bee, cat, dog]}
"""


def write_models(root: Path) -> None:
    write_model(root, "simple", ADD_SUB, settings="max_batch_size: 8\n")
    for datatype in DATATYPES:
        write_model(root, f"identity_{datatype.lower()}", IDENTITY.replace("DATATYPE", datatype))
    write_model(root, "scores", SCORES, settings=LABELLED)
    write_model(root, "failing", FAILING)
    write_model(root, "waiting", WAITING, settings="execution: thread\n")
    write_model(root, "broken", "class Model:\n    def predict(self\n")
