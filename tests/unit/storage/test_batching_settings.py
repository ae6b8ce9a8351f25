"""What settings files say of batches, queues and warm-up."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmcore.errors import InvalidModel
from mmcore.model import Batching, QueuePolicy, Warmup, WarmupInput
from mmcore.storage.config_pbtxt import read_config_json, read_config_pbtxt
from mmcore.storage.settings import read_settings

CONFIG = """
max_batch_size: 16
dynamic_batching {
  preferred_batch_size: [ 8, 4 ]
  max_queue_delay_microseconds: 100
  preserve_ordering: true
  priority_levels: 3
  default_priority_level: 2
  default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 500 max_queue_size: 9 }
  priority_queue_policy { key: 1 value { allow_timeout_override: true default_timeout_microseconds: 7 } }
}
model_warmup [
  { name: "zeros" batch_size: 2 count: 3
    inputs { key: "X" value { data_type: TYPE_FP32 dims: [ 4 ] zero_data: true } } },
  { name: "drawn" inputs { key: "X" value { data_type: TYPE_INT64 dims: [ 4 ] random_data: true } } },
  { name: "stored" inputs { key: "X" value { data_type: TYPE_STRING dims: [ 1 ] input_data_file: "x" } } }
]
"""


def test_a_triton_configuration_says_how_to_batch(tmp_path: Path) -> None:
    stated = read_config_pbtxt(CONFIG, tmp_path)
    assert stated.merges is True
    assert stated.batching == Batching(
        delay_us=100,
        preferred=(4, 8),
        ordered=True,
        levels=3,
        default_level=2,
        policy=QueuePolicy(limit=9, timeout_us=500, delays=True, takes_timeouts=False),
        policies={1: QueuePolicy(timeout_us=7, takes_timeouts=True)},
    )


def test_warm_up_requests_have_their_batch_dimension(tmp_path: Path) -> None:
    assert read_config_pbtxt(CONFIG, tmp_path).warmups == (
        Warmup("zeros", {"X": WarmupInput("FP32", (2, 4))}, 3),
        Warmup("drawn", {"X": WarmupInput("INT64", (1, 4), random=True)}),
        Warmup("stored", {"X": WarmupInput("BYTES", (1, 1), data=tmp_path / "warmup" / "x")}),
    )
    unbatched = CONFIG.replace("max_batch_size: 16", "").replace("[ 8, 4 ]", "[]")
    assert read_config_pbtxt(unbatched, tmp_path).warmups[0].inputs["X"].shape == (4,)


@pytest.mark.parametrize(
    ("config", "merges"),
    [
        ("max_batch_size: 8", True),
        ("max_batch_size: 0", False),
        ('name: "x"', None),
        ("# max_batch_size: 0", None),
    ],
)
def test_a_batch_size_of_zero_is_not_the_same_as_none(tmp_path: Path, config: str, merges: bool | None) -> None:
    assert read_config_pbtxt(config, tmp_path).merges is merges


def test_configurations_in_json_and_yaml_say_it_too(tmp_path: Path) -> None:
    assert read_config_json('{"maxBatchSize": 0}', tmp_path).merges is False
    assert read_config_json("{}", tmp_path).merges is None
    (tmp_path / "config.pbtxt").write_text("max_batch_size: 0")
    assert read_settings(tmp_path).settings().merges is False
    (tmp_path / "mmcore.yaml").write_text("max_batch_size: 32\nqueue_limit: 5\nmax_queue_delay_us: 250\n")
    settings = read_settings(tmp_path).settings()
    assert (settings.merges, settings.max_batch_size) == (True, 32)
    assert settings.batching == Batching(delay_us=250, policy=QueuePolicy(limit=5))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("max_batch_size: 4 dynamic_batching { preferred_batch_size: 5 }", "preferred_batch_size: must be from 1 to"),
        ("dynamic_batching { priority_levels: 2 }", "default_priority_level: must be from 1 to"),
        ("dynamic_batching { priority_levels: 1000 default_priority_level: 1 }", "priority_levels: must not be above"),
        (
            "dynamic_batching { priority_queue_policy { key: 2 value { } } }",
            "priority_queue_policy: has a level that is not",
        ),
        ('model_warmup { name: "w" }', "model_warmup 'w': inputs: are missing"),
        ('model_warmup { name: "w" inputs { key: "X" value { dims: 1 zero_data: true } } }', "data_type: is missing"),
        (
            'model_warmup { name: "w" inputs { key: "X" value { data_type: TYPE_FP32 dims: 1 } } }',
            "states neither zero_data nor",
        ),
        (
            'model_warmup { name: "w" inputs { key: "X" value { data_type: TYPE_FP32 dims: -1 zero_data: true } } }',
            "dims: must not be negative",
        ),
        (
            'model_warmup { name: "w" inputs { key: "X" value { data_type: TYPE_FP32 input_data_file: "../x" } } }',
            "input_data_file: .* is not a path inside",
        ),
    ],
)
def test_what_cannot_be_names_its_field(tmp_path: Path, config: str, words: str) -> None:
    with pytest.raises(InvalidModel, match=words) as error:
        read_config_pbtxt(config, tmp_path)
    assert str(error.value).startswith("config.pbtxt: ")
