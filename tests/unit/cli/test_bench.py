from __future__ import annotations

import asyncio
import time

import click
import pytest

from mmcore.cli.bench import Run, closed, opened, zeros
from mmcore.cli.inputs import Wanted
from mmcore.errors import RpcError, Status


class Server:
    """Answers after a while, one request at a time, each ``failing``-th with an error."""

    def __init__(self, takes_s: float, failing: int = 0) -> None:
        self.takes_s, self.failing, self.asked = takes_s, failing, 0
        self.free = asyncio.Lock()

    async def __call__(self) -> bytes:
        self.asked += 1
        number = self.asked
        async with self.free:
            await asyncio.sleep(self.takes_s)
        if self.failing and number % self.failing == 0:
            raise RpcError(Status.INTERNAL, "broken")
        return b""


async def test_callers_of_a_closed_loop_wait_for_their_answers() -> None:
    run, server = Run(), Server(0.01)
    await closed(server, run, 4, 0.3)
    result = run.result()
    assert result["answered"] == server.asked == len(run.times_s)
    # Four callers of one server each wait for all four.
    assert 20 < result["p50_ms"] < 400
    assert result["p50_ms"] <= result["p99_ms"] <= result["max_ms"]
    assert result["requests_per_s"] == pytest.approx(server.asked / run.took_s, rel=0.01)


async def test_times_of_an_open_loop_begin_when_a_request_was_due() -> None:
    run, server = Run(), Server(0.02)
    await opened(server, run, 200, 0.5)
    assert server.asked == len(run.times_s) == 100
    # Each answer takes 20 ms and one is due every 5: the last has waited for all the others.
    assert max(run.times_s) > 1.0


async def test_failures_are_counted_by_status() -> None:
    run = Run()
    began = time.perf_counter()
    await closed(Server(0, failing=2), run, 2, 0.1)
    assert time.perf_counter() - began < 10
    assert run.failures["INTERNAL"] > 0 < len(run.times_s)
    assert "broken" in run.example


def test_zeros_have_the_models_shapes() -> None:
    made = zeros({"a": Wanted("FP32", (-1, 4)), "b": Wanted("BYTES", (-1, -1))}, 3)
    assert [(name, datatype, array.shape) for name, datatype, array in made] == [
        ("a", "FP32", (3, 4)),
        ("b", "BYTES", (3, 1)),
    ]
    assert made[1][2].tolist() == [[b"0"]] * 3
    with pytest.raises(click.UsageError, match="--input"):
        zeros({}, 1)
