"""Who may call which method: bearer tokens with scopes, and ports that management is closed on.

Stands before every method of a server, REST's among them, since those ask the same handlers. Calls from other instances
pass: the one that a client has called has looked at the token, and instances know each other by certificates.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from ipaddress import IPv6Network
from typing import Any, Final

from mmcore._ext.pbwire import find_string
from mmcore.errors import InvalidRequest, Overloaded, PermissionDenied, Status, Unauthenticated
from mmcore.server.calls import Answer, Body
from mmcore.server.dataplane import DataplaneConfig
from mmcore.server.headers import Metadata, asked
from mmcore.server.passing import KNOWN
from mmcore.server.tokens import INFER, MANAGE, Grant, Grants, digest_of
from mmcore.server.watched import WatchedCall
from mmcore.transport import ServerCall, StreamCall, StreamHandler, UnaryHandler
from mmcore.transport.server import status_of

_V2: Final = "/inference.GRPCInferenceService/"
#: What probes ask, who have no token.
_OPEN: Final = ("/grpc.health.v1.Health/", "/grpc.reflection.", f"{_V2}ServerLive", f"{_V2}ServerReady")
#: What changes something for everybody, or tells of models whatever their names.
_MANAGEMENT: Final = (
    "/mmesh.ModelMesh/", "/mmcore.", f"{_V2}Repository", f"{_V2}TraceSetting", f"{_V2}LogSettings",
)  # fmt: skip
#: Inference's methods that are for no model in particular; of a stream, each of its messages is for one.
_NO_MODEL: Final = (
    f"{_V2}ServerMetadata", f"{_V2}SystemSharedMemory", f"{_V2}CudaSharedMemory",
)  # fmt: skip
#: Where the v2 protocol has the model's name in every message that has one, where no other place is known.
_NAME_PATH: Final = (1,)
#: Addresses that are known at once; one costs some hundred bytes.
_MOST_ADDRESSES: Final = 10_000


class Caller:
    """The holder of a token, or an address: how much of its limits is used.

    ``requests_per_s`` fills a bucket that holds one second's worth, one request at least.
    """

    def __init__(self, grant: Grant) -> None:
        self.grant = grant
        self.under_way = 0
        self._full = max(1.0, grant.requests_per_s)
        self._left = self._full
        self._filled_at = time.monotonic()

    def count(self) -> None:
        """Count one request.

        Raises:
            Overloaded: it is one too many.
        """
        grant = self.grant
        if grant.concurrent and self.under_way >= grant.concurrent:
            raise Overloaded(
                f"{grant.name} has {grant.concurrent} calls under way, its limit; retry when one has ended"
            )
        if grant.requests_per_s:
            now = time.monotonic()
            self._left = min(self._full, self._left + (now - self._filled_at) * grant.requests_per_s)
            self._filled_at = now
            if self._left < 1.0:
                wait_s = (1.0 - self._left) / grant.requests_per_s
                raise Overloaded(
                    f"{grant.name} is above its {grant.requests_per_s:g} requests per second; retry in {wait_s:.3f} s"
                )
            self._left -= 1.0

    def under_way_with(self, handler: UnaryHandler, call: Answer, body: bytes) -> Body | None:
        """What ``handler`` returns for a call that is under way until it is answered or given up."""
        one = call if isinstance(call, WatchedCall) else WatchedCall(call, None)
        self.under_way += 1
        one.ended = [*one.ended, self._ended]
        one.listen()
        try:
            answer = handler(one, body)  # type: ignore[arg-type]  # as REST's, it answers like a ServerCall
        except Exception as error:
            one.end(*status_of(error), None)
            raise
        if answer is not None:
            one.end(Status.OK, "", answer)
        return answer

    def _ended(self, status: int, details: str, message: Body | None) -> None:
        self.under_way -= 1


class Addresses:
    """Callers by the address that they call from, whatever token they have, each with the same limits.

    Addresses of IPv6 count by their network of 64 bits, which one host may have whole; Unix sockets are one address.
    """

    def __init__(self, requests_per_s: float, concurrent: int) -> None:
        self._limits = (requests_per_s, concurrent)
        self._callers: OrderedDict[str, Caller] = OrderedDict()

    def of(self, call: object) -> Caller:
        """The caller of a call."""
        host = str(getattr(call, "peer", "")).rpartition(":")[0] or "unix"
        if ":" in host:
            host = str(IPv6Network((host.strip("[]").partition("%")[0], 64), strict=False))
        caller = self._callers.get(host)
        if caller is None:
            if len(self._callers) >= _MOST_ADDRESSES:
                self._forget()
            requests_per_s, concurrent = self._limits
            caller = self._callers[host] = Caller(Grant(host, frozenset(), (), requests_per_s, concurrent))
        else:
            self._callers.move_to_end(host)
        return caller

    def _forget(self) -> None:
        """Make room: the one that has been silent longest has its limit in full again."""
        idle = next((host for host, caller in self._callers.items() if not caller.under_way), next(iter(self._callers)))
        del self._callers[idle]


class Access:
    """The guard of one server.

    Args:
        grants: what tokens allow, asked anew when ``renewed`` was called; None: no token is needed.
        manages: whether management is served at all.
        config: where requests name their models; None: where the v2 protocol has it.
        addresses: the limits of each address; None: there are none.
    """

    def __init__(
        self,
        grants: Grants | None,
        *,
        manages: bool = True,
        config: Callable[[], DataplaneConfig] | None = None,
        addresses: Addresses | None = None,
    ) -> None:
        self._addresses = addresses
        self._callers = None if grants is None else {digest: Caller(grant) for digest, grant in grants.items()}
        self._manages = manages
        self._config = config or DataplaneConfig

    def renew(self, grants: Grants) -> None:
        """Go by other grants from now on; callers whose grant is the same keep their count."""
        assert self._callers is not None
        before = self._callers
        self._callers = {
            digest: before[digest] if digest in before and before[digest].grant == grant else Caller(grant)
            for digest, grant in grants.items()
        }

    def unary(self, path: str, handler: UnaryHandler) -> UnaryHandler:
        """``handler`` for those who may call ``path``."""
        if path.startswith(_OPEN):
            return handler
        if path.startswith(_MANAGEMENT):
            handler = self._managing(path, handler)
        elif self._callers is not None:
            handler = self._inferring(path, handler)
        return handler if self._addresses is None else _limited(self._addresses, handler)

    def stream(self, path: str, handler: StreamHandler, *, each: bool = False) -> StreamHandler:
        """The same for a stream. ``each``: :meth:`unary` stands before each of its messages; otherwise it is for those
        alone who may use every model, and counts as one request.
        """
        if path.startswith(_OPEN) or (self._callers is None and (each or self._addresses is None)):
            return handler

        async def guarded(call: StreamCall) -> None:
            if self._addresses is not None and not each:
                self._addresses.of(call).count()
            if self._callers is None:
                return await handler(call)
            caller = self._allowed(call.metadata, INFER)
            if not each:
                if caller.grant.models:
                    _check_models(caller.grant, ())
                caller.count()
            return await handler(call)

        return guarded

    def manage(self, what: str, metadata: Metadata) -> None:
        """Let pass whoever may manage here; ``metadata`` is the call's, ``what`` names it in the refusal.

        Raises:
            Unauthenticated, PermissionDenied, Overloaded: it may not.
        """
        if not self._manages:
            raise PermissionDenied(f"{what} is not served on this port; management has one of its own")
        if self._callers is not None:
            self._allowed(metadata, MANAGE).count()

    def _managing(self, path: str, handler: UnaryHandler) -> UnaryHandler:
        def guarded(call: ServerCall, body: bytes) -> Any:
            if not _from_instance(call):
                self.manage(path, call.metadata)
            return handler(call, body)

        return guarded

    def _inferring(self, path: str, handler: UnaryHandler) -> UnaryHandler:
        method = path.removeprefix("/")
        names_model = not path.startswith(_NO_MODEL)

        def guarded(call: Any, body: bytes) -> Any:
            if _from_instance(call):
                return handler(call, body)
            metadata = call.metadata
            caller = self._allowed(metadata, INFER)
            grant = caller.grant
            if grant.models and names_model:
                _check_models(grant, self._models(method, metadata, body))
            caller.count()
            if not grant.concurrent:
                return handler(call, body)
            return caller.under_way_with(handler, call, body)

        return guarded

    def _allowed(self, metadata: Metadata, scope: str) -> Caller:
        """The caller of a call with this metadata.

        Raises:
            Unauthenticated: no token, or an unknown one.
            PermissionDenied: its token is not for ``scope``.
        """
        assert self._callers is not None
        given = [value for name, value in metadata if name == "authorization"]
        scheme, _, token = str(given[0]).partition(" ") if len(given) == 1 else ("", "", "")
        if scheme.lower() != "bearer":
            raise Unauthenticated("the call carries no bearer token: send 'authorization: Bearer TOKEN'")
        caller = self._callers.get(digest_of(token.strip()))
        if caller is None:
            raise Unauthenticated("the bearer token is not known here")
        if scope not in caller.grant.scopes:
            raise PermissionDenied(f"{caller.grant.name} lacks the scope {scope!r}")
        return caller

    def _models(self, method: str, metadata: Metadata, body: bytes) -> Sequence[str]:
        """The models that a request names, as naming finds them."""
        name = find_string(body, self._config().of(method).path or KNOWN.get(method, _NAME_PATH))
        if name:
            return (name,)
        try:
            return asked(metadata).ids
        except InvalidRequest:
            return ()


def _limited(addresses: Addresses, handler: UnaryHandler) -> UnaryHandler:
    def guarded(call: Any, body: bytes) -> Any:
        if _from_instance(call):
            return handler(call, body)
        caller = addresses.of(call)
        caller.count()
        return caller.under_way_with(handler, call, body) if caller.grant.concurrent else handler(call, body)

    return guarded


def _from_instance(call: object) -> bool:
    """Whether another instance has sent the call, which may be watched on its way."""
    return bool(getattr(call, "internal", False))


def _check_models(grant: Grant, names: Sequence[str]) -> None:
    for name in names or ("",):
        if not any(fnmatchcase(name, pattern) for pattern in grant.models):
            what = f"model {name!r}" if name else "every model; name one"
            raise PermissionDenied(f"{grant.name} may not use {what}")
