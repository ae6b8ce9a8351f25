"""A file of settings that is read again whenever it changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final, Generic, TypeVar

from mmcore.errors import InvalidSetting
from mmcore.file_stamp import file_stamp

log = logging.getLogger(__name__)

#: How often a file is looked at. What Kubernetes mounts is kept in step by the minute.
INTERVAL_S: Final = 1.0

ValueT = TypeVar("ValueT")


class WatchedFile(Generic[ValueT]):
    """What a file says, kept in step with it.

    Attributes:
        value: the file's content as ``parse`` reads it; after a bad change what it was before.
        on_change: called on the loop with each new value.

    A file is changed when what its path leads to, through whatever links, is another file, or has another size or time
    of change: written in place, replaced, or a link turned to a new folder as Kubernetes does.

    Raises:
        InvalidSetting: it cannot be read or parsed at first; ``parse`` raises ValueError for what cannot be.
    """

    def __init__(
        self,
        path: Path,
        parse: Callable[[str], ValueT],
        *,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self.on_change: Callable[[ValueT], object] = lambda value: None
        self._path = path
        self._parse = parse
        self._interval_s = interval_s
        self._stamp = file_stamp(self._path)
        self.value: ValueT = self._read()

    async def watch(self) -> None:
        """Follow the file until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s)
            stamp = file_stamp(self._path)
            # A file that is away for a moment while it is replaced has not changed yet.
            if stamp is None or stamp == self._stamp:
                continue
            self._stamp = stamp
            try:
                self.value = self._read()
            except InvalidSetting as error:
                log.error("%s; what it said before stays in force", error)
                continue
            log.info("%s has changed", self._path)
            self.on_change(self.value)

    def _read(self) -> ValueT:
        try:
            return self._parse(self._path.read_text())
        except (OSError, ValueError) as error:
            raise InvalidSetting(f"{self._path}: {error}") from None
