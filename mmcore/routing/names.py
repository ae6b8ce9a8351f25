"""From what a request calls its model to the model: vmodels first, then models, of folders or registered."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from enum import Enum
from typing import Final

from mmcore._ext.router import Table
from mmcore.errors import NotFound, Unavailable
from mmcore.registry import Registry
from mmcore.routing.replica import catch_up


class Kind(Enum):
    """What a name is the name of. Models and vmodels have names of their own: the same one may be taken in both."""

    #: A vmodel if there is one of that name, else a model.
    ANY = "any"
    MODEL = "model"
    VMODEL = "vmodel"


class Names:
    """The names of one instance.

    The routing table knows a vmodel as an alias as soon as its active model is there, so that the next request finds
    the copy without coming here; the alias follows the vmodel's record.

    ``knows`` tells whether a model of that name is registered or in a folder.
    """

    def __init__(self, table: Table, registry: Registry, knows: Callable[[str], bool]) -> None:
        self._table: Final = table
        self._registry: Final = registry
        self._knows = knows
        registry.vmodels.listen(self._vmodel_changed)

    def model(self, name: str, kind: Kind = Kind.ANY) -> str:
        """The model that a name stands for, by what this instance knows.

        Raises:
            NotFound: there is no such vmodel or model.
        """
        record = None if kind is Kind.MODEL else self._registry.vmodels.get(name)
        if record is None:
            if kind is not Kind.VMODEL and self._knows(name):
                return name
            raise _not_found(name, kind)
        if self._knows(record.active):
            self._follow(name, record.active)
            return record.active
        if self._knows(record.target):
            return record.target
        raise NotFound(f"model not found: {record.active}, which vmodel {name} stands for")

    async def find(self, name: str, kind: Kind = Kind.ANY) -> str:
        """The same, with a look into the store where this instance knows of none: another may just have made it.

        Raises:
            NotFound: there is no such vmodel or model.
        """
        try:
            return self.model(name, kind)
        except NotFound:
            # While the store is away, what is known here is the answer.
            with contextlib.suppress(Unavailable):
                await self._catch_up(name, kind)
            return self.model(name, kind)

    async def _catch_up(self, name: str, kind: Kind) -> None:
        """Have this instance know what the store knows of a name."""
        models = [name]
        if kind is not Kind.MODEL:
            await catch_up(self._registry.vmodels, name)
            record = self._registry.vmodels.get(name)
            if record is not None:
                models = [record.active, record.target]
        for model in models:
            if not self._knows(model):
                await catch_up(self._registry.models, model)

    def _follow(self, vmodel: str, model: str) -> None:
        """Let the table answer for a vmodel if the model is in it."""
        registration = self._table.get(model)
        if registration is not None:
            self._table.alias(vmodel, registration)

    def _vmodel_changed(self, name: str) -> None:
        aliased = self._table.aliased(name)
        if aliased is None:
            return
        record = self._registry.vmodels.get(name)
        if record is None or record.active != aliased.name:
            self._table.unalias(name)
            if record is not None:
                self._follow(name, record.active)


def _not_found(name: str, kind: Kind) -> NotFound:
    if kind is Kind.ANY:
        # The text that Triton's clients know.
        return NotFound(f"Request for unknown model: '{name}' is not found")
    return NotFound(f"{kind.value} not found: {name}")
