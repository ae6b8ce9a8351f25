"""Models that are known without a folder, as the router sees them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmcore._ext.router import Registration
from mmcore.cache import Copy, CopyState
from mmcore.errors import MmcoreError


class Catalog:
    """Models that are known without a folder; here there are none (see :class:`mmcore.routing.registered.Registered`).

    The router holds a registration of one only while it is being loaded, loaded, or unloaded on demand.

    Attributes:
        origin: that of all their registrations, and of no others.
    """

    origin: Any = object()

    def __contains__(self, name: object) -> bool:
        return False

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def registration(self, name: str) -> Registration | None:
        """A new registration of a model, None where there is none of that name."""
        return None

    def held(self, name: str) -> None:
        """The router holds a registration of that model from now on."""

    def let_go(self, name: str) -> None:
        """The router holds it no longer."""

    def changed_state(self, name: str, state: CopyState | None, error: MmcoreError | None) -> None:
        """The copy here is LOADING, LOADED or, with None, not there, because of ``error`` if there is one."""

    def gone(self, copy: Copy) -> None:
        """A copy takes no more requests."""
