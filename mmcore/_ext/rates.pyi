from typing import NamedTuple, final

class Duration(NamedTuple):
    count: int  # type: ignore[assignment]  # hides the tuple's method, which nobody calls on it
    ns: int

class BatchStatistics(NamedTuple):
    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration

class Statistics(NamedTuple):
    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    cache_hit: Duration
    cache_miss: Duration
    inference_count: int
    execution_count: int
    last_inference_ms: int
    batches: tuple[BatchStatistics, ...]

class TimeHistogram(NamedTuple):
    counts: list[int]
    sum_ns: int

class Totals(NamedTuple):
    failed: int
    rows: int
    hits: int
    misses: int
    total: TimeHistogram
    queue: TimeHistogram
    infer: TimeHistogram
    batch_counts: list[int]
    executed_rows: int

TIME_BOUNDS_NS: tuple[int, ...]
BATCH_BOUNDS: tuple[int, ...]

def now_ns() -> int: ...
def totals() -> Totals: ...

@final
class ModelStatistics:
    def record(self, batch: int, queue_ns: int, input_ns: int, infer_ns: int, output_ns: int) -> None: ...
    def record_part(
        self, batch: int, rows: int, leads: bool, queue_ns: int, input_ns: int, infer_ns: int, output_ns: int
    ) -> None: ...
    def hit(self, total_ns: int) -> None: ...
    def miss(self, total_ns: int) -> None: ...
    def fail(self, total_ns: int) -> None: ...
    def times_by_bound(self) -> list[int]: ...
    def snapshot(self) -> Statistics: ...
