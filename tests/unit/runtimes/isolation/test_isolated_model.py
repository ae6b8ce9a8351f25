"""A model in a worker process: it answers as it would in this one, and its worker's end is survived."""

from __future__ import annotations

import logging
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from mmcore.errors import (
    Cancelled,
    DeadlineExceeded,
    InferenceFailed,
    InvalidRequest,
    LoadFailed,
    MmcoreError,
    Overloaded,
    Unavailable,
)
from mmcore.model import ModelSettings, ModelSource, TensorSpec
from mmcore.runtimes.isolation import IsolatedModel
from mmcore.runtimes.isolation import model as isolated_model
from mmcore.runtimes.isolation.model import Callers

pytestmark = pytest.mark.slow

HEAD = """
import os, socket, sys, time
import numpy as np
from pathlib import Path

class Model:
    inputs = [("X", "FP32", [-1])]
    outputs = [("Y", "FP32", [-1]), ("Z", "FP32", [-1])]

"""
DOUBLE = HEAD + "    def predict(self, inputs):\n        return {'Y': inputs['X'] * 2, 'Z': -inputs['X']}\n"

Make = Callable[..., IsolatedModel]
Workers = Callable[[], list[psutil.Process]]


class Call:
    def __init__(self, within_s: float | None = None) -> None:
        self.deadline = None if within_s is None else time.monotonic() + within_s
        self.cancelled = False


@pytest.fixture
def workers() -> Workers:
    """Tells the processes started during the test; servers that other tests share may be running as well."""
    others = set(psutil.Process().children(recursive=True))
    return lambda: [one for one in psutil.Process().children(recursive=True) if one not in others]


@pytest.fixture
def make(tmp_path: Path, workers: Workers) -> Iterator[Make]:
    made: list[IsolatedModel] = []

    def start(text: str, **settings: Any) -> IsolatedModel:
        (tmp_path / "model.py").write_text(text)
        made.append(IsolatedModel(ModelSource("m", "1", "python", tmp_path / "model.py", ModelSettings(**settings))))
        return made[-1]

    yield start
    for model in made:
        model.close()
    assert not workers()


def x(*numbers: float) -> dict[str, NDArray[Any]]:
    return {"X": np.array(numbers, np.float32)}


def answer(model: IsolatedModel, number: float) -> list[float]:
    numbers: list[float] = model.infer(x(number), ())[0][2].tolist()
    return numbers


def predicting(*lines: str) -> str:
    return HEAD + "    def predict(self, inputs):\n" + "".join(f"        {line}\n" for line in lines)


def test_it_is_described_and_answers_as_the_model_does(make: Make) -> None:
    model = make(DOUBLE)
    assert model.platform == "python"
    assert model.inputs == (TensorSpec("X", "FP32", (-1,)),)
    assert model.default_outputs == ("Y", "Z")
    assert [(name, datatype, array.tolist()) for name, datatype, array in model.infer(x(1, 2), ())] == [
        ("Y", "FP32", [2, 4]),
        ("Z", "FP32", [-1, -2]),
    ]
    assert [name for name, _, _ in model.infer(x(1), ("Z", "Y"))] == ["Z", "Y"]
    with pytest.raises(InvalidRequest, match=r"has no output 'W'; it has 'Y', 'Z'"):
        model.infer(x(1), ("W",))


@pytest.mark.parametrize("size", [0, 1, 16_384, 16_385, 1_000_000])
def test_tensors_of_any_size_go_through(make: Make, size: int) -> None:
    model = make(DOUBLE)
    array = np.arange(size, dtype=np.float32)
    for _ in range(3):
        y, z = model.infer({"X": array}, ())
        np.testing.assert_array_equal(y[2], array * 2)
        np.testing.assert_array_equal(z[2], -array)


def test_inputs_that_the_model_keeps_stay_as_they_are(make: Make) -> None:
    model = make(
        predicting(
            "self.kept = getattr(self, 'kept', []) + [inputs['X']]",
            "return {'Y': [array[0] for array in self.kept], 'Z': [0]}",
        )
    )
    for number in (1, 2, 3):
        y = model.infer({"X": np.full(100_000, number, np.float32)}, ())[0][2]
    assert y.tolist() == [1, 2, 3]


def test_what_it_weighs_is_its_workers_memory_unless_it_is_stated(make: Make) -> None:
    assert 10e6 < make(DOUBLE).size_bytes < 500e6
    assert make(DOUBLE, size_bytes=7).size_bytes == 7


@pytest.mark.parametrize(
    ("raised", "expected", "text"),
    [
        ("ValueError('five')", InferenceFailed, "model 'm': ValueError: five"),
        ("SystemExit(3)", InferenceFailed, "SystemExit: 3"),
        ("MemoryError()", Overloaded, "model 'm' ran out of memory"),
    ],
)
def test_what_the_model_raises_is_answered_and_the_worker_stays(
    make: Make, raised: str, expected: type[Exception], text: str
) -> None:
    model = make(predicting(f"raise {raised}"))
    before = model.pid
    for _ in range(2):
        with pytest.raises(expected, match=f"^{text}$"):
            model.infer(x(1), ())
    assert model.pid == before


