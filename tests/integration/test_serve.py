"""``mmcore serve`` as a process: how it starts, follows its folder, keeps to its capacity, and ends."""

from __future__ import annotations

import json
import queue
import shutil
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tritonclient.utils import InferenceServerException

from tests.management import SCALE, SLOW_LOAD
from tests.serving import ADD_SUB, WAITING, Instance, Serve, command, environment, write_model

pytestmark = pytest.mark.slow

WITHIN_S = 30.0


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def run(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*args), capture_output=True, text=True, timeout=60, env=environment(**env), check=False
    )


def scale(instance: Instance, model: str = "scale", timeout_s: float | None = WITHIN_S) -> float:
    with triton.InferenceServerClient(instance.grpc) as client:
        x = triton.InferInput("X", [1], "FP32")
        x.set_data_from_numpy(np.ones(1, np.float32))
        answer = client.infer(model, [x], client_timeout=timeout_s).as_numpy("Y")
        assert answer is not None
        return float(answer[0])


def states(instance: Instance) -> dict[str, tuple[str, str]]:
    with triton.InferenceServerClient(instance.grpc) as client:
        return {row.name: (row.state, row.reason) for row in client.get_model_repository_index().models}


def wait_until(condition: Any, what: str) -> None:
    ends_at = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < ends_at, f"not within {WITHIN_S} s: {what}"
        time.sleep(0.02)


def in_thread(work: Any) -> Future[Any]:
    future: Future[Any] = Future()

    def go() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=go, daemon=True).start()
    return future


def ask_waiting(instance: Instance, file: Path) -> Future[Any]:
    """A request that is under way until ``file`` exists; returns when the model has begun with it."""

    def work() -> Any:
        with triton.InferenceServerClient(instance.grpc) as client:
            name = triton.InferInput("FILE", [1], "BYTES")
            name.set_data_from_numpy(np.array([str(file).encode()], dtype=np.object_))
            answer = client.infer("waiting", [name]).as_numpy("DONE")
            assert answer is not None
            return answer.tolist()

    future = in_thread(work)
    wait_until(file.with_name(f"{file.name}.started").exists, "the model begins")
    return future


# Starting


def test_the_ready_line_tells_where_and_what(serve: Serve, models: Path, tmp_path: Path) -> None:
    write_model(models, "scale", SCALE.replace("FACTOR", "2"))
    write_model(models, "other", SCALE.replace("FACTOR", "3"))
    instance = serve(models, "--uds", tmp_path / "socket")
    assert set(instance.ready) == {"event", "grpc", "rest", "metrics", "uds", "instance", "models"}
    assert instance.ready["event"] == "ready"
    assert instance.ready["models"] == 2
    host, port = instance.grpc.split(":")
    assert host == "127.0.0.1"
    assert int(port) > 0
    with triton.InferenceServerClient(f"unix:{tmp_path / 'socket'}") as client:
        assert client.is_server_ready()
    assert scale(instance) == 2.0


def test_it_serves_without_any_model(serve: Serve) -> None:
    instance = serve()
    assert instance.ready["models"] == 0
    assert "uds" not in instance.ready
    assert states(instance) == {}


def test_an_idle_instance_is_small_and_soon_ready(serve: Serve, models: Path) -> None:
    for number in range(20):
        write_model(models, f"scale{number}", SCALE.replace("FACTOR", "2"))
    instance = serve(models)
    process = psutil.Process(instance.process.pid)
    worked_s = sum(process.cpu_times()[:4])
    memory = process.memory_info()
    # 54 MB; how much of the libraries' files the kernel maps unasked differs by some MB from start to start.
    assert memory.rss < 65e6
    assert memory.rss - memory.shared < 38e6
    # 0.5 s; of processor time, since how long it takes depends on what runs beside it.
    assert worked_s < 3.0


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_it_runs_on_either_event_loop(serve: Serve, models: Path, loop: str) -> None:
    write_model(models, "scale", SCALE.replace("FACTOR", "2"))
    instance = serve(models, "--event-loop", loop)
    assert scale(instance) == 2.0
    instance.signal()
    assert instance.wait() == 0


