"""A registry's store in etcd (v3 API), for instances on many machines.

All keys are under one prefix and followed by one watch, so changes of all tables come in one order. A version is etcd's
revision. A snapshot is read in pages at one revision, and the watch begins at the next.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final

from mmcore.errors import Unavailable
from mmcore.pb import etcd_pb2 as pb
from mmcore.registry.etcd_address import EtcdAddress, connection_file, parse_address
from mmcore.registry.etcd_connection import CALL_S, EtcdConnection, Method, Refused
from mmcore.registry.etcd_file import EtcdFile
from mmcore.registry.store import Changes, Compacted, Entry, Fence, LeaseGone, NotLeader, Outcome, Write

#: Keys in one page of a snapshot: some milliseconds of the loop's time.
PAGE: Final = 2000
#: etcd may be slow to answer a page, or a new watch, when it has just started with many keys.
PAGE_S: Final = 5.0
#: How long a start may take to find a member that works: three that do not answer, and one that does.
START_S: Final = 4.0

_RANGE: Final = Method("/etcdserverpb.KV/Range", pb.RangeResponse)
_TXN: Final = Method("/etcdserverpb.KV/Txn", pb.TxnResponse)
_WATCH: Final = Method("/etcdserverpb.Watch/Watch", pb.WatchResponse)
_GRANT: Final = Method("/etcdserverpb.Lease/LeaseGrant", pb.LeaseGrantResponse)
_REVOKE: Final = Method("/etcdserverpb.Lease/LeaseRevoke", pb.LeaseRevokeResponse)
_KEEP_ALIVE: Final = Method("/etcdserverpb.Lease/LeaseKeepAlive", pb.LeaseKeepAliveResponse)


class EtcdStore:
    """See :class:`mmcore.registry.store.Store`."""

    def __init__(self, address: EtcdAddress | Callable[[], EtcdAddress]) -> None:
        """``address`` may be asked for time and again; its prefix counts as it is at first."""
        source = address if callable(address) else lambda: address
        self._prefix = f"{source().prefix}/".encode()
        #: The key after all keys with the prefix: "0" follows "/".
        self._end = self._prefix[:-1] + b"0"
        self._connection = EtcdConnection(source, probed=self._key("store"))

    async def connect(self) -> None:
        """Ask the members in turn for something."""
        await self._call(_RANGE, pb.RangeRequest(key=self._key("store")), timeout_s=START_S)

    async def read(self, key: str) -> Entry | None:
        """Linearizable, as all reads of etcd that do not say otherwise."""
        answer = await self._call(_RANGE, pb.RangeRequest(key=self._key(key)))
        return _entry(answer)

    async def transact(
        self, expected: Mapping[str, Entry | None], writes: Sequence[Write], fence: Fence | None = None
    ) -> Outcome:
        """One transaction of etcd; where a comparison fails it reads what is there instead."""
        compares = [compare for key, entry in expected.items() for compare in _compares(self._key(key), entry)]
        reads = [self._key(key) for key in expected]
        if fence is not None:
            compares.append(_created(self._key(fence.key), fence.created))
            reads.append(self._key(fence.key))
        answer = await self._call(
            _TXN,
            pb.TxnRequest(
                compare=compares,
                success=[self._operation(write) for write in writes],
                failure=[pb.RequestOp(request_range=pb.RangeRequest(key=key)) for key in reads],
            ),
        )
        if answer.succeeded:
            return Outcome(True, answer.header.revision, {})
        entries = [_entry(one.response_range) for one in answer.responses]
        if fence is not None:
            held = entries.pop()
            if held is None or held.created != fence.created:
                raise NotLeader("this instance is not the leader any more")
        return Outcome(False, answer.header.revision, dict(zip(expected, entries, strict=True)))

    async def create_missing(self, entries: Sequence[tuple[str, bytes]]) -> None:
        """One transaction of transactions, each for one key."""
        creations = [
            pb.RequestOp(
                request_txn=pb.TxnRequest(
                    compare=_compares(self._key(key), None), success=[self._operation(Write(key, value))]
                )
            )
            for key, value in entries
        ]
        await self._call(_TXN, pb.TxnRequest(success=creations), timeout_s=PAGE_S)

    async def snapshot(self) -> AsyncGenerator[Changes, None]:
        """Pages of one revision, that of the first."""
        start, revision, more = self._prefix, 0, True
        while more:
            request = pb.RangeRequest(key=start, range_end=self._end, limit=PAGE, revision=revision)
            answer = await self._call(_RANGE, request, timeout_s=PAGE_S)
            revision = revision or answer.header.revision
            yield Changes(revision, [(self._name(kv.key), _kv_entry(kv)) for kv in answer.kvs])
            more = answer.more
            if more:
                start = answer.kvs[-1].key + b"\0"

    async def changes(self, after: int) -> AsyncGenerator[Changes, None]:
        """One watch. etcd tells it from time to time of progress where there was none here."""
        create = pb.WatchCreateRequest(
            key=self._prefix, range_end=self._end, start_revision=after + 1, progress_notify=True
        )
        stream = self._connection.stream(_WATCH, [pb.WatchRequest(create_request=create)], first_s=PAGE_S)
        async with aclosing(stream) as answers:
            async for answer in answers:
                if answer.compact_revision:
                    raise Compacted
                if answer.canceled:
                    raise Unavailable(f"etcd cancelled the watch: {answer.cancel_reason}")
                if answer.created:
                    if answer.header.revision < after:
                        raise Compacted
                    yield Changes(after)
                elif answer.events:
                    yield self._changes(answer.events)
                else:
                    yield Changes(answer.header.revision)

    async def grant(self, ttl_s: float) -> int:
        """etcd counts in whole seconds."""
        answer = await self._call(_GRANT, pb.LeaseGrantRequest(TTL=math.ceil(ttl_s)))
        return int(answer.ID)

    async def renew(self, lease: int) -> bool:
        """One request on a stream of its own."""
        request = pb.LeaseKeepAliveRequest(ID=lease)
        async with aclosing(self._connection.stream(_KEEP_ALIVE, [request], first_s=CALL_S)) as answers:
            answer = await anext(answers)
        return bool(answer.TTL > 0)

    async def revoke(self, lease: int) -> None:
        """One that has expired is no error."""
        try:
            await self._connection.call(_REVOKE, pb.LeaseRevokeRequest(ID=lease))
        except Refused as error:
            if error.code != "NOT_FOUND":
                raise Unavailable(f"etcd: {error.text}") from None

    async def close(self) -> None:
        """Close the connection."""
        await self._connection.close()

    async def _call(self, method: Method, request: Any, *, timeout_s: float = CALL_S) -> Any:
        try:
            return await self._connection.call(method, request, timeout_s=timeout_s)
        except Refused as error:
            if error.code == "OUT_OF_RANGE":
                raise Compacted from None
            if "lease not found" in error.text:
                raise LeaseGone from None
            raise Unavailable(f"etcd: {error.text}") from None

    def _key(self, name: str) -> bytes:
        return self._prefix + name.encode("utf-8", "surrogateescape")

    def _name(self, key: bytes) -> str:
        return key[len(self._prefix) :].decode("utf-8", "surrogateescape")

    def _operation(self, write: Write) -> pb.RequestOp:
        key = self._key(write.key)
        if write.value is None:
            return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key))
        return pb.RequestOp(request_put=pb.PutRequest(key=key, value=write.value, lease=write.lease))

    def _changes(self, events: Sequence[pb.Event]) -> Changes:
        # Of the same key the last event counts.
        latest = {event.kv.key: event for event in events}
        return Changes(
            events[-1].kv.mod_revision,
            [(self._name(key), _kv_entry(event.kv)) for key, event in latest.items() if event.type == pb.Event.PUT],
            [self._name(key) for key, event in latest.items() if event.type == pb.Event.DELETE],
        )


def etcd_store(url: str) -> EtcdStore:
    """The store at an address as :func:`mmcore.registry.etcd_address.parse_address` reads it; a file is followed.

    Raises:
        ValueError: as that does.
    """
    file = connection_file(url)
    return EtcdStore(EtcdFile(file).address if file is not None else parse_address(url))


def _kv_entry(kv: pb.KeyValue) -> Entry:
    return Entry.of(kv.value, kv.mod_revision, kv.create_revision)


def _entry(answer: pb.RangeResponse) -> Entry | None:
    return _kv_entry(answer.kvs[0]) if answer.kvs else None


def _compares(key: bytes, entry: Entry | None) -> list[pb.Compare]:
    """What must hold for a key to be as expected (see :func:`mmcore.registry.store.is_same`)."""
    if entry is None:
        return [_created(key, 0)]
    return [
        pb.Compare(key=key, target=pb.Compare.MOD, mod_revision=entry.version),
        pb.Compare(key=key, target=pb.Compare.VALUE, value=entry.value),
    ]


def _created(key: bytes, revision: int) -> pb.Compare:
    return pb.Compare(key=key, target=pb.Compare.CREATE, create_revision=revision)
