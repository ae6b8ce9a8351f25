"""``instance_group`` and ``instances`` in a running instance: how many inferences of one model run at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton

from tests.serving import Serve, write_model

pytestmark = pytest.mark.slow

#: Answers how many inferences were at work at once while it was, its own included, and who answered.
COUNTING = """
import os, threading, time

class Model:
    inputs = [("X", "FP32", [-1, 1])]
    outputs = [("MOST", "INT64", [-1, 1]), ("PID", "INT64", [-1, 1])]

    def __init__(self):
        self.lock = threading.Lock()
        self.running = 0

    def predict(self, inputs):
        with self.lock:
            self.running += 1
        most = 0
        until = time.monotonic() + 0.03
        while time.monotonic() < until:
            most = max(most, self.running)
            time.sleep(0.001)
        with self.lock:
            self.running -= 1
        return {"MOST": [[most]], "PID": [[os.getpid()]]}
"""


def ask_many(client: triton.InferenceServerClient, name: str) -> tuple[set[int], set[int]]:
    """How many ran at once, as the answers to many requests say, and which processes answered."""
    given = triton.InferInput("X", [1, 1], "FP32")
    given.set_data_from_numpy(np.ones((1, 1), np.float32))
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda _: client.infer(name, [given]), range(32)))
    return tuple({int(answer.as_numpy(output)[0, 0]) for answer in answers} for output in ("MOST", "PID"))  # type: ignore[return-value]  # two of them


def test_so_many_inferences_run_at_once(serve: Serve, tmp_path: Path) -> None:
    for count in (1, 7):
        folder = write_model(tmp_path, f"triton-{count}", COUNTING)
        (folder / "config.pbtxt").write_text(f"instance_group [ {{ count: {count} kind: KIND_CPU }} ]")
    write_model(tmp_path, "processes", COUNTING, settings="instances: 3\nisolation: process\n")
    instance = serve(tmp_path)
    with triton.InferenceServerClient(instance.grpc) as client:
        most, pids = ask_many(client, "triton-1")
        assert (most, pids) == ({1}, {instance.process.pid})
        most, pids = ask_many(client, "triton-7")
        assert max(most) == 7
        most, pids = ask_many(client, "processes")
        assert most == {1}
        workers = psutil.Process(instance.process.pid).children()
        assert pids == {worker.pid for worker in workers}
        assert len(pids) == 3
        (group,) = client.get_model_config("triton-7").config.instance_group
        assert (group.name, group.count, group.kind) == ("triton-7_0", 7, 2)
        client.unload_model("processes")
        gone, alive = psutil.wait_procs(workers, timeout=10)
        assert (len(gone), alive) == (3, [])
