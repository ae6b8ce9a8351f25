"""What the generator is asked to do and what it answers: one JSON line each way."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass, field
from typing import Literal

from bench.load.schedule import Arrivals


@dataclass(frozen=True, slots=True)
class Job:
    """One measured window against one server: the same request again and again, or those of a ``mix``.

    ``closed``: every one of connections × streams callers sends its next request when the last is answered.
    ``open``: requests leave at ``rate_per_s`` whatever the answers do, and latency counts from the intended time.
    """

    target: str
    path: str
    #: Over HTTP, ``body`` is a whole request, its head included, and ``streams`` is 1.
    protocol: Literal["grpc", "http"] = "grpc"
    body: bytes = b""
    expected: bytes = b""
    #: File of a :class:`bench.load.mix.Mix`, which takes the place of ``body`` and ``expected``.
    mix: str = ""
    mode: Literal["closed", "open"] = "closed"
    connections: int = 1
    streams: int = 1
    rate_per_s: float = 0.0
    arrivals: Arrivals = "poisson"
    warmup_s: float = 0.2
    duration_s: float = 1.0
    #: So many FP32 values at the end of ``expected`` may come rounded in another way.
    rounded_values: int = 0
    #: Processes whose CPU time is read at the window's two ends.
    server_pids: tuple[int, ...] = ()

    def to_json(self) -> str:
        """One line; the two bodies as base64."""
        fields = asdict(self)
        for name in ("body", "expected"):
            fields[name] = base64.b64encode(fields[name]).decode("ascii")
        return json.dumps(fields)

    @classmethod
    def from_json(cls, line: str) -> Job:
        """The inverse of ``to_json``; TypeError names a field that is missing or unknown."""
        fields = json.loads(line)
        for name in ("body", "expected"):
            fields[name] = base64.b64decode(fields[name])
        fields["server_pids"] = tuple(fields["server_pids"])
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one window gave. ``error`` tells the first wrong answer or failure; the figures then mean nothing."""

    requests: int = 0
    seconds: float = 0.0
    per_s: float = 0.0
    #: ``p50``, ``p90``, ``p99``, ``p999``, ``max`` in µs.
    latency_us: dict[str, float] = field(default_factory=dict)
    #: CPU time of the server's processes per request, in µs.
    server_cpu_us: float = 0.0
    #: Share of one core that the server and the generator took.
    server_busy: float = 0.0
    load_busy: float = 0.0
    #: What everything else on the machine took, as a share of one core: it disturbs the figures.
    others_busy: float = 0.0
    error: str = ""

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Outcome:
        """The inverse of ``to_json``."""
        return cls(**json.loads(line))
