"""The payload log by itself: its files, its bounds, and a destination that cannot be written."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmcore.config import PayloadSettings
from mmcore.errors import Status
from mmcore.pb.inference_pb2 import ModelInferRequest
from mmcore.server import payloads
from mmcore.server.payloads import PayloadLog

PATH = "/inference.GRPCInferenceService/ModelInfer"


class Call:
    metadata = ()


def ask(log: PayloadLog, number: int, answer: bytes = b"answer") -> None:
    ended = log.begin(PATH, Call(), ModelInferRequest(model_name="m", id=str(number)).SerializeToString())  # type: ignore[arg-type]
    assert ended is not None
    ended(Status.OK, "", answer)


def until(holds: Callable[[], bool]) -> None:
    ends_at = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < ends_at
        time.sleep(0.005)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_file_is_begun_anew_when_it_is_long_and_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payloads, "_FILE_BYTES", 4000)
    monkeypatch.setattr(payloads, "_FILES", 3)
    file = tmp_path / "payloads.jsonl"
    log = PayloadLog(str(file), PayloadSettings(), "i")
    for number in range(100):
        ask(log, number)
        until(lambda wanted=2 * (number + 1): log.written == wanted)  # type: ignore[misc]
    log.close()
    assert log.dropped == 0
    files = [file.with_name(f"{file.name}.{number}") for number in (3, 2, 1)] + [file]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert all(one.stat().st_size <= 4000 for one in files)
    # Whole lines, in their order, the newest among them.
    events = [event for one in files for event in read(one)]
    assert [event["type"].rpartition(".")[2] for event in events[-2:]] == ["request", "response"]
    kept = [event["id"] for event in events]
    assert len(kept) == len(set(kept)) > 20
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)


def test_a_file_that_is_there_is_gone_on_with(tmp_path: Path) -> None:
    file = tmp_path / "payloads.jsonl"
    for _ in range(2):
        log = PayloadLog(str(file), PayloadSettings(), "i")
        ask(log, 1)
        log.close()
    assert len(read(file)) == 4


def test_a_file_that_cannot_be_written_is_told_once_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "folder" / "payloads.jsonl"
    log = PayloadLog(str(file), PayloadSettings(), "i")
    with caplog.at_level(logging.WARNING):
        for number in range(5):
            ask(log, number)
        until(lambda: log.dropped == 10)
    assert len(caplog.records) == 1
    file.parent.mkdir()
    ask(log, 6)
    log.close()
    assert (log.written, log.dropped, len(read(file))) == (2, 10, 2)


def test_what_waits_is_bounded_by_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payloads, "_BYTES", 1000)
    free, writing = threading.Event(), threading.Event()
    written: list[str] = []

    class Slow:
        def __call__(self, text: str) -> None:
            writing.set()
            free.wait(20)
            written.append(text)

        def close(self) -> None:
            pass

    monkeypatch.setattr(payloads, "_opened", lambda destination: Slow())
    log = PayloadLog("x", PayloadSettings(), "i")
    began = time.monotonic()
    for number in range(20):
        ask(log, number, bytes(300))
    assert time.monotonic() - began < 5
    assert writing.wait(20)
    free.set()
    log.close()
    assert log.written == len(written)
    assert log.written + log.dropped == 40
    assert 0 < sum(".response" in text for text in written) <= 4


def test_ending_does_not_wait_for_a_writer_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payloads, "_CLOSE_S", 0.2)
    free, closed = threading.Event(), threading.Event()

    class Hanging:
        def __call__(self, text: str) -> None:
            free.wait(20)

        def close(self) -> None:
            closed.set()

    monkeypatch.setattr(payloads, "_opened", lambda destination: Hanging())
    log = PayloadLog("x", PayloadSettings(), "i")
    ask(log, 1)
    began = time.monotonic()
    log.close()
    assert time.monotonic() - began < 10
    assert not closed.is_set()
    free.set()
    assert closed.wait(20)
