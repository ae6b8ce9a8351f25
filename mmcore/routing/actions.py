"""What can be done about a copy, here or at another instance; :class:`mmcore.routing.mesh.Mesh` does it."""

from __future__ import annotations

from typing import Protocol


class Actions(Protocol):
    """Loads, drops and moves copies of registered models; each returns when it is done."""

    async def load_at(self, instance: str, model: str) -> None:
        """Have an instance load a model.

        Raises:
            LoadFailed, Overloaded, NotFound: as it says.
            Unavailable: it cannot be reached, or is leaving.
        """

    async def drop_at(self, instance: str, model: str) -> None:
        """Have an instance give up its copy of a model.

        Raises:
            Unavailable: it cannot be reached.
        """

    async def move(self, model: str, source: str, target: str) -> None:
        """Have ``target`` load a model and then ``source`` give up its copy; the errors are those of both."""
