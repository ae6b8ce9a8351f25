"""From the text of ``--runtime`` to what speaks to that runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, urlsplit

from mmcore.adapters import mlserver, triton
from mmcore.adapters.repository import Layout, RepositoryRuntime
from mmcore.adapters.runtime import Runtime
from mmcore.adapters.spi import SpiRuntime

#: Servers with an adapter: the layout of their repository, and how many models they load at once.
_REPOSITORIES: Final[dict[str, tuple[Layout, int]]] = {"triton": (triton.lay_out, 2), "mlserver": (mlserver.lay_out, 1)}


def open_runtime(address: str) -> Runtime:
    """A runtime at ``unix:PATH`` or ``host:port``, which speaks the SPI itself, or at ``triton://host:port?repo=DIR``.

    The former may answer requests elsewhere, ``?data=`` an address of either form.

    Raises:
        ValueError: the text is no such address.
    """
    scheme, mark, _ = address.partition("://")
    if mark and scheme in _REPOSITORIES:
        return _repository(address)
    managed, mark, text = address.partition("?")
    query = dict(parse_qsl(text))
    data = query.pop("data", "" if mark else managed)
    if query:
        raise ValueError(f"{address!r} must have nothing but data=ADDRESS behind the '?'")
    for one in (managed, data):
        if not one.startswith("unix:") or one == "unix:":
            _check(one, address)
    return SpiRuntime(managed, data)


def _repository(address: str) -> RepositoryRuntime:
    parts = urlsplit(address)
    query = dict(parse_qsl(parts.query))
    repository = query.pop("repo", "")
    if not repository or query:
        raise ValueError(f"{address!r} must have repo=DIR, the server's repository, and nothing else behind the '?'")
    _check(parts.netloc, address)
    layout, loads_at_once = _REPOSITORIES[parts.scheme]
    return RepositoryRuntime(parts.netloc, Path(repository).absolute(), layout, loads_at_once=loads_at_once)


def _check(target: str, address: str) -> None:
    host, _, port = target.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536 or "/" in host:
        servers = " or ".join(f"{name}://HOST:PORT?repo=DIR" for name in _REPOSITORIES)
        raise ValueError(
            f"{address!r} is not the address of a runtime; write unix:PATH or HOST:PORT, with ?data= and another such"
            f" address where requests go elsewhere, or {servers}"
        )