def test_flags_go_before_environment_before_file(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "mmcore.yaml"
    file.write_text("server-name: from-file\nlog_level: warning\nmax-message: 1MiB\ngrpc-port: 1\n")
    instance = serve(None, "--config", file, MMCORE_SERVER_NAME="from-environment")
    with triton.InferenceServerClient(instance.grpc) as client:
        assert client.get_server_metadata().name == "from-environment"
        assert not client.get_log_settings().settings["log_info"].bool_param
    other = serve(None, "--config", file, "--server-name", "from-flag", MMCORE_SERVER_NAME="from-environment")
    with triton.InferenceServerClient(other.grpc) as client:
        assert client.get_server_metadata().name == "from-flag"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--no-such-flag"], "--no-such-flag"),
        (["--grpc-port", "70000"], "70000"),
        (["--capacity", "much"], "2GiB"),
        (["--models", "/no/such/folder"], "/no/such/folder"),
        (["--log-level", "loud"], "loud"),
        (["--grace", "soon"], "90s"),
        (["--config", "/no/such/file"], "/no/such/file"),
    ],
)
def test_a_wrong_call_ends_with_two_and_says_what_is_wrong(args: list[str], words: str) -> None:
    ended = run("serve", *args)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


def test_an_unknown_option_in_the_file_is_a_wrong_call(tmp_path: Path) -> None:
    file = tmp_path / "mmcore.yaml"
    file.write_text("grpc-prot: 1\n")
    ended = run("serve", "--config", file)
    assert ended.returncode == 2
    assert "grpc-prot" in ended.stderr
    assert "grpc-port" in ended.stderr


def test_a_taken_port_is_a_failure_in_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ended = run("serve", "--grpc-port", taken.getsockname()[1])
    assert ended.returncode == 1
    lines = [line for line in ended.stderr.splitlines() if line.startswith("mmcore: ")]
    assert len(lines) == 1
    assert "--grpc-port" in lines[0]
    assert "Traceback" not in ended.stderr


def test_preloaded_models_are_loaded_when_it_is_ready(serve: Serve, models: Path) -> None:
    for name in ("a", "b"):
        write_model(models, name, SCALE.replace("FACTOR", "2"))
    write_model(models, "broken", "import")
    some = serve(models, "--preload", "a")
    assert states(some)["a"][0] == "READY"
    assert states(some)["b"][0] != "READY"
    every = serve(models, "--preload", "all")
    assert {name: state for name, (state, _) in states(every).items()} == {
        "a": "READY",
        "b": "READY",
        "broken": "UNAVAILABLE",
    }
    assert "broken" in every.log_text()


