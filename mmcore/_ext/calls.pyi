"""Counts of calls by method and outcome: how many, how long from arrival to answer, and how large."""

from typing import NamedTuple, final

TIME_BOUNDS_S: tuple[float, ...]
SIZE_BOUNDS_BYTES: tuple[int, ...]

class CallCounts(NamedTuple):
    status: int
    times: list[int]
    time_s: float
    requests: list[int]
    request_bytes: int
    responses: list[int]
    response_bytes: int

@final
class CallCounters:
    def count(self, status: int, seconds: float, request_bytes: int, response_bytes: int) -> None: ...
    def snapshot(self) -> list[CallCounts]: ...
