"""From the text of ``--runtime`` to what speaks to that runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, urlsplit

from mmcore.adapters import mlserver, triton
from mmcore.adapters.external import External
from mmcore.adapters.ovms import OvmsRuntime
from mmcore.adapters.repository import RepositoryRuntime
from mmcore.adapters.runtime import Runtime, Tls
from mmcore.adapters.spi import SpiRuntime
from mmcore.adapters.torchserve import TorchServeRuntime
from mmcore.config import RuntimeSettings
from mmcore.errors import InvalidSetting
from mmcore.transport.tls import client_context

#: The file that OVMS reads, in its repository where no other is said.
_CONFIG: Final = "model_config_list.json"
_OVMS_REST: Final = "8888"
_TORCHSERVE_MANAGEMENT: Final = "7071"


def open_external(settings: RuntimeSettings, flag: str) -> External:
    """What holds the models of the runtime that the option ``flag`` tells of.

    Raises:
        InvalidSetting: its address is none, or the files for TLS cannot be read.
    """
    tls = client_context(settings.ca, settings.own) if settings.ca is not None else None
    try:
        return External(
            open_runtime(settings.address, tls),
            tls=tls,
            load_timeout_s=settings.load_timeout_s,
            loads_at_once=settings.loads_at_once,
            model_concurrency=settings.model_concurrency,
        )
    except ValueError as error:
        raise InvalidSetting(f"{flag}: {error}") from None


def open_runtime(address: str, tls: Tls | None = None) -> Runtime:
    """A runtime at ``unix:PATH`` or ``host:port``, which speaks the SPI itself, or at ``triton://host:port?repo=DIR``.

    The former may answer requests elsewhere, ``?data=`` an address of either form.
    Instead of ``triton`` there can be ``mlserver``, ``ovms`` (with ``rest=PORT`` and ``config=FILE``) and
    ``torchserve`` (with ``management=PORT`` and ``workers=N``).

    ``tls`` is spoken with every ``host:port``, for management and requests; None: plain text.

    Raises:
        ValueError: the text is no such address, or there is nothing to speak TLS with.
    """
    scheme, mark, _ = address.partition("://")
    if mark and scheme in _SERVERS:
        return _server(address, tls)
    managed, mark, text = address.partition("?")
    query = dict(parse_qsl(text))
    data = query.pop("data", "" if mark else managed)
    if query:
        raise ValueError(f"{address!r} must have nothing but data=ADDRESS behind the '?'")
    for one in (managed, data):
        if not one.startswith("unix:") or one == "unix:":
            _check(one, address)
    if tls is not None and managed.startswith("unix:") and data.startswith("unix:"):
        raise ValueError(f"{address!r} is reached by a Unix socket, where TLS is not spoken")
    return SpiRuntime(managed, data, tls)


def _server(address: str, tls: Tls | None) -> Runtime:
    parts = urlsplit(address)
    options, open_server = _SERVERS[parts.scheme]
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    repository = query.pop("repo", "")
    if not repository or query.keys() - options or not all(query.values()):
        known = "".join(f", {name}=…" for name in options)
        raise ValueError(f"{address!r} must have repo=DIR, the server's folder{known}, and nothing else behind the '?'")
    _check(parts.netloc, address)
    return open_server(parts.netloc, Path(repository).absolute(), query, tls)


def _triton(target: str, repository: Path, query: dict[str, str], tls: Tls | None) -> Runtime:
    return RepositoryRuntime(target, repository, triton.lay_out, loads_at_once=2, tls=tls)


def _mlserver(target: str, repository: Path, query: dict[str, str], tls: Tls | None) -> Runtime:
    return RepositoryRuntime(target, repository, mlserver.lay_out, tls=tls)


def _ovms(target: str, repository: Path, query: dict[str, str], tls: Tls | None) -> Runtime:
    config = Path(query["config"]).absolute() if "config" in query else repository / _CONFIG
    return OvmsRuntime(target, _beside(target, query.get("rest", _OVMS_REST)), repository, config, tls=tls)


def _torchserve(target: str, repository: Path, query: dict[str, str], tls: Tls | None) -> Runtime:
    workers = query.get("workers", "1")
    if not workers.isdecimal() or int(workers) < 1:
        raise ValueError(f"workers={workers}: expected a number of processes for each model")
    management = _beside(target, query.get("management", _TORCHSERVE_MANAGEMENT))
    return TorchServeRuntime(target, management, repository, workers=int(workers), tls=tls)


_Open = Callable[[str, Path, dict[str, str], Tls | None], Runtime]
#: Servers with an adapter: the options in their addresses beside the repository, and what makes it.
_SERVERS: Final[dict[str, tuple[tuple[str, ...], _Open]]] = {
    "triton": ((), _triton),
    "mlserver": ((), _mlserver),
    "ovms": (("rest", "config"), _ovms),
    "torchserve": (("management", "workers"), _torchserve),
}


def _beside(target: str, port: str) -> str:
    """Another port of the same host.

    Raises:
        ValueError: it is no port.
    """
    beside = f"{target.rpartition(':')[0]}:{port}"
    _check(beside, beside)
    return beside


def _check(target: str, address: str) -> None:
    host, _, port = target.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536 or "/" in host:
        servers = " or ".join(f"{name}://HOST:PORT?repo=DIR" for name in _SERVERS)
        raise ValueError(
            f"{address!r} is not the address of a runtime; write unix:PATH or HOST:PORT, with ?data= and another such"
            f" address where requests go elsewhere, or {servers}"
        )