def test_health_and_reflection_are_served(serve: Serve) -> None:
    instance = serve()
    with grpc.insecure_channel(instance.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "inference.GRPCInferenceService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        database = ProtoReflectionDescriptorDatabase(channel)
        assert "inference.GRPCInferenceService" in database.get_services()
        found = database.FindFileContainingSymbol("inference.GRPCInferenceService")
        assert "ModelInfer" in [method.name for method in found.service[0].method]


# Following the folder


def test_models_are_added_changed_and_removed_while_it_runs(serve: Serve, models: Path) -> None:
    write_model(models, "first", SCALE.replace("FACTOR", "2"))
    instance = serve(models)
    assert scale(instance, "first") == 2.0

    write_model(models, "second", SCALE.replace("FACTOR", "3"))
    wait_until(lambda: "second" in states(instance), "the new model is in the index")
    assert scale(instance, "second") == 3.0

    (models / "first/model.py").write_text(SCALE.replace("FACTOR", "20"))
    wait_until(lambda: scale(instance, "first") == 20.0, "the changed model answers")

    shutil.rmtree(models / "second")
    wait_until(lambda: "second" not in states(instance), "the removed model is gone")
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'second' is not found"):
        scale(instance, "second")
    assert scale(instance, "first") == 20.0


def test_a_half_copied_model_is_not_taken(serve: Serve, models: Path) -> None:
    instance = serve(models)
    folder = models / "growing"
    folder.mkdir()
    text = SCALE.replace("FACTOR", "7")
    with (folder / "model.py").open("w") as file:
        # Longer than the watcher's patience, in pieces that are each no model.
        for part in [text[at : at + 40] for at in range(0, len(text), 40)]:
            file.write(part)
            file.flush()
            time.sleep(0.15)
            state = states(instance).get("growing")
            assert state is None or state[0] != "READY"
    wait_until(lambda: "growing" in states(instance), "the whole model is taken")
    assert scale(instance, "growing") == 7.0


def test_a_corrupt_model_fails_alone_and_is_retried_when_mended(serve: Serve, models: Path) -> None:
    write_model(models, "good", SCALE.replace("FACTOR", "2"))
    write_model(models, "bad", "class Model: oops\n")
    instance = serve(models)
    for _ in range(2):
        with pytest.raises(InferenceServerException) as error:
            scale(instance, "bad")
        assert error.value.status() == "StatusCode.FAILED_PRECONDITION"
        assert "oops" in error.value.message() or "NameError" in error.value.message()
        assert "Traceback" not in error.value.message()
    assert scale(instance, "good") == 2.0
    state, reason = states(instance)["bad"]
    assert state == "UNAVAILABLE"
    assert "NameError" in reason or "oops" in reason
    (models / "bad/model.py").write_text(SCALE.replace("FACTOR", "5"))

    def mended() -> bool:
        try:
            return scale(instance, "bad") == 5.0
        except InferenceServerException:
            return False

    wait_until(mended, "the mended model answers")


def test_versions_are_served_side_by_side(serve: Serve, models: Path) -> None:
    folder = write_model(models, "scale", SCALE.replace("FACTOR", "2"), version="1")
    (folder / "3").mkdir()
    (folder / "3/model.py").write_text(SCALE.replace("FACTOR", "3"))
    (folder / "mmcore.yaml").write_text("")
    (folder / "config.pbtxt").write_text("version_policy { all {} }")
    instance = serve(models)
    assert scale(instance) == 3.0
    with triton.InferenceServerClient(instance.grpc) as client:
        assert list(client.get_model_metadata("scale").versions) == ["1", "3"]
        x = triton.InferInput("X", [1], "FP32")
        x.set_data_from_numpy(np.ones(1, np.float32))
        result = client.infer("scale", [x], model_version="1")
        assert result.get_response().model_version == "1"
        answer = result.as_numpy("Y")
        assert answer is not None
        assert answer[0] == 2.0


# Capacity and loading


def test_the_least_recently_used_model_leaves_when_the_capacity_is_reached(serve: Serve, models: Path) -> None:
    for name in ("a", "b", "c"):
        write_model(models, name, SCALE.replace("FACTOR", "2"), settings="size_bytes: 40MB\n")
    instance = serve(models, "--capacity", "100MB")
    scale(instance, "a")
    scale(instance, "b")
    used_until = time.monotonic() + 0.2  # well beyond the moment for which a new copy is spared
    while time.monotonic() < used_until:
        scale(instance, "a")
    scale(instance, "c")
    ready = {name for name, (state, _) in states(instance).items() if state == "READY"}
    assert ready == {"a", "c"}
    assert scale(instance, "b") == 2.0
    write_model(models, "huge", SCALE.replace("FACTOR", "2"), settings="size_bytes: 101MB\n")
    wait_until(lambda: "huge" in states(instance), "the large model is registered")
    with pytest.raises(InferenceServerException) as error:
        scale(instance, "huge")
    assert error.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
    assert "huge" in error.value.message()


def test_a_deadline_holds_while_the_model_is_loading(serve: Serve, models: Path, tmp_path: Path) -> None:
    release = tmp_path / "release"
    write_model(models, "slow", SLOW_LOAD, settings=f"parameters: {{release: {release}}}\n")
    instance = serve(models)
    patient = in_thread(lambda: scale(instance, "slow", timeout_s=None))
    started = time.monotonic()
    with pytest.raises(InferenceServerException) as error:
        scale(instance, "slow", timeout_s=0.4)
    assert error.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    assert 0.3 < time.monotonic() - started < 3
    release.touch()
    # One caller giving up does not end the load that another waits for.
    assert patient.result(WITHIN_S) == 1.0


def test_many_callers_of_an_unloaded_model_share_one_load(serve: Serve, models: Path, tmp_path: Path) -> None:
    source = SCALE.replace("FACTOR", "2") + f"\nopen({str(tmp_path / 'loads')!r}, 'a').write('x')\n"
    write_model(models, "scale", source)
    instance = serve(models)
    callers = [in_thread(lambda: scale(instance)) for _ in range(20)]
    assert [caller.result(WITHIN_S) for caller in callers] == [2.0] * 20
    assert (tmp_path / "loads").read_text() == "x"


def test_a_message_above_the_limit_is_refused_and_the_next_one_answered(serve: Serve, models: Path) -> None:
    write_model(models, "scale", SCALE.replace("FACTOR", "2"))
    instance = serve(models, "--max-message", "1MiB")
    with triton.InferenceServerClient(instance.grpc) as client:
        large = triton.InferInput("X", [300_000], "FP32")
        large.set_data_from_numpy(np.zeros(300_000, np.float32))
        with pytest.raises(InferenceServerException) as error:
            client.infer("scale", [large])
        assert error.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
    assert scale(instance) == 2.0


def test_metadata_may_name_the_model(serve: Serve, models: Path) -> None:
    write_model(models, "scale", SCALE.replace("FACTOR", "2"))
    instance = serve(models)
    with triton.InferenceServerClient(instance.grpc) as client:
        x = triton.InferInput("X", [1], "FP32")
        x.set_data_from_numpy(np.ones(1, np.float32))
        assert client.infer("", [x], headers={"mm-model-id": "scale"}).get_response().model_name == "scale"
        with pytest.raises(InferenceServerException, match="must include mm-model-id header"):
            client.infer("", [x])


# Ending


def test_a_drain_finishes_what_is_under_way_and_takes_nothing_new(serve: Serve, models: Path, tmp_path: Path) -> None:
    write_model(models, "waiting", WAITING, settings="execution: thread\n")
    instance = serve(models)
    under_way = ask_waiting(instance, tmp_path / "release")
    instance.signal(signal.SIGTERM)

    def refused() -> bool:
        host, port = instance.grpc.split(":")
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            return True
        return False

    wait_until(refused, "no new connection is taken")
    assert instance.process.poll() is None
    (tmp_path / "release").touch()
    assert under_way.result(WITHIN_S) == [True]
    assert instance.wait() == 0


def test_idle_streams_do_not_hold_up_a_drain(serve: Serve, models: Path) -> None:
    write_model(models, "scale", SCALE.replace("FACTOR", "2"))
    instance = serve(models)
    answers: queue.Queue[Any] = queue.Queue()
    with grpc.insecure_channel(instance.grpc) as channel, triton.InferenceServerClient(instance.grpc) as client:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        client.start_stream(lambda result, error: answers.put(error))
        x = triton.InferInput("X", [1], "FP32")
        x.set_data_from_numpy(np.ones(1, np.float32))
        client.async_stream_infer("scale", [x])
        assert answers.get(timeout=WITHIN_S) is None
        instance.signal()
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as ended:
            next(watch)
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in str(answers.get(timeout=WITHIN_S))
        assert instance.wait() == 0


def test_a_signal_while_models_are_preloaded_ends_it_too(models: Path, tmp_path: Path) -> None:
    began = tmp_path / "began"
    source = f"open({str(began)!r}, 'w').close()\n" + SLOW_LOAD
    write_model(models, "slow", source, settings=f"parameters: {{release: {tmp_path / 'release'}}}\n")
    flags = ("serve", "--models", models, "--grpc-port", 0, "--preload", "all", "--grace", "1s")
    with subprocess.Popen(command(*flags), stdout=subprocess.PIPE, text=True, env=environment()) as process:
        wait_until(began.exists, "the load begins")
        process.send_signal(signal.SIGTERM)
        assert process.wait(WITHIN_S) == 0
        assert process.stdout is not None
        assert process.stdout.read() == ""


def test_grace_ends_a_drain(serve: Serve, models: Path, tmp_path: Path) -> None:
    write_model(models, "waiting", WAITING, settings="execution: thread\n")
    instance = serve(models, "--grace", "300ms")
    under_way = ask_waiting(instance, tmp_path / "release")
    instance.signal(signal.SIGTERM)
    with pytest.raises(InferenceServerException, match=r"UNAVAILABLE|CANCELLED"):
        under_way.result(WITHIN_S)
    assert instance.wait() == 0


def test_a_second_signal_ends_at_once(serve: Serve, models: Path, tmp_path: Path) -> None:
    write_model(models, "waiting", WAITING, settings="execution: thread\n")
    instance = serve(models)
    under_way = ask_waiting(instance, tmp_path / "release")
    instance.signal(signal.SIGINT)
    wait_until(lambda: "draining" in instance.log_text(), "the drain begins")
    instance.signal(signal.SIGINT)
    assert instance.wait() == 1
    with pytest.raises(InferenceServerException):
        under_way.result(WITHIN_S)


def test_ending_leaves_no_socket_behind(serve: Serve, tmp_path: Path) -> None:
    instance = serve(None, "--uds", tmp_path / "socket")
    instance.signal()
    assert instance.wait() == 0
    assert not (tmp_path / "socket").exists()
    # What a killed instance left is no obstacle to the next.
    again = serve(None, "--uds", tmp_path / "socket")
    again.process.kill()
    again.wait()
    serve(None, "--uds", tmp_path / "socket")


# The commands that ask an instance


def test_models_lists_and_infer_asks(serve: Serve, models: Path) -> None:
    write_model(models, "simple", ADD_SUB)
    instance = serve(models)
    listed = run("models", "--target", instance.grpc, "--json")
    assert listed.returncode == 0
    assert [(row["name"], row["version"]) for row in json.loads(listed.stdout)] == [("simple", "1")]
    assert "simple" in run("models", MMCORE_TARGET=instance.grpc).stdout

    row = json.dumps([list(range(16))])
    asked = run(
        "infer", "simple", "--target", instance.grpc, "--input", f"INPUT0={row}", "--input", f"INPUT1:INT32={row}"
    )
    assert asked.returncode == 0, asked.stderr
    answer = json.loads(asked.stdout)
    assert answer["outputs"][0] == {
        "name": "OUTPUT0",
        "datatype": "INT32",
        "shape": [1, 16],
        "data": list(range(0, 32, 2)),
    }


def test_commands_fail_in_one_line_that_says_what_to_do(serve: Serve) -> None:
    instance = serve()
    unknown = run("infer", "nope", "--target", instance.grpc, "--input", "[1]")
    assert unknown.returncode == 1
    assert unknown.stderr.strip() == "mmcore: Request for unknown model: 'nope' is not found (NOT_FOUND)"
    nobody = run("models", "--target", "127.0.0.1:1", "--timeout", "2s")
    assert nobody.returncode == 1
    assert "mmcore serve" in nobody.stderr
    assert "Traceback" not in nobody.stderr
    assert run("models", "--wrong").returncode == 2
    assert run("--version").stdout.startswith("mmcore")
