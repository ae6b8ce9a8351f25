"""One connection to a working member of an etcd cluster, replaced by one to another member when it fails, and by one to
wherever the cluster is now when its address has changed.

The only file that imports grpc. Nothing is sent twice that may have been carried out: only a call that was refused for
its token is, with a new one.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from mmcore.errors import Unavailable
from mmcore.pb import etcd_pb2 as pb
from mmcore.registry.etcd_address import EtcdAddress

if TYPE_CHECKING:
    import grpc

log = logging.getLogger(__name__)

#: How long one of several members may take to show that it works, and how long a call may take, or the only member.
CONNECT_S: Final = 1.0
CALL_S: Final = 2.0

_OPTIONS: Final[tuple[tuple[str, int | str], ...]] = (
    # Its own socket for each channel, connected to at once.
    ("grpc.use_local_subchannel_pool", 1),
    # What its name does not say: how long one attempt to connect may take.
    ("grpc.min_reconnect_backoff_ms", int(CONNECT_S * 1000)),
    # etcd allows a PING every 5 seconds.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)
#: A member that is cut off from its cluster refuses calls with this instead of answering from the past.
_HAS_LEADER: Final = ("hasleader", "true")
#: What etcd says, with various statuses, when a token is to be asked for anew.
_STALE_TOKEN: Final = ("invalid auth token", "revision of auth store is old", "user name is empty")


@dataclass(frozen=True, slots=True)
class Method:
    """A method's path and the class of its answers."""

    path: str
    answer: type[Any]


_AUTHENTICATE: Final = Method("/etcdserverpb.Auth/Authenticate", pb.AuthenticateResponse)
_RANGE: Final = Method("/etcdserverpb.KV/Range", pb.RangeResponse)


