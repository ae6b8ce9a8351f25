"""The response cache of a running instance, as clients of Triton configure and see it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton

from tests.serving import Serve, write_model

pytestmark = pytest.mark.slow

#: Answers how often it has been asked, plus what the file beside it says.
COUNTING = """
from pathlib import Path

class Model:
    inputs = [("X", "FP32", [-1])]
    outputs = [("COUNT", "INT64", [1])]

    def __init__(self):
        self.asked = int((Path(__file__).parent / "start").read_text())

    def predict(self, inputs):
        self.asked += 1
        return {"COUNT": [self.asked]}
"""


def write_counting(root: Path, name: str, *, start: int, pbtxt: str = "", yaml: str = "") -> None:
    folder = write_model(root, f"{name}-new", COUNTING)
    (folder / "start").write_text(str(start))
    for file, text in (("config.pbtxt", pbtxt), ("mmcore.yaml", yaml)):
        if text:
            (folder / file).write_text(text)
    if (root / name).exists():
        shutil.move(root / name, root / f".{name}-old")
    folder.rename(root / name)


def ask(client: triton.InferenceServerClient, name: str, *values: float, **more: Any) -> int:
    given = triton.InferInput("X", [len(values)], "FP32")
    given.set_data_from_numpy(np.array(values, np.float32))
    return int(client.infer(name, [given], **more).as_numpy("COUNT")[0])


def counts(client: triton.InferenceServerClient, name: str) -> dict[str, int]:
    (found,) = client.get_inference_statistics(name, as_json=True)["model_stats"]
    inferred = found["inference_stats"]
    return {
        **{
            part: int(inferred[part].get("count", 0))
            for part in ("success", "compute_infer", "cache_hit", "cache_miss")
        },
        "inferences": int(found["inference_count"]),
    }


def test_answers_are_given_again_where_the_model_says_so(serve: Serve, tmp_path: Path) -> None:
    write_counting(tmp_path, "never", start=0)
    write_counting(tmp_path, "triton", start=0, pbtxt="response_cache { enable: true }")
    write_counting(tmp_path, "yaml", start=0, yaml="response_cache: true")
    write_counting(tmp_path, "isolated", start=0, yaml="response_cache: true\nisolation: process")
    with triton.InferenceServerClient(serve(tmp_path, "--response-cache", "8KiB").grpc) as client:
        assert [ask(client, "never", 1) for _ in range(3)] == [1, 2, 3]
        assert not client.get_model_config("never").config.HasField("response_cache")
        for name in ("triton", "yaml", "isolated"):
            assert client.get_model_config(name).config.response_cache.enable
            assert [ask(client, name, 1, request_id=str(number)) for number in range(3)] == [1, 1, 1]
            assert ask(client, name, 2) == 2
            assert counts(client, name) == {
                "success": 4, "compute_infer": 2, "cache_hit": 2, "cache_miss": 2, "inferences": 2,
            }  # fmt: skip
        # Others' answers push the first ones out.
        for value in range(100, 200):
            ask(client, "yaml", value)
        assert ask(client, "triton", 1) == 3


def test_new_files_end_the_old_answers(serve: Serve, tmp_path: Path) -> None:
    write_counting(tmp_path, "m", start=0, yaml="response_cache: true")
    with triton.InferenceServerClient(serve(tmp_path).grpc) as client:
        assert [ask(client, "m", 1) for _ in range(2)] == [1, 1]
        write_counting(tmp_path, "m", start=1000, yaml="response_cache: true")
        client.load_model("m")
        assert [ask(client, "m", 1) for _ in range(2)] == [1001, 1001]
        client.load_model("m", config='{"response_cache": {"enable": false}}')
        assert [ask(client, "m", 1) for _ in range(2)] == [1001, 1002]
