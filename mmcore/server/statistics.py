"""ModelStatistics: the counters of loaded copies as the message of Triton's statistics extension."""

from __future__ import annotations

import asyncio
from typing import Final

from mmcore._ext.rates import Duration
from mmcore.errors import NotFound
from mmcore.pb import inference_pb2
from mmcore.routing import Copy, Router

_PARTS: Final = (
    "success",
    "fail",
    "queue",
    "compute_input",
    "compute_infer",
    "compute_output",
    "cache_hit",
    "cache_miss",
)


#: Copies told of between two turns of the loop.
_AT_ONCE: Final = 200


async def statistics_of(router: Router, name: str, version: str) -> inference_pb2.ModelStatisticsResponse:
    """The counters of every loaded version of ``name``, or of the one asked for; of all models without a name.

    Others have their turns while it tells of many.

    A registered version that is not loaded has zeros: what it counted went with its copy.

    Raises:
        NotFound: no such model or version.
    """
    response = inference_pb2.ModelStatisticsResponse()
    if not name:
        for number, copy in enumerate(router.copies(), 1):
            response.model_stats.append(_of_copy(copy))
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)
        return response
    known = router.versions(name)
    if not known or (version and version not in known):
        asked = f"'{name}' version {version}" if version else f"'{name}'"
        raise NotFound(f"Request for unknown model: {asked} is not found")
    loaded = {copy.version: copy for copy in router.copies(name)}
    # Without a version the loaded ones answer; where there is none, the one that a request would load.
    wanted = [version] if version else list(loaded) or [known[-1]]
    for one in wanted:
        if one in loaded:
            response.model_stats.append(_of_copy(loaded[one]))
        else:
            response.model_stats.add(name=name, version=one).inference_stats.SetInParent()
    return response


def _of_copy(copy: Copy) -> inference_pb2.ModelStatistics:
    counted = copy.statistics.snapshot()
    message = inference_pb2.ModelStatistics(
        name=copy.name,
        version=copy.version,
        last_inference=counted.last_inference_ms,
        inference_count=counted.inference_count,
        execution_count=counted.execution_count,
    )
    for part in _PARTS:
        _fill(getattr(message.inference_stats, part), getattr(counted, part))
    for batch in counted.batches:
        row = message.batch_stats.add(batch_size=batch.batch_size)
        _fill(row.compute_input, batch.compute_input)
        _fill(row.compute_infer, batch.compute_infer)
        _fill(row.compute_output, batch.compute_output)
    message.memory_usage.add(type="CPU", id=0, byte_size=copy.model.size_bytes)
    return message


def _fill(message: inference_pb2.StatisticDuration, counted: Duration) -> None:
    message.count, message.ns = counted
    message.SetInParent()