class Refused(Exception):
    """etcd answered an error of the request itself.

    Attributes:
        code: the name of the gRPC status.
        text: what etcd said.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.text = text


@dataclass(frozen=True, slots=True, eq=False)
class _Live:
    channel: grpc.aio.Channel
    endpoint: str
    metadata: tuple[tuple[str, str], ...]


class EtcdConnection:
    """Calls to whichever member works. After a failure the next call tries the members in turn, the next one first."""

    def __init__(self, address: Callable[[], EtcdAddress], *, probed: bytes) -> None:
        """``address`` is asked before each call: it may change. ``probed`` is a key that may be read, to see whether a
        member works.

        Raises:
            ValueError: grpcio is not installed.
        """
        if importlib.util.find_spec("grpc") is None:
            raise ValueError("a registry in etcd needs grpcio: pip install 'mmcore[etcd]'")
        self._source = address
        self._address = address()
        self._probed = probed
        self._live: _Live | None = None
        self._moving: asyncio.Task[None] | None = None
        self._next = 0
        self._lock = asyncio.Lock()

    async def call(self, method: Method, request: Any, *, timeout_s: float = CALL_S) -> Any:
        """The answer to one request.

        Raises:
            Unavailable: no member can be reached, or none answered in time.
            Refused: etcd answered with an error.
        """
        try:
            async with asyncio.timeout(timeout_s):
                live = await self._connected()
                try:
                    return await self._call(live, method, request, timeout_s)
                except Refused as error:
                    if not any(text in error.text for text in _STALE_TOKEN):
                        raise
                    await self._drop(live)
                return await self._call(await self._connected(), method, request, timeout_s)
        except TimeoutError:
            if self._live is None:
                endpoints = ", ".join(self._address.endpoints)
                raise Unavailable(f"cannot connect to etcd at {endpoints} within {timeout_s:g} s") from None
            await self._drop(self._live)
            raise Unavailable(f"etcd did not answer within {timeout_s:g} s") from None

    async def stream(self, method: Method, requests: Sequence[Any], *, first_s: float) -> AsyncGenerator[Any, None]:
        """The answers to a stream that stays open after ``requests``; the first one comes within ``first_s``.

        Raises:
            Unavailable: it ended, for whatever reason.
        """
        import grpc

        live = await self._connected()
        call = live.channel.stream_stream(
            method.path, request_serializer=_serialise, response_deserializer=method.answer.FromString
        )(metadata=(*live.metadata, _HAS_LEADER))
        try:
            async with asyncio.timeout(first_s):
                for request in requests:
                    await call.write(request)
                answer = await call.read()
            while answer is not grpc.aio.EOF:
                yield answer
                answer = await call.read()
            raise Unavailable(f"etcd at {live.endpoint} ended a stream")
        except TimeoutError:
            await self._drop(live)
            raise Unavailable(f"etcd at {live.endpoint} did not answer within {first_s:g} s") from None
        except grpc.aio.AioRpcError as error:
            await self._drop(live)
            raise Unavailable(f"etcd at {live.endpoint}: {error.details()}") from None
        except asyncio.InvalidStateError as error:
            # A write to a stream that has just ended.
            await self._drop(live)
            raise Unavailable(f"etcd at {live.endpoint}: {error}") from None
        except asyncio.CancelledError:
            # Calls on a channel that is closed are cancelled, which is not to be taken for this task's own end.
            if _is_cancelled():
                raise
            raise Unavailable(f"the connection to etcd at {live.endpoint} was given up") from None
        finally:
            call.cancel()

    async def close(self) -> None:
        """Close the connection."""
        if self._moving is not None:
            self._moving.cancel()
            await asyncio.wait([self._moving])
        if self._live is not None:
            await self._drop(self._live)

    async def _call(self, live: _Live, method: Method, request: Any, timeout_s: float) -> Any:
        import grpc

        call = live.channel.unary_unary(
            method.path, request_serializer=_serialise, response_deserializer=method.answer.FromString
        )
        try:
            return await call(request, timeout=timeout_s, metadata=live.metadata)
        except grpc.aio.AioRpcError as error:
            text = error.details() or ""
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                await self._drop(live)
                raise Unavailable(f"etcd at {live.endpoint}: {text}") from None
            raise Refused(error.code().name, text) from None
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            raise Unavailable(f"the connection to etcd at {live.endpoint} was given up") from None

    async def _connected(self) -> _Live:
        address = self._source()
        if address != self._address:
            self._address, self._next = address, 0
            if self._live is not None and (self._moving is None or self._moving.done()):
                self._moving = asyncio.get_running_loop().create_task(self._move(self._live), name="etcd moves")
        async with self._lock:
            if self._live is None:
                self._live = await self._connect()
            return self._live

    async def _move(self, before: _Live) -> None:
        """Have the next call go to where the cluster is now; while nothing works there, what works here is kept."""
        live: _Live | None = None
        address: EtcdAddress | None = None
        while address != self._address:
            address = self._address
            if live is not None:
                await live.channel.close()
            try:
                live = await self._connect()
            except Unavailable as error:
                live = None
                log.error("the new address of etcd does not work, the old one stays in use: %s", error)
        if live is None:
            return
        log.info("the address of etcd has changed: connected to %s", live.endpoint)
        if self._live is not before:
            # It has failed meanwhile, and has been replaced by one to the new address.
            await live.channel.close()
            return
        self._live = live
        await before.channel.close()

    @property
    def _connect_s(self) -> float:
        return CONNECT_S if len(self._address.endpoints) > 1 else CALL_S

    async def _connect(self) -> _Live:
        failures: list[str] = []
        for _ in self._address.endpoints:
            endpoint = self._address.endpoints[self._next % len(self._address.endpoints)]
            try:
                return await self._try(endpoint)
            except TimeoutError:
                failures.append(f"{endpoint} did not answer within {self._connect_s:g} s")
            except (Unavailable, Refused) as error:
                failures.append(str(error))
        raise Unavailable(f"cannot connect to etcd: {'; '.join(failures)}")

    async def _try(self, endpoint: str) -> _Live:
        """A connection to a member that has answered a read, which it does only as a part of a working cluster."""
        live = _Live(self._open(endpoint), endpoint, ())
        try:
            async with asyncio.timeout(self._connect_s):
                live = replace(live, metadata=await self._token(live))
                await self._call(live, _RANGE, pb.RangeRequest(key=self._probed, limit=1), self._connect_s)
        except BaseException:
            self._next += 1
            await live.channel.close()
            raise
        log.debug("connected to etcd at %s", endpoint)
        return live

    async def _token(self, live: _Live) -> tuple[tuple[str, str], ...]:
        address = self._address
        if not address.user:
            return ()
        request = pb.AuthenticateRequest(name=address.user, password=address.password)
        try:
            answer = await self._call(live, _AUTHENTICATE, request, self._connect_s)
        except Refused as error:
            if "authentication is not enabled" in error.text:
                return ()
            raise
        return (("token", answer.token),)

    def _open(self, endpoint: str) -> grpc.aio.Channel:
        import grpc

        address = self._address
        if not address.tls:
            return grpc.aio.insecure_channel(endpoint, options=_OPTIONS)
        credentials = grpc.ssl_channel_credentials(address.certificate, address.client_key, address.client_certificate)
        options = _OPTIONS
        if address.authority:
            options += (
                ("grpc.ssl_target_name_override", address.authority),
                ("grpc.default_authority", address.authority),
            )
        return grpc.aio.secure_channel(endpoint, credentials, options=options)

    async def _drop(self, live: _Live) -> None:
        """Use this connection no longer; what else is under way on it fails."""
        if self._live is live:
            self._live = None
            self._next += 1
        await live.channel.close()


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _serialise(message: Any) -> bytes:
    return bytes(message.SerializeToString())
