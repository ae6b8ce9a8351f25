"""Models in worker processes, as clients of a real server see them: what a bad one does harms only itself."""

from __future__ import annotations

import math
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from tests.serving import Instance, Serve, write_model

pytestmark = pytest.mark.slow

WITHIN_S = 20.0
ISOLATED = "isolation: process\n"

#: Answers its number, but for some numbers that it does not survive.
DANGEROUS = """
import ctypes, os

class Model:
    inputs = [("X", "FP32", [-1])]
    outputs = [("Y", "FP32", [-1])]

    def predict(self, inputs):
        x = inputs["X"]
        if x[0] == -1:
            os._exit(3)
        if x[0] == -2:
            ctypes.string_at(0)
        if x[0] == -3:
            while True:
                pass
        if x[0] == -4:
            self.kept = bytearray(8 << 30)
        return {"Y": x * 2}
"""

SAFE = """
class Model:
    inputs = [("X", "FP32", [-1])]
    outputs = [("Y", "FP32", [-1])]

    def predict(self, inputs):
        return {"Y": inputs["X"] * 2}
"""

#: Tells its environment, as one text.
TELLS = """
import os

class Model:
    inputs = [("X", "BYTES", [1])]
    outputs = [("PID", "INT64", [1]), ("ENV", "BYTES", [1])]

    def predict(self, inputs):
        return {"PID": [os.getpid()], "ENV": ["\\n".join(f"{k}={v}" for k, v in os.environ.items())]}
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


@pytest.fixture
def instance(serve: Serve, models: Path) -> Instance:
    write_model(models, "dangerous", DANGEROUS, settings=ISOLATED + "isolation_memory: 1GiB\n")
    write_model(models, "safe", SAFE)
    return serve(models, "--preload", "all")


def double(instance: Instance, model: str, number: float, timeout_s: float | None = WITHIN_S, size: int = 1) -> float:
    with triton.InferenceServerClient(instance.grpc) as client:
        x = triton.InferInput("X", [size], "FP32")
        x.set_data_from_numpy(np.full(size, number, np.float32))
        answer = client.infer(model, [x], client_timeout=timeout_s).as_numpy("Y")
        assert answer is not None
        assert answer.shape == (size,)
        return float(answer[-1])


def refused(instance: Instance, number: float, timeout_s: float = WITHIN_S) -> tuple[str, str]:
    """Status and text of what the dangerous model's number gets."""
    with pytest.raises(InferenceServerException) as caught:
        double(instance, "dangerous", number, timeout_s)
    return str(caught.value.status()), str(caught.value.message())


def workers(instance: Instance) -> list[psutil.Process]:
    return [
        child for child in psutil.Process(instance.process.pid).children() if "isolation/confined.py" in cmdline(child)
    ]


