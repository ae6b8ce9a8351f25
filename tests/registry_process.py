"""A process with a registry, for tests: ``python -m tests.registry_process URL INSTANCE [COUNT]``.

Publishes its record, adds a reference to the model ``counted`` COUNT times, prints a line, and waits to be ended.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace

from mmcore.registry import InstanceRecord, ModelRecord, open_registry


async def main() -> None:
    url, instance, count = sys.argv[1:]
    registry = open_registry(url, instance, lease_s=60)
    await registry.start()
    await registry.publish(InstanceRecord(f"address of {instance}"))

    def counted(record: ModelRecord | None) -> ModelRecord:
        before = record or ModelRecord("t")
        return replace(before, references=before.references + 1)

    for _ in range(int(count)):
        await registry.models.update("counted", counted)
    print("done", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
