"""Where an instance finds the server beside it: what it is told as ``--runtime``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from mmcore.controller.objects import at

if TYPE_CHECKING:
    from mmcore.controller.runtimes import Runtime

#: The folder that all containers of a pod share.
MODELS: Final = "/models"
#: Where the archived release's runtimes had their servers listen, and OVMS read what its models are.
_GRPC_PORT: Final = 8001
_OVMS_REST_PORT: Final = 8888
_OVMS_CONFIG: Final = f"{MODELS}/model_config_list.json"
_TORCHSERVE_PORT: Final = 7070
_TORCHSERVE_MANAGEMENT_PORT: Final = 7071
_CONFIG_PATH: Final = re.compile(r"--config_path[= ]([^\s'\"]+)")


def runtime_address(runtime: Runtime) -> str | None:
    """The address; None where an instance is the runtime itself."""
    if not runtime.containers:
        return None
    spec, server = runtime.spec, runtime.server_type
    if not server:
        spi = endpoint_address(spec["grpcEndpoint"])
        asked = endpoint_address(spec.get("grpcDataEndpoint") or spec["grpcEndpoint"])
        return spi if asked == spi else f"{spi}?data={asked}"
    managed, data = at(spec, "builtInAdapter", "runtimeManagementPort"), _port(spec.get("grpcDataEndpoint"))
    port, more = managed or data or _GRPC_PORT, ""
    if server == "ovms":
        port, more = data or _GRPC_PORT, f"&rest={managed or _OVMS_REST_PORT}&config={_ovms_config(runtime)}"
    elif server == "torchserve":
        port, more = data or _TORCHSERVE_PORT, f"&management={managed or _TORCHSERVE_MANAGEMENT_PORT}"
    return f"{server}://127.0.0.1:{port}?repo={MODELS}/_{server}_models{more}"


def _port(endpoint: str | None) -> int | None:
    scheme, _, rest = (endpoint or "").partition(":")
    return int(rest) if scheme == "port" and rest.isdigit() else None


def _ovms_config(runtime: Runtime) -> str:
    """The file that the server was told to read."""
    words = [word for one in runtime.containers for word in (*(one.get("command") or []), *(one.get("args") or []))]
    found = _CONFIG_PATH.search(" ".join(map(str, words)))
    return found[1] if found else _OVMS_CONFIG


def endpoint_address(endpoint: str) -> str:
    """``port:N`` and ``unix:PATH`` as instances state addresses."""
    scheme, _, rest = endpoint.partition(":")
    return f"127.0.0.1:{rest}" if scheme == "port" else "unix:" + rest.removeprefix("//")


def valid_endpoint(endpoint: str) -> bool:
    """Whether it is ``port:NUMBER``, ``unix:PATH`` or ``unix://PATH``."""
    scheme, _, rest = endpoint.partition(":")
    if scheme == "port":
        return rest.isdigit() and 0 < int(rest) < 65536
    return scheme == "unix" and rest.removeprefix("//").startswith("/")