def cmdline(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def zombies(instance: Instance) -> list[psutil.Process]:
    children = psutil.Process(instance.process.pid).children(recursive=True)
    return [child for child in children if child.status() == psutil.STATUS_ZOMBIE]


def worked_s(process: psutil.Process) -> float:
    """Processor time; endless when it has ended."""
    try:
        return float(process.cpu_times().user)
    except psutil.Error:
        return math.inf


def ends(process: psutil.Process) -> bool:
    _, alive = psutil.wait_procs([process], timeout=WITHIN_S)
    return all(one.status() == psutil.STATUS_ZOMBIE for one in alive)


@pytest.mark.parametrize(
    ("number", "how"), [(-1, "ended with exit code 3"), (-2, "was killed by SIGSEGV")], ids=["os._exit", "segfault"]
)
def test_a_crash_fails_the_request_it_came_from_and_no_other(instance: Instance, number: int, how: str) -> None:
    assert double(instance, "dangerous", 3) == 6
    (before,) = workers(instance)
    status, text = refused(instance, number)
    assert status == "StatusCode.UNAVAILABLE"
    assert how in text
    assert double(instance, "safe", 4) == 8
    assert double(instance, "dangerous", 5) == 10
    (after,) = workers(instance)
    assert after.pid != before.pid
    assert not zombies(instance)
    if number == -2:
        assert "Fatal Python error: Segmentation fault" in instance.log_text()


def test_a_worker_that_is_killed_while_idle_costs_nobody_an_answer(instance: Instance) -> None:
    (worker,) = workers(instance)
    worker.kill()
    assert ends(worker)
    assert double(instance, "dangerous", 5) == 10


def test_a_worker_that_is_stopped_is_ended_at_its_callers_deadline(instance: Instance) -> None:
    assert double(instance, "dangerous", 1) == 2
    (worker,) = workers(instance)
    worker.suspend()
    assert refused(instance, 3, 0.5)[0] == "StatusCode.DEADLINE_EXCEEDED"
    assert ends(worker)
    assert double(instance, "safe", 4) == 8
    assert double(instance, "dangerous", 5) == 10


def test_too_much_memory_is_refused_and_the_server_does_not_grow(instance: Instance) -> None:
    before = psutil.Process(instance.process.pid).memory_info().rss
    status, text = refused(instance, -4)
    assert status == "StatusCode.RESOURCE_EXHAUSTED"
    assert text == "model 'dangerous' ran out of memory (its limit is 1073741824 bytes)"
    assert psutil.Process(instance.process.pid).memory_info().rss - before < 50e6
    assert double(instance, "dangerous", 5) == 10


def test_an_endless_loop_is_ended_after_its_callers_deadline_while_others_are_served(instance: Instance) -> None:
    assert double(instance, "dangerous", 1) == 2
    (before,) = workers(instance)
    idle_s = worked_s(before)
    with ThreadPoolExecutor() as pool:
        looping = pool.submit(refused, instance, -3, 0.5)
        while not looping.done() and worked_s(before) < idle_s + 0.02:
            time.sleep(0.005)  # until it loops
        waiting = pool.submit(double, instance, "dangerous", 7)
        answered = 0
        while not looping.done():
            answered += double(instance, "safe", 4) == 8
        # One may have come before the loop, one waited for its end.
        assert answered > 2
        assert looping.result()[0] == "StatusCode.DEADLINE_EXCEEDED"
        assert waiting.result() == 14, "it was in the queue behind the loop"
    assert ends(before)
    assert double(instance, "dangerous", 1) == 2
    assert len(workers(instance)) == 1


def test_a_crash_in_merged_requests_fails_only_the_one_that_caused_it(serve: Serve, models: Path) -> None:
    text = DANGEROUS.replace("x[0] == -1", "(x == -1).any()").replace("return", "import time; time.sleep(0.05); return")
    write_model(models, "dangerous", text, settings=ISOLATED + "max_batch_size: 64\n")
    instance = serve(models, "--preload", "all")
    numbers = [1, 2, 3, -1, 5, 6, 7, 8]
    with ThreadPoolExecutor(len(numbers)) as pool:
        calls = [pool.submit(double, instance, "dangerous", number) for number in numbers]
    for number, call in zip(numbers, calls, strict=True):
        if number == -1:
            assert "ended with exit code 3" in str(call.exception())
        else:
            assert call.result() == 2 * number


def test_the_settings_limit_ends_an_inference_whose_caller_has_no_deadline(serve: Serve, models: Path) -> None:
    write_model(models, "dangerous", DANGEROUS, settings=ISOLATED + "timeout: 300ms\n")
    instance = serve(models)
    with pytest.raises(InferenceServerException, match=r"did not answer in (0\.[3-9]|[1-9]\d*\.\d) s") as caught:
        double(instance, "dangerous", -3, timeout_s=None)
    assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    assert double(instance, "dangerous", 4) == 8


def test_more_looping_models_than_threads_leave_the_others_serving(serve: Serve, models: Path) -> None:
    names = [f"loop{number}" for number in range(6)]
    for name in names:
        write_model(models, name, DANGEROUS, settings=ISOLATED)
    write_model(models, "safe", SAFE, settings="execution: thread\n")
    instance = serve(models, "--preload", "all")
    with ThreadPoolExecutor() as pool:
        looping = [pool.submit(double, instance, name, -3, 3) for name in names]
        answered = 0
        while not all(call.done() for call in looping):
            answered += double(instance, "safe", 4) == 8
    assert answered > 5
    assert all(isinstance(call.exception(), InferenceServerException) for call in looping)


def test_a_model_that_crashes_again_and_again_is_given_up_until_it_is_loaded_anew(instance: Instance) -> None:
    for _ in range(5):
        assert refused(instance, -1)[0] == "StatusCode.UNAVAILABLE"
    deadline = time.monotonic() + WITHIN_S
    while workers(instance):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    status, text = refused(instance, 1)
    assert status == "StatusCode.FAILED_PRECONDITION"
    assert "model 'dangerous' crashed 5 times within 60 s; last, its worker process ended with exit code 3" in text
    assert double(instance, "safe", 4) == 8
    with triton.InferenceServerClient(instance.grpc) as client:
        index = {row.name: row for row in client.get_model_repository_index().models}
        assert "crashed 5 times" in index["dangerous"].reason
        client.load_model("dangerous")
    assert double(instance, "dangerous", 2) == 4


def test_a_crash_while_loading_is_a_failed_load(serve: Serve, models: Path) -> None:
    write_model(models, "stillborn", "import os\nos._exit(7)\n", settings=ISOLATED)
    instance = serve(models)
    with pytest.raises(InferenceServerException, match="ended with exit code 7 while it loaded") as caught:
        double(instance, "stillborn", 1)
    assert caught.value.status() == "StatusCode.FAILED_PRECONDITION"
    assert not workers(instance)


def test_unloading_ends_the_worker_and_leaves_no_descriptor_behind(instance: Instance) -> None:
    process = psutil.Process(instance.process.pid)
    with triton.InferenceServerClient(instance.grpc) as client:
        counts = []
        for _ in range(3):
            client.load_model("dangerous")
            (worker,) = workers(instance)
            assert double(instance, "dangerous", 2, size=100_000) == 4
            client.unload_model("dangerous")
            assert ends(worker)
            assert not zombies(instance)
            deadline = time.monotonic() + WITHIN_S
            while any("memfd:mmcore" in link(process, fd) for fd in fds(process)):
                assert time.monotonic() < deadline, "shared memory is still open"
                time.sleep(0.01)
            counts.append(len(fds(process)))
    assert counts[-1] <= counts[0], counts


def fds(process: psutil.Process) -> list[str]:
    return [entry.name for entry in Path(f"/proc/{process.pid}/fd").iterdir()]


def link(process: psutil.Process, fd: str) -> str:
    try:
        return str(Path(f"/proc/{process.pid}/fd/{fd}").readlink())
    except OSError:
        return ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["drained", "killed"])
