from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from mmcore import log
from mmcore.errors import InvalidRequest, NotFound
from mmcore.pb import inference_pb2
from mmcore.server.settings import update_log_settings
from mmcore.server.tracing import Tracing


@pytest.fixture(autouse=True)
def switches(monkeypatch: pytest.MonkeyPatch) -> Iterator[log.LogSwitches]:
    made = log.LogSwitches()
    monkeypatch.setattr(log, "switches", made)
    logger = logging.getLogger("mmcore")
    level = logger.level
    yield made
    logger.setLevel(level)


def log_request(**settings: bool | int | str) -> inference_pb2.LogSettingsRequest:
    request = inference_pb2.LogSettingsRequest()
    for key, value in settings.items():
        kind = {bool: "bool_param", int: "uint32_param", str: "string_param"}[type(value)]
        setattr(request.settings[key], kind, value)
    return request


def test_asking_changes_nothing(switches: log.LogSwitches) -> None:
    answer = update_log_settings(log_request())
    assert switches == log.LogSwitches()
    assert set(answer.settings) == {
        *("log_info", "log_warning", "log_error", "log_requests"),
        *("log_verbose_level", "log_format", "log_file"),
    }


def test_switches_follow_the_settings(switches: log.LogSwitches) -> None:
    answer = update_log_settings(log_request(log_info=False, log_verbose_level=2, log_format="default"))
    assert (switches.info, switches.verbose, switches.format) == (False, 2, "default")
    assert answer.settings["log_verbose_level"].uint32_param == 2
    assert logging.getLogger("mmcore").level == logging.DEBUG


@pytest.mark.parametrize(
    "wrong", [{"log_file": "/tmp/x"}, {"log_info": "yes"}, {"log_verbose_level": True}, {"log_format": "x"}, {"x": 1}]
)
def test_a_wrong_setting_changes_none(switches: log.LogSwitches, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(wrong)).removeprefix("log_").split("_")[0]):
        update_log_settings(log_request(log_error=False, **wrong))
    assert switches == log.LogSwitches()


class OneModel:
    """As much of a router as tracing asks."""

    def versions(self, name: str) -> tuple[str, ...]:
        return ("1",) if name == "known" else ()


@pytest.fixture
def tracing() -> Tracing:
    return Tracing(OneModel())  # type: ignore[arg-type]  # see OneModel


def trace(tracing: Tracing, model: str = "", /, **settings: list[str]) -> dict[str, list[str]]:
    request = inference_pb2.TraceSettingRequest(model_name=model)
    for key, values in settings.items():
        request.settings[key].value.extend(values)
    return {key: list(setting.value) for key, setting in tracing.update(request).settings.items()}


def observed(tracing: Tracing, caplog: pytest.LogCaptureFixture, count: int) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO, "mmcore"):
        for number in range(count):
            tracing.observe("known", "1", str(number), {"REQUEST_START": 1, "REQUEST_END": 2})
    return [json.loads(record.getMessage().removeprefix("trace "))["id"] for record in caplog.records]


def test_nothing_is_traced_by_default(tracing: Tracing, caplog: pytest.LogCaptureFixture) -> None:
    assert trace(tracing)["trace_level"] == ["OFF"]
    assert not tracing.active
    assert observed(tracing, caplog, 3000) == []


def test_every_nth_request_is_traced_up_to_the_count(tracing: Tracing, caplog: pytest.LogCaptureFixture) -> None:
    trace(tracing, trace_level=["TIMESTAMPS"], trace_rate=["3"], trace_count=["2"])
    assert tracing.active
    assert observed(tracing, caplog, 20) == ["2", "5"]


def test_a_models_settings_go_before_the_servers(tracing: Tracing, caplog: pytest.LogCaptureFixture) -> None:
    told: list[bool] = []
    tracing.on_change = told.append
    trace(tracing, trace_level=["TIMESTAMPS"], trace_rate=["1"])
    trace(tracing, "known", trace_level=["OFF"])
    assert observed(tracing, caplog, 3) == []
    assert trace(tracing, "known", trace_level=[])["trace_level"] == ["TIMESTAMPS"]
    assert observed(tracing, caplog, 3) == ["0", "1", "2"]
    trace(tracing, trace_level=[])
    assert told == [True, True, True, False]


@pytest.mark.parametrize(
    "wrong",
    [
        {"trace_level": ["TENSORS"]},
        {"trace_rate": ["0"]},
        {"trace_rate": ["1", "2"]},
        {"trace_count": ["many"]},
        {"trace_mode": ["opentelemetry"]},
        {"trace_file": ["/tmp/x"]},
        {"colour": ["red"]},
    ],
)
def test_a_wrong_trace_setting_changes_none(tracing: Tracing, wrong: dict[str, list[str]]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(wrong)).replace("_", "[_ ]")):
        trace(tracing, **{"trace_level": ["TIMESTAMPS"], **wrong})
    assert not tracing.active


def test_settings_of_an_unknown_model_are_refused(tracing: Tracing) -> None:
    with pytest.raises(NotFound, match="Request for unknown model: 'nope' is not found"):
        trace(tracing, "nope", trace_rate=["1"])
