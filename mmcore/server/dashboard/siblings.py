"""The other workers of one command: a client cannot tell which of them it asks, so each tells of all.

They are asked over the socket that they pass requests on by, with a question and answers in JSON.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import orjson

from mmcore.errors import RpcError
from mmcore.routing.peers import Peer
from mmcore.server.peer import DASHBOARD_PATH

#: A page waits for it: whoever takes longer is left out, and named.
_WITHIN_S: Final = 2.0


class Heard(NamedTuple):
    """What the others answered, by their ids, and who did not."""

    answers: dict[str, Any]
    missing: list[str]


ALONE: Final = Heard({}, [])


class Siblings:
    """Those of ``peers()`` whose addresses begin with ``prefix``."""

    def __init__(self, peers: Callable[[], Mapping[str, Peer]], prefix: str) -> None:
        self._peers = peers
        self._prefix = prefix

    async def ask(self, what: str, **more: Any) -> Heard:
        """Ask all of them, at once."""
        asked = {name: peer for name, peer in self._peers().items() if peer.address.startswith(self._prefix)}
        question = orjson.dumps({"what": what, **more})
        calls = [peer.unary(DASHBOARD_PATH, question, timeout_s=_WITHIN_S) for peer in asked.values()]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        heard = Heard({}, [])
        for name, answer in zip(asked, answers, strict=True):
            if isinstance(answer, bytes):
                heard.answers[name] = orjson.loads(answer)
            elif isinstance(answer, RpcError):
                heard.missing.append(name)
            else:
                raise answer
        return heard