def test_a_worker_does_not_outlive_the_server(instance: Instance, number: signal.Signals) -> None:
    (worker,) = workers(instance)
    instance.signal(number)
    assert instance.wait() == (0 if number is signal.SIGTERM else -number)
    assert ends(worker)


def test_a_looping_worker_does_not_outlive_the_server_either(instance: Instance) -> None:
    (worker,) = workers(instance)
    refused(instance, -3, 0.05)
    instance.signal(signal.SIGKILL)
    instance.wait()
    assert ends(worker)


def test_an_instance_can_demand_that_untrusted_formats_are_isolated(serve: Serve, models: Path) -> None:
    write_model(models, "tells", TELLS, settings="isolation: none\n")
    instance = serve(models, MMCORE_ISOLATE="untrusted", AWS_SECRET_ACCESS_KEY="a secret")
    with triton.InferenceServerClient(instance.grpc) as client:
        x = triton.InferInput("X", [1], "BYTES")
        x.set_data_from_numpy(np.array([b"?"], dtype=object))
        answer = client.infer("tells", [x], client_timeout=WITHIN_S)
        pid, environment = answer.as_numpy("PID"), answer.as_numpy("ENV")
        assert pid is not None
        assert environment is not None
        assert pid[0] == workers(instance)[0].pid
        assert b"PATH=" in environment[0]
        assert b"secret" not in environment[0]
        assert b"MMCORE" not in environment[0]


@pytest.mark.parametrize("settings", ["config.pbtxt", "model-settings.json"])
def test_settings_of_other_servers_can_ask_for_isolation(serve: Serve, models: Path, settings: str) -> None:
    folder = write_model(models, "safe", SAFE)
    (folder / settings).write_text(
        'parameters { key: "isolation" value { string_value: "process" } }'
        if settings == "config.pbtxt"
        else '{"parameters": {"extra": {"isolation": "process"}}}'
    )
    instance = serve(models)
    assert double(instance, "safe", 2) == 4
    assert len(workers(instance)) == 1
