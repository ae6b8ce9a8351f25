"""A model in several worker processes: as many inferences at once, and a crash that costs one of them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from mmcore.errors import LoadFailed, Unavailable
from mmcore.model import ModelSettings, ModelSource
from mmcore.runtimes.isolation import IsolatedGroup

pytestmark = pytest.mark.slow

#: Answers its process id, once as many as the input says are at work; a negative input ends the process.
MEETING = """
import os, socket

class Model:
    inputs = [("X", "FP32", [1])]
    outputs = [("PID", "INT64", [1])]

    def predict(self, inputs):
        expected = int(inputs["X"][0])
        if expected < 0:
            os._exit(1)
        with socket.create_connection(("127.0.0.1", PORT)) as meeting:
            meeting.sendall(bytes([expected]))
            meeting.recv(1)
        return {"PID": [os.getpid()]}
"""


def meet(listener: socket.socket) -> None:
    """Let those that connect go on once as many are there as they say."""
    there: list[socket.socket] = []
    while True:
        try:
            there.append(listener.accept()[0])
        except OSError:
            return
        if len(there) >= there[-1].recv(1)[0]:
            for one in there:
                one.close()
            there.clear()


@pytest.fixture
def group(tmp_path: Path) -> Iterator[IsolatedGroup]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=meet, args=(listener,), daemon=True).start()
        (tmp_path / "model.py").write_text(MEETING.replace("PORT", str(listener.getsockname()[1])))
        made = IsolatedGroup(ModelSource("m", "1", "python", tmp_path / "model.py"), 3, network=True)
        yield made
        listener.shutdown(socket.SHUT_RDWR)
    pids = [member.pid for member in made.members]
    made.close()
    assert not any(pid is not None and psutil.pid_exists(pid) for pid in pids)


def ask(group: IsolatedGroup, number: int) -> int:
    ((_, _, pid),) = group.infer({"X": np.array([number], np.float32)}, ())
    return int(pid[0])


def test_each_member_answers_at_the_same_time(group: IsolatedGroup) -> None:
    with ThreadPoolExecutor(3) as threads:
        pids = set(threads.map(lambda _: ask(group, 3), range(3)))
    assert pids == {member.pid for member in group.members}
    assert len(pids) == 3
    assert group.size_bytes == sum(member.size_bytes for member in group.members)
    assert (group.platform, group.inputs[0].name, group.default_outputs) == ("python", "X", ("PID",))


def test_a_crash_costs_one_request_and_the_others_answer(group: IsolatedGroup) -> None:
    before = {member.pid for member in group.members}
    with pytest.raises(Unavailable, match="ended with exit code 1"):
        ask(group, -1)
    assert all(ask(group, 0) for _ in range(10))
    with ThreadPoolExecutor(3) as threads:
        pids = set(threads.map(lambda _: ask(group, 3), range(3)))
    assert len(pids) == 3
    assert len(pids & before) == 2


def test_the_group_is_given_up_with_one_of_its_members(group: IsolatedGroup, tmp_path: Path) -> None:
    told: list[LoadFailed] = []
    gone = threading.Event()
    group.watch_broken(lambda error: (told.append(error), gone.set()))
    (tmp_path / "model.py").unlink()
    with pytest.raises(Unavailable):
        ask(group, -1)
    assert gone.wait(10)
    assert "'model.py' does not exist" in str(told[0])


def test_a_group_that_cannot_load_leaves_no_process(tmp_path: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    (tmp_path / "model.py").write_text("raise ValueError('not today')")
    with pytest.raises(LoadFailed, match="not today"):
        IsolatedGroup(ModelSource("m", "1", "python", tmp_path / "model.py"), 2)
    assert set(psutil.Process().children(recursive=True)) <= before


def test_its_weight_is_what_is_stated(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MEETING)
    settings: Any = ModelSettings(size_bytes=7)
    group = IsolatedGroup(ModelSource("m", "1", "python", tmp_path / "model.py", settings), 2)
    group.close()
    assert group.size_bytes == 7