def test_a_model_can_blame_the_caller(make: Make) -> None:
    model = make("from mmcore.errors import InvalidRequest\n" + predicting("raise InvalidRequest('Y < 0')"))
    with pytest.raises(InvalidRequest, match=r"^Y < 0$"):
        model.infer(x(1), ())


def test_a_load_that_fails_tells_why_and_leaves_no_process(make: Make, workers: Workers) -> None:
    for text, message in (
        ("raise RuntimeError('no GPU')", "RuntimeError: no GPU"),
        ("import os\nos.abort()", "its worker process was killed by SIGABRT while it loaded"),
        ("class Model: pass", "has no class 'Model' with a predict method"),
    ):
        with pytest.raises(LoadFailed, match=message):
            make(text)
        assert not workers()


def test_a_load_without_descriptors_left_fails_and_leaves_nothing(make: Make, workers: Workers) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The first one that is missing is another one each time.
    for spare in range(12):
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + spare, hard))
        try:
            make(DOUBLE).close()
        except (LoadFailed, OSError) as error:
            assert "Too many open files" in str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert not workers()
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_load_without_room_for_temporary_files_says_so_and_the_next_one_works(
    make: Make, workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = tmp_path / "full"
    full.touch()
    monkeypatch.setattr(tempfile, "tempdir", str(full))
    with pytest.raises(LoadFailed, match="its worker process cannot be started: "):
        make(DOUBLE)
    assert not workers()
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert answer(make(DOUBLE), 2) == [4]


def test_what_it_prints_is_logged_by_line_under_its_name(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = make(
        predicting(
            "print('to stdout')",
            "print('\\x1b[31mred' + 'x' * 5000, file=sys.stderr)",
            "for number in range(1000): print('many', number)",
            "sys.stdout.write('no end of line')",
            "return {'Y': [1], 'Z': [1]}",
        )
    )
    answer(model, 1)
    model.close()
    lines = [record.getMessage() for record in caplog.records]
    assert "model m: to stdout" in lines
    assert any(line.startswith("model m: ?[31mredxxx") and len(line) < 2100 for line in lines)
    assert len([line for line in lines if "many" in line]) < 250
    assert any("lines of its worker were dropped" in line for line in lines)


def test_a_request_that_was_not_handed_over_is_asked_again(make: Make) -> None:
    model = make(DOUBLE)
    for _ in range(3):
        before = model.pid
        assert before is not None
        psutil.Process(before).kill()
        assert answer(model, 4) == [8]
        assert model.pid != before


def test_the_pause_before_restarts_grows_and_ends_with_an_answer(make: Make) -> None:
    model = make(predicting("if inputs['X'][0] < 0: os._exit(1)", "return {'Y': [1], 'Z': [1]}"))
    for _ in range(3):
        with pytest.raises(Unavailable, match="ended with exit code 1 while it answered; it is being restarted"):
            answer(model, -1)
    assert model._fruitless >= 2
    answer(model, 1)
    assert model._fruitless == 0


def test_too_many_crashes_give_it_up_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated_model, "_PAUSE_S", 0.001)
    model = make(predicting("os._exit(1)"))
    told: list[MmcoreError] = []
    gone = threading.Event()
    model.watch_broken(lambda error: (told.append(error), gone.set()))
    for _ in range(isolated_model.CRASHES):
        with pytest.raises(Unavailable):
            answer(model, 1)
    assert gone.wait(10)
    with pytest.raises(LoadFailed, match=r"crashed 5 times within 60 s; last, its worker process ended with"):
        answer(model, 1)
    later: list[MmcoreError] = []
    model.watch_broken(later.append)
    assert [str(error) for error in later] == [str(error) for error in told]
    assert len(told) == 1


def test_crashes_that_lie_far_apart_do_not_give_it_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated_model, "_PAUSE_S", 0.001)
    monkeypatch.setattr(isolated_model, "CRASHES_WITHIN_S", 0.0)
    model = make(predicting("if inputs['X'][0] < 0: os._exit(1)", "return {'Y': [1], 'Z': [1]}"))
    for _ in range(isolated_model.CRASHES + 1):
        with pytest.raises(Unavailable):
            answer(model, -1)
    assert answer(model, 1) == [1]


def test_a_model_whose_files_are_gone_at_a_restart_is_given_up(make: Make, tmp_path: Path) -> None:
    model = make(DOUBLE)
    (tmp_path / "model.py").unlink()
    assert model.pid is not None
    psutil.Process(model.pid).kill()
    with pytest.raises(LoadFailed, match=r"'model.py' does not exist"):
        answer(model, 1)


def test_a_model_with_other_tensors_after_a_restart_is_given_up(make: Make, tmp_path: Path) -> None:
    model = make(DOUBLE)
    (tmp_path / "model.py").write_text(DOUBLE.replace('"Z"', '"Q"').replace("'Z'", "'Q'"))
    assert model.pid is not None
    psutil.Process(model.pid).kill()
    with pytest.raises(LoadFailed, match="has other tensors since its worker was restarted"):
        answer(model, 1)


