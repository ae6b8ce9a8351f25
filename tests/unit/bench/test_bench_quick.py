"""One tiny case of the transport suite from end to end: processes, generator, verification, rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_the_transport_suite_writes_rows_of_ours_beside_a_peer(tmp_path: Path) -> None:
    argv = [
        sys.executable,
        "-m",
        "bench",
        "transport",
        "--quick",
        "--rounds",
        "1",
        "--case",
        "small",
        "--case",
        "steady",
    ]
    done = subprocess.run(
        [*argv, "--peer", "grpc-sync", "--out", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "COLUMNS": "160"}, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "grpc-sync" in done.stdout
    rows = json.loads((tmp_path / "transport.json").read_text())
    assert {(row["case"], row["metric"]) for row in rows} == {
        ("small", "throughput"), ("small", "p99"), ("small", "cpu"), ("small", "capacity"),
        ("steady", "p50"), ("steady", "p99"), ("steady", "cpu"),
    }  # fmt: skip
    for row in rows:
        assert row["peer"] == "grpc-sync"
        assert row["ours"] > 0
        assert row["peer_value"] > 0
        assert row["ratio"] > 0
        assert isinstance(row["unit"], str)


@pytest.mark.slow
def test_the_forward_suite_writes_rows_beside_a_proxy_of_grpc_aio(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "bench", "forward", "--quick", "--rounds", "1", "--case", "small"]
    done = subprocess.run(
        [*argv, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "forward.json").read_text())
    assert {row["metric"] for row in rows} == {"throughput", "p50", "p99", "cpu", "capacity"}
    assert {(row["case"], row["peer"]) for row in rows} == {("small", "grpc-aio-proxy")}
    assert all(row["ratio"] > 0 for row in rows)


@pytest.mark.slow
def test_the_passthrough_suite_writes_rows_beside_proxies_and_the_runtime_itself(tmp_path: Path) -> None:
    argv = [
        sys.executable,
        "-m",
        "bench",
        "passthrough",
        "--quick",
        "--rounds",
        "1",
        "--case",
        "small",
        "--case",
        "large",
    ]
    done = subprocess.run(
        [*argv, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "passthrough.json").read_text())
    assert {row["metric"] for row in rows} == {"throughput", "p50", "p99", "cpu", "capacity"}
    assert {(row["case"], row["peer"]) for row in rows} == {
        ("small", "grpc-aio-proxy"), ("small", "direct"),
        ("large", "grpc-aio-proxy"), ("large", "relay"), ("large", "direct"),
    }  # fmt: skip
    assert all(row["ratio"] > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(300)  # its environment may have to be installed
def test_the_passthrough_suite_asks_a_real_server_through_an_instance_and_directly(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "bench", "passthrough", "--quick", "--rounds", "1", "--case", "mlserver"]
    done = subprocess.run(
        [*argv, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "passthrough.json").read_text())
    assert {(row["case"], row["peer"], row["metric"]) for row in rows} == {
        ("mlserver", "direct", metric) for metric in ("throughput", "p50", "p99")
    }
    assert all(row["ratio"] > 0 for row in rows)


@pytest.mark.slow
def test_an_instance_without_models_is_measured_against_its_budget(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "bench", "idle", "--quick", "--rounds", "1", "--out", str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "idle.json").read_text())
    assert {(row["metric"], row["peer"]) for row in rows} >= {("rss", "budget"), ("ready", "budget")}
    assert all(row["ours"] > 0 for row in rows)


@pytest.mark.slow
def test_a_pull_is_measured_beside_a_bare_download(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "bench", "pull", "--quick", "--rounds", "1", "--case", "large", "--peer", "urllib3"]
    done = subprocess.run(
        [*argv, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [row] = json.loads((tmp_path / "pull.json").read_text())
    assert (row["case"], row["metric"], row["peer"], row["unit"]) == ("large", "bandwidth", "urllib3", "MB/s")
    assert row["ours"] > 0
    assert row["ratio"] > 0


def test_an_unknown_suite_is_a_usage_error() -> None:
    argv = [sys.executable, "-m", "bench", "transports"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "known are transport, v2" in done.stderr


@pytest.mark.slow
async def test_raw_c_echoes_for_other_people_s_clients(tmp_path: Path) -> None:
    import grpc

    from bench import builds
    from bench.peers.paths import MODEL_INFER, SERVICE
    from bench.processes import Process

    with Process("raw-c", [str(builds.raw_c())], core=min(os.sched_getaffinity(0))) as server:
        async with grpc.aio.insecure_channel(server.target) as channel:
            infer = channel.unary_unary(MODEL_INFER)
            for size in (0, 1, 507, 508, 4096, 5000, 70_000, 602_150):
                message = os.urandom(size)
                assert await infer(message, timeout=20) == message
            unknown = channel.unary_unary(f"/{SERVICE}/Nothing")
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await unknown(b"", timeout=20)
            assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
