"""An instance that gets no more memory, and whose payloads go to a full disk: one call fails, and it serves on."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from tests.management import SCALE
from tests.serving import Serve, write_model

pytestmark = pytest.mark.slow

SPARE_BYTES, MESSAGE_BYTES = 40_000_000, 100_000_000


def asked(client: triton.InferenceServerClient, size: int) -> float:
    given = triton.InferInput("X", [size], "FP32")
    given.set_data_from_numpy(np.ones(size, np.float32))
    found = client.infer("scale", [given], client_timeout=30).as_numpy("Y")
    assert found is not None and found.shape == (size,)
    return float(found[-1])


def test_a_message_that_there_is_no_memory_for_fails_alone(serve: Serve, tmp_path: Path) -> None:
    models = tmp_path / "models"
    write_model(models, "scale", SCALE.replace("FACTOR", "3"))
    instance = serve(models, "--preload", "all", "--max-message", "256MiB", "--payload-log", "/dev/full")
    pid = instance.process.pid
    _, most = resource.prlimit(pid, resource.RLIMIT_AS)
    taken = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    # One connection for all: it goes on.
    with triton.InferenceServerClient(instance.grpc) as client:
        assert asked(client, 1) == 3
        resource.prlimit(pid, resource.RLIMIT_AS, (taken + SPARE_BYTES, most))
        with pytest.raises(InferenceServerException, match="there is no memory for a message of") as refused:
            asked(client, MESSAGE_BYTES // 4)
        assert refused.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
        assert asked(client, 1) == 3
        resource.prlimit(pid, resource.RLIMIT_AS, (most, most))
        assert asked(client, MESSAGE_BYTES // 4) == 3
    log = instance.log_text()
    assert log.count("payloads cannot be written to /dev/full") == 1
    assert "Traceback" not in log