SLOW = predicting("time.sleep(float(inputs['X'][0]))", "return {'Y': [1], 'Z': [1]}")


def test_a_slow_answer_that_comes_soon_after_the_deadline_costs_no_restart(make: Make) -> None:
    model = make(SLOW)
    before = model.pid
    with pytest.raises(DeadlineExceeded, match="nobody waited any more when model 'm' answered"):
        model.infer(x(0.4), (), Call(within_s=0.1))
    assert model.pid == before
    assert answer(model, 0) == [1]


def test_a_caller_that_leaves_does_not_leave_its_inference_running(make: Make) -> None:
    model = make(SLOW)
    before = model.pid
    call = Call()
    call.cancelled = True
    with pytest.raises(Cancelled):
        model.infer(x(0), (), call)
    call.cancelled = False
    threading.Timer(0.2, lambda: setattr(call, "cancelled", True)).start()
    with pytest.raises(DeadlineExceeded, match="its worker process is restarted"):
        model.infer(x(100), (), call)
    assert answer(model, 0) == [1]
    assert model.pid != before


def test_callers_of_one_batch_wait_as_long_as_any_of_them() -> None:
    soon, late, patient = Call(1), Call(10), Call()
    assert Callers([soon, late]).deadline == late.deadline
    assert Callers([soon, patient]).deadline is None
    assert Callers([soon, None]).deadline is None
    soon.cancelled = True
    assert not Callers([soon, late]).cancelled
    assert not Callers([soon, None]).cancelled
    assert Callers([soon]).cancelled


def test_an_answer_that_is_too_long_is_refused_and_the_worker_stays(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolated_model, "ANSWER_LIMIT_BYTES", 2**20)
    model = make(predicting("return {'Y': np.zeros(int(inputs['X'][0]), 'f4'), 'Z': [0]}"))
    before = model.pid
    with pytest.raises(InferenceFailed, match="the answer of 4000064 bytes is longer than a worker may give"):
        model.infer(x(1_000_000), ())
    assert model.infer(x(100_000), ())[0][2].shape == (100_000,)
    assert model.pid == before


#: Writes what it likes to its connection, which it finds among its descriptors.
FORGING = """
def connection():
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            if number > 2 and os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                return number
        except OSError:
            pass
"""


@pytest.mark.parametrize(
    "sent",
    [
        "b'garbage that is no frame at all'",
        "b'\\x08\\0\\0\\0\\x05\\0\\0\\0'",
        "b'\\xff\\xff\\xff\\xff\\x05\\0\\0\\0'",
        "b'\\x10\\0\\0\\0\\x05\\0\\0\\0' + bytes(8)",
        "b'\\x09\\0\\0\\0\\x06\\0\\0\\0x'",
        "b'\\x10\\0\\0\\0\\x06\\0\\0\\0' + b'\\xff' * 8",
        "b'\\x08\\0\\0\\0\\x02\\0\\0\\0'",
        "b'\\x20\\0\\0\\0\\x05\\0\\0\\0'",
    ],
    ids=["garbage", "empty", "long", "no outputs", "bad need", "huge need", "another kind", "cut off"],
)
def test_a_worker_that_forges_its_answer_is_not_believed(make: Make, sent: str) -> None:
    model = make(
        FORGING.join(["import os\n", "\n"])
        + predicting(
            f"if inputs['X'][0] < 0: os.write(connection(), {sent}); time.sleep(0.3); os._exit(0)",
            "return {'Y': inputs['X'], 'Z': [0]}",
        )
    )
    with pytest.raises((InferenceFailed, Unavailable)):
        answer(model, -1)
    assert answer(model, 1) == [1]


def test_processes_that_a_model_starts_end_with_its_worker(make: Make) -> None:
    model = make(
        predicting(
            "import subprocess",
            "self.child = subprocess.Popen(['sleep', '1000'])",
            "return {'Y': [self.child.pid], 'Z': [0]}",
        )
    )
    (number,) = answer(model, 1)
    child = psutil.Process(int(number))
    model.close()
    _, alive = psutil.wait_procs([child], timeout=10)
    assert all(one.status() == psutil.STATUS_ZOMBIE for one in alive)


def test_closing_lets_the_model_close_and_gives_every_descriptor_back(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    text = DOUBLE + "    def close(self):\n        print('closed as asked')\n"
    make(text).close()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        caplog.clear()
        model = make(text)
        model.infer({"X": np.ones(100_000, np.float32)}, ())
        model.close()
        assert "closed as asked" in caplog.text
        with pytest.raises(Unavailable, match="is being unloaded"):
            answer(model, 1)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_closing_does_not_wait_for_a_model_that_does_not_end(make: Make) -> None:
    model = make(DOUBLE + "    def close(self):\n        time.sleep(1000)\n")
    started = time.monotonic()
    model.close()
    assert time.monotonic() - started < 5


def test_many_threads_at_once_are_all_answered(make: Make) -> None:
    model = make(DOUBLE)
    wrong: list[float] = []

    def ask(start: int) -> None:
        wrong.extend(number for number in range(start, start + 100) if answer(model, number) != [2 * number])

    threads = [threading.Thread(target=ask, args=(1000 * number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
