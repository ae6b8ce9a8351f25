"""A connection file that is read again when it changes, as Kubernetes changes what it mounts of a secret."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from mmcore.file_stamp import file_stamp
from mmcore.registry.etcd_address import EtcdAddress, read_connection

log = logging.getLogger(__name__)


class EtcdFile:
    """The address that a connection file gives; see :func:`mmcore.registry.etcd_address.read_connection`.

    Raises:
        ValueError: it cannot be read at first, or does not say what it must.
    """

    def __init__(self, file: Path) -> None:
        self._file: Final = file
        self._address = read_connection(file)
        self._prefix: Final = self._address.prefix
        self._stamps = self._look()

    def address(self) -> EtcdAddress:
        """The address as it is now; as it was where the file says nothing that can be used.

        The file, and those that it names, are looked at each time: some microseconds.
        """
        stamps = self._look()
        # One that is away for a moment while it is replaced has not changed yet.
        if stamps == self._stamps or None in stamps:
            return self._address
        self._stamps = stamps
        try:
            self._address = read_connection(self._file)
        except ValueError as error:
            log.error("%s; what it said before stays in force", error)
            return self._address
        self._stamps = self._look()
        if self._address.prefix != self._prefix:
            log.error("%s: another root_prefix takes effect at the next start", self._file)
        return self._address

    def _look(self) -> tuple[tuple[int, int, int, int] | None, ...]:
        return tuple(map(file_stamp, self._address.files))
