"""From the text of ``--runtime`` to what speaks to that runtime."""

from __future__ import annotations

from mmcore.adapters.runtime import Runtime
from mmcore.adapters.spi import SpiRuntime


def open_runtime(address: str) -> Runtime:
    """A runtime at ``unix:PATH`` or ``host:port``, which speaks the SPI itself.

    Raises:
        ValueError: the text is no such address.
    """
    if address.startswith("unix:") and len(address) > len("unix:"):
        return SpiRuntime(address)
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536 or "/" in host:
        raise ValueError(f"{address!r} is not the address of a runtime; write unix:PATH or HOST:PORT")
    return SpiRuntime(address)
