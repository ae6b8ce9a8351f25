"""Asks models that are not loaded, one after the other at a steady pace; answers with the seconds each took.

Its arguments are a target and a file of requests in hexadecimal, a line each. It begins at once.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from pathlib import Path
from typing import Final

from bench.peers.paths import MODEL_INFER
from mmcore.transport import Channel

#: Two hundred a minute.
PACE_S: Final = 0.3


async def _ask(target: str, requests: list[bytes], took: list[float]) -> None:
    channel = Channel(target)
    due = time.perf_counter()
    for request in requests:
        began = time.perf_counter()
        await channel.unary(MODEL_INFER, request, timeout_s=120)
        took.append(time.perf_counter() - began)
        due += PACE_S
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
    await channel.close()


def main() -> None:
    """Ask in a thread, and answer on standard output when the line comes and all were asked."""
    target, file = sys.argv[1:]
    requests = [bytes.fromhex(line) for line in Path(file).read_text().split()]
    took: list[float] = []
    thread = threading.Thread(target=lambda: asyncio.run(_ask(target, requests, took)))
    thread.start()
    print(json.dumps({"event": "ready"}), flush=True)
    sys.stdin.readline()
    thread.join()
    print(json.dumps(took), flush=True)


if __name__ == "__main__":
    main()
