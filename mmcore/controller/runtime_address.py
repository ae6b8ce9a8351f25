"""Where an instance finds the server beside it: what it is told as ``--runtime``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mmcore.controller.objects import at

if TYPE_CHECKING:
    from mmcore.controller.runtimes import Runtime

#: The folder that all containers of a pod share.
MODELS: Final = "/models"
_GRPC_PORT: Final = 8001


def runtime_address(runtime: Runtime) -> str | None:
    """The address; None where an instance is the runtime itself."""
    if not runtime.containers:
        return None
    spec, server = runtime.spec, runtime.server_type
    if not server:
        managed = endpoint_address(spec["grpcEndpoint"])
        data = endpoint_address(spec.get("grpcDataEndpoint") or spec["grpcEndpoint"])
        return managed if data == managed else f"{managed}?data={data}"
    port = at(spec, "builtInAdapter", "runtimeManagementPort") or _GRPC_PORT
    return f"{server}://127.0.0.1:{port}?repo={MODELS}/_{server}_models"


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
