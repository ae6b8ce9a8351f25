"""What can be done about a copy, here or at another instance; :class:`mmcore.routing.mesh.Mesh` does it."""

from __future__ import annotations

from enum import Enum
from typing import Protocol


class Haste(Enum):
    """Who a load is for; the values are the methods by which instances ask each other, with the model's name."""

    #: Somebody waits for it.
    NOW = "/mmcore.Peer/Load"
    #: Somebody asks for it expressly, though it has failed: what is remembered of that, but for a moment, is no answer.
    ANEW = "/mmcore.Peer/LoadAnew"
    #: The model is used, elsewhere or before long: after the loads that somebody waits for.
    AHEAD = "/mmcore.Peer/LoadAhead"
    #: It may be used again: as ``AHEAD``, into free room alone, so that nothing is evicted for it.
    IF_ROOM = "/mmcore.Peer/LoadIfRoom"


class Actions(Protocol):
    """Loads, drops and moves copies of registered models; each returns when it is done."""

    async def load_at(self, instance: str, model: str, haste: Haste = Haste.NOW) -> None:
        """Have an instance load a model.

        Raises:
            LoadFailed, Overloaded, NotFound: as it says.
            Unavailable: it cannot be reached, is leaving, or has no free room where that is asked for.
        """

    async def drop_at(self, instance: str, model: str) -> None:
        """Have an instance give up its copy of a model.

        Raises:
            Unavailable: it cannot be reached.
        """

    async def move(self, model: str, source: str, target: str) -> None:
        """Have ``target`` load a model ahead and then ``source`` give up its copy; the errors are those of both."""
