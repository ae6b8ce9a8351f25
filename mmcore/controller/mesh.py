"""One namespace's instances, asked for the vmodels of its objects through their management API.

One list of all vmodels tells what changed, so that ten thousand of them cost one request each time; the few that are
in motion are asked for one by one, more often.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable, Collection
from typing import Final, TypeVar

from google.protobuf.message import Message

from mmcore.config import TransportSettings
from mmcore.controller.deployment import OWNERS
from mmcore.errors import RpcError, Status, Unavailable
from mmcore.pb import cluster_pb2
from mmcore.pb import model_mesh_pb2 as pb
from mmcore.transport import Channel

log = logging.getLogger(__name__)

_TIMEOUT_S: Final = 10.0
#: Between two lists of all vmodels, and between two looks at those in motion.
_LIST_EVERY_S: Final = 10.0
_LIST_WITHIN_S: Final = 60.0
_LOOK_EVERY_S: Final = 0.3
#: More in motion than this are looked at by a list.
_ONE_BY_ONE: Final = 30
_ANSWER_LIMIT: Final = 2**30

_MANAGEMENT: Final = "/mmesh.ModelMesh"
_CLUSTER: Final = "/mmcore.Cluster"

ResponseT = TypeVar("ResponseT", bound=Message)


#: Gives a connection to instances its TLS, None for plain text; NoInstance where there is none.
Credentials = Callable[[], Awaitable[ssl.SSLContext | None]]


class NoInstance(Unavailable):
    """No instance of the namespace can be asked."""


class Mesh:
    """The instances of one namespace.

    Attributes:
        vmodels: the status of each vmodel as last told, by name.
        listed: whether all of them have been told once by the instances there are now.
    """

    def __init__(
        self, namespace: str, changed: Callable[[Collection[str] | None], None], credentials: Credentials | None = None
    ) -> None:
        self.vmodels: dict[str, pb.VModelStatusInfo] = {}
        self.listed = False
        self._namespace = namespace
        self._changed = changed
        self._credentials = credentials
        self._addresses: tuple[str, ...] = ()
        self._channel: Channel | None = None
        self._following: asyncio.Task[None] | None = None
        self._moved = asyncio.Event()
        self._in_motion: set[str] = set()
        #: When the next list is due, and when while many are in motion, who are not looked at one by one.
        self._list_at = self._soon_at = 0.0
        #: The vmodels that were told of since the last list was asked for.
        self._newer: set[str] = set()

    @property
    def reachable(self) -> bool:
        """Whether there is an instance to ask."""
        return bool(self._addresses)

    def set_addresses(self, addresses: Collection[str]) -> None:
        """Take these for the instances that can be asked."""
        now = tuple(sorted(addresses))
        if now == self._addresses:
            return
        self._addresses = now
        if not now:
            self.listed, self._soon_at = False, 0.0
        elif self._following is None:
            self._following = asyncio.get_running_loop().create_task(self._follow(), name=f"mesh {self._namespace}")
        self._moved.set()

    async def close(self) -> None:
        """Ask no more."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait([self._following])
        await self._leave()

    async def set_vmodel(self, request: pb.SetVModelRequest) -> pb.VModelStatusInfo:
        """Point a vmodel to its model.

        Raises:
            NoInstance: none answers.
            RpcError: what the instance answered instead.
        """
        status = await self._call(f"{_MANAGEMENT}/setVModel", request, pb.VModelStatusInfo)
        self._take(request.vModelId, status)
        return status

    async def delete_vmodel(self, name: str, owner: str) -> None:
        """Let a vmodel of this owner go; raises as :meth:`set_vmodel` does."""
        request = pb.DeleteVModelRequest(vModelId=name, owner=owner)
        await self._call(f"{_MANAGEMENT}/deleteVModel", request, pb.DeleteVModelResponse)
        self.vmodels.pop(name, None)
        self._in_motion.discard(name)
        self._newer.add(name)

    async def _call(
        self, path: str, request: Message, response: type[ResponseT], *, timeout_s: float = _TIMEOUT_S
    ) -> ResponseT:
        body = request.SerializeToString()
        # Another one takes over from an instance that has gone; each is tried once.
        for _ in range(len(self._addresses) + 1):
            channel = self._channel
            if channel is None or channel.target not in self._addresses:
                channel = await self._connect()
            try:
                return response.FromString(await channel.unary(path, body, timeout_s=timeout_s))
            except RpcError as error:
                if error.status is not Status.UNAVAILABLE:
                    raise
                log.debug("%s: %s does not answer: %s", self._namespace, channel.target, error.details)
                await self._leave(channel)
        raise NoInstance(f"no instance of {self._namespace} answers")

    async def _connect(self) -> Channel:
        if not self._addresses:
            raise NoInstance(f"{self._namespace} has no ready instance")
        # Asked anew for each connection, so that a secret that was renewed counts.
        tls = await self._credentials() if self._credentials is not None else None
        addresses = [one for one in self._addresses if self._last != one] or list(self._addresses)
        if not addresses:
            raise NoInstance(f"{self._namespace} has no ready instance any more")
        settings = TransportSettings(max_message_bytes=_ANSWER_LIMIT)
        channel = self._channel = Channel(addresses[0], settings=settings, ssl=tls)
        self._last = channel.target
        return channel

    #: The instance asked last, which is not the first to be tried when it went away.
    _last: str = ""

    async def _leave(self, channel: Channel | None = None) -> None:
        if self._channel is not None and channel in (None, self._channel):
            left, self._channel = self._channel, None
            await left.close()

    async def _follow(self) -> None:
        """Lists beside looks: a long list, or one that fails, keeps nobody from hearing of the few in motion."""
        loop = asyncio.get_running_loop()
        listing: asyncio.Task[None] | None = None
        try:
            while True:
                self._moved.clear()
                if self._addresses and (listing is None or listing.done()) and loop.time() >= self._due:
                    listing = loop.create_task(self._list_once(), name=f"list {self._namespace}")
                few = list(self._in_motion) if self.listed and len(self._in_motion) <= _ONE_BY_ONE else []
                await asyncio.gather(*map(self._look, few))
                pause = None
                if self._addresses and (listing is None or listing.done()):
                    pause = max(self._due - loop.time(), 0.0)
                if self._addresses and few:
                    pause = min(_LOOK_EVERY_S, _LOOK_EVERY_S if pause is None else pause)
                try:
                    async with asyncio.timeout(pause):
                        await self._moved.wait()
                except TimeoutError:
                    continue
                await asyncio.sleep(_LOOK_EVERY_S)
        finally:
            if listing is not None:
                listing.cancel()

    async def _list_once(self) -> None:
        """One list, and when the next is due: a long one is not asked for all the time."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            await self._list()
        except (NoInstance, RpcError) as error:
            log.debug("%s cannot be listed: %s", self._namespace, error)
        now = loop.time()
        self._list_at = now + _LIST_EVERY_S
        self._soon_at = now + min(_LIST_EVERY_S, _LOOK_EVERY_S + (now - started) * 5)
        self._moved.set()

    @property
    def _due(self) -> float:
        many = len(self._in_motion) > _ONE_BY_ONE
        return self._soon_at if many or not self.listed else self._list_at

    async def _list(self) -> None:
        newer = self._newer = set()
        request = cluster_pb2.ListRequest()
        answer = await self._call(
            f"{_CLUSTER}/ListVModels", request, cluster_pb2.ListVModelsResponse, timeout_s=_LIST_WITHIN_S
        )
        found = {row.name: row.status for row in answer.vmodels}
        for name in newer:
            # What was told of it while the list was on its way is newer than the list.
            found.pop(name, None)
            if name in self.vmodels:
                found[name] = self.vmodels[name]
        changed = {name for name, status in found.items() if self.vmodels.get(name) != status}
        changed |= self.vmodels.keys() - found.keys()
        self.vmodels = found
        self._in_motion = {name for name, status in found.items() if in_motion(status)}
        first, self.listed = not self.listed, True
        if changed or first:
            self._changed(None if first else changed)

    async def _look(self, name: str) -> None:
        request = pb.GetVModelStatusRequest(vModelId=name)
        try:
            status = await self._call(f"{_MANAGEMENT}/getVModelStatus", request, pb.VModelStatusInfo)
        except (NoInstance, RpcError) as error:
            log.debug("%s of %s cannot be looked at: %s", name, self._namespace, error)
            return
        if self._take(name, status):
            self._changed([name])

    def _take(self, name: str, status: pb.VModelStatusInfo) -> bool:
        changed = self.vmodels.get(name) != status
        self.vmodels[name] = status
        self._newer.add(name)
        if in_motion(status):
            self._in_motion.add(name)
            self._moved.set()
        else:
            self._in_motion.discard(name)
        return changed


def in_motion(status: pb.VModelStatusInfo) -> bool:
    """Whether it is on its way to another state."""
    states = pb.ModelStatusInfo.ModelStatus
    if status.status == pb.VModelStatusInfo.TRANSITIONING:
        return True
    newest = status.targetModelStatus if status.activeModelId != status.targetModelId else status.activeModelStatus
    return status.owner in OWNERS and newest.status == states.LOADING
