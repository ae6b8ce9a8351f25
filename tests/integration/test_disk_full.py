"""The disk for pulled files is full: the load fails with that cause, nothing half is kept, and others are served."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from mmcore.pb import model_mesh_pb2 as pb
from tests.management import SCALE, Manager
from tests.serving import Instance, Serve
from tests.stores import Bucket, moto

pytestmark = pytest.mark.slow

#: No file can be longer while the disk is "full"; the log is shorter, the weights are longer.
ROOM_BYTES = 200_000
WEIGHTS = os.urandom(2 * ROOM_BYTES)


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    with moto() as address:
        made = Bucket(address)
        made.client.create_bucket(Bucket=made.entry["bucket"])
        yield made


def ask(instance: Instance, name: str) -> float:
    given = triton.InferInput("X", [1], "FP32")
    given.set_data_from_numpy(np.ones(1, np.float32))
    with triton.InferenceServerClient(instance.grpc) as client:
        return float(client.infer(name, [given]).as_numpy("Y")[0])


def kept(folder: Path) -> int:
    """Bytes in files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_a_full_disk_fails_the_load_and_nothing_else(serve: Serve, tmp_path: Path, bucket: Bucket) -> None:
    for name in ("small", "large"):
        bucket.put(f"{name}/model.py", SCALE.replace("FACTOR", "7").encode())
    bucket.put("large/weights", WEIGHTS)
    entries = tmp_path / "storage-config"
    entries.mkdir()
    (entries / "store").write_text(json.dumps(bucket.entry))
    pulled = tmp_path / "pulled"
    instance = serve(None, "--storage-config", entries, "--model-cache", pulled)
    pid = instance.process.pid
    _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    key = json.dumps({"storage_key": "store", "model_type": {"name": "python"}})
    with Manager(instance.grpc) as manager, triton.InferenceServerClient(instance.grpc) as client:
        for name in ("small", "large"):
            manager.register(name, pb.ModelInfo(type="mt:python", path=name, key=key))
        assert ask(instance, "small") == 7.0
        before = kept(pulled)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (ROOM_BYTES, most))
        with pytest.raises(InferenceServerException, match="the disk is full") as refused:
            ask(instance, "large")
        assert refused.value.status() == "StatusCode.FAILED_PRECONDITION"
        assert "the disk is full" in manager.status("large").errors[0]
        assert kept(pulled) - before < ROOM_BYTES
        assert ask(instance, "small") == 7.0
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, most))
        client.load_model("large")
    assert ask(instance, "large") == 7.0
    assert "Traceback" not in instance.log_text()
