"""``mmcore bench``: how many requests a running model answers, and how long each takes.

Closed loop, ``--concurrency`` callers that each ask again when they are answered; or open loop, ``--rate`` requests a
second, whose times begin when they were due: one that had to wait for its turn has waited (no coordinated omission).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final

import click
import numpy as np
from numpy.typing import NDArray

from mmcore._ext.v2codec import encode_infer_request
from mmcore.cli.completion import model_names
from mmcore.cli.connection import Connection, ask, connection_options
from mmcore.cli.inputs import Known, Tensor, known_inputs, read_input
from mmcore.cli.parameters import DURATION
from mmcore.cli.tables import print_json, print_table
from mmcore.errors import RpcError
from mmcore.model import NUMPY_DTYPES

_PERCENTILES: Final = (50, 90, 99, 99.9)
#: Requests of an open loop that may be under way; beyond, the instance is too slow for the rate and that is told.
_UNDER_WAY: Final = 10_000


Send = Callable[[], Awaitable[bytes]]


class Run:
    """What came of one run."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self.failures: Counter[str] = Counter()
        self.example = ""
        self.late = 0
        self.took_s = 0.0

    def result(self) -> dict[str, Any]:
        """As JSON has it; times in milliseconds."""
        ordered = np.sort(np.array(self.times_s)) * 1000
        times = {f"p{one:g}_ms": round(float(np.percentile(ordered, one)), 3) for one in _PERCENTILES if len(ordered)}
        if len(ordered):
            times |= {"mean_ms": round(float(ordered.mean()), 3), "max_ms": round(float(ordered[-1]), 3)}
        return {
            "seconds": round(self.took_s, 3),
            "answered": len(ordered),
            "requests_per_s": round(len(ordered) / self.took_s, 1) if self.took_s else 0.0,
            **times,
            "failures": dict(self.failures),
            "not_sent": self.late,
        }


@click.command("bench")
@click.argument("model", shell_complete=model_names)
@click.option(
    "-i", "--input", "inputs", multiple=True, metavar="[NAME[:DATATYPE]=]DATA",
    help="As for infer; without any, zeros of the model's own shapes.",
)  # fmt: skip
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Rows of inputs made of zeros.")
@click.option("--version", default="", help="Version of the model.")
@click.option("--concurrency", type=click.IntRange(1, 4096), default=16, show_default=True, help="Callers at once.")
@click.option("--connections", type=click.IntRange(1, 64), default=1, show_default=True, help="Connections they share.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Requests a second, in place of --concurrency.")
@click.option("--seconds", type=DURATION, default="5s", show_default=True, help="How long, after a warm-up of a fifth.")
@connection_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def command(
    model: str,
    inputs: tuple[str, ...],
    batch: int,
    version: str,
    concurrency: int,
    connections: int,
    rate: float | None,
    seconds: float,
    target: str,
    timeout: float,
    as_json: bool,
) -> int:
    """Ask MODEL of a running instance again and again; print requests a second and the times they took.

    The generator runs on one core: of small models it may be the limit. Exits with 1 if nothing was answered.

    \b
    mmcore bench iris --concurrency 64 --connections 4
    mmcore bench iris --rate 1000 --input @flowers.csv
    """

    async def measure(connection: Connection) -> Run:
        known = await known_inputs(connection, model, version)
        tensors = [read_input(text, known) for text in inputs] or zeros(known, batch)
        body = encode_infer_request(model, tensors, model_version=version)
        one = connection.sender("ModelInfer", body)
        for run_s in (seconds / 5, seconds):
            run = Run()
            await (closed(one, run, concurrency, run_s) if rate is None else opened(one, run, rate, run_s))
        return run

    run = ask(target, timeout, measure, connections=connections)
    result = run.result()
    if as_json:
        print_json(result)
    else:
        rows = [(name, f"{value:,}") for name, value in result.items() if name != "failures"]
        print_table(("", model), [*rows, *((f"failed: {name}", f"{count:,}") for name, count in run.failures.items())])
    if run.example:
        click.echo(f"a failure: {run.example}", err=True)
    return 0 if run.times_s else 1


def zeros(known: Known, batch: int) -> list[Tensor]:
    """A tensor of zeros, or of ``0`` as text, for each input: ``batch`` in a free first dimension, 1 in other ones.

    Raises:
        click.UsageError: the model does not say what its inputs are.
    """
    if not known or any(not wanted.shape and wanted.datatype not in NUMPY_DTYPES for wanted in known.values()):
        raise click.UsageError("the model does not tell its inputs; give --input NAME:DATATYPE=DATA")
    made: list[Tensor] = []
    for name, (datatype, stated) in known.items():
        shape = [batch if at == 0 and size < 0 else max(1, size) for at, size in enumerate(stated)]
        array: NDArray[Any] = np.zeros(shape, NUMPY_DTYPES[datatype])
        if datatype == "BYTES":
            array[...] = b"0"
        made.append((name, datatype, array))
    return made


async def closed(one: Send, run: Run, concurrency: int, for_s: float) -> None:
    """Callers that ask one after the other until the time is over."""
    began = time.perf_counter()
    ends = began + for_s

    async def caller() -> None:
        while (sent := time.perf_counter()) < ends:
            await _ask(one, run, sent)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(caller())
    run.took_s = time.perf_counter() - began


async def opened(one: Send, run: Run, rate: float, for_s: float) -> None:
    """Requests at their times, however long the ones before take."""
    began = time.perf_counter()
    under_way: set[asyncio.Task[None]] = set()
    for number in range(max(1, round(rate * for_s))):
        due = began + number / rate
        wait_s = due - time.perf_counter()
        # Also where it is late: the answers come in the turns of the loop.
        await asyncio.sleep(max(0.0, wait_s))
        if len(under_way) >= _UNDER_WAY:
            run.late += 1
            continue
        task = asyncio.create_task(_ask(one, run, due))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    if under_way:
        await asyncio.wait(under_way)
    run.took_s = time.perf_counter() - began


async def _ask(one: Send, run: Run, since: float) -> None:
    try:
        await one()
    except RpcError as error:
        run.failures[error.status.name] += 1
        run.example = f"{error.status.name}: {error.details}"
        # A server that refuses at once is not to be hammered by a loop that never waits.
        await asyncio.sleep(0.001)
    else:
        run.times_s.append(time.perf_counter() - since)
