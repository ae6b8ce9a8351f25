"""Which of several controllers works: the holder of a Lease (coordination.k8s.io), renewed while it does.

Durations are those of Kubernetes' own controllers: a lease is for 15 s, renewed every 2 s, and its holder stops when it
could not renew it for 10 s, before another may take it.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime, timedelta
from typing import Final

from mmcore.controller.api import Api, ApiError
from mmcore.controller.objects import LEASE, Object, Ref, at
from mmcore.errors import Unavailable

log = logging.getLogger(__name__)

LEASE_S: Final = 15
RENEW_WITHIN_S: Final = 10.0
RETRY_S: Final = 2.0


class LeaseLost(Unavailable):
    """Another may be working now."""


class Leader:
    """One candidate for a lease; ``identity`` tells it from the others."""

    def __init__(self, api: Api, where: Ref, identity: str) -> None:
        self._api = api
        self._where = where
        self._identity = identity
        #: The record last seen and when, by our clock: clocks of others are not compared with ours.
        self._seen: tuple[object, float] = (None, 0.0)

    async def acquire(self) -> None:
        """Wait until the lease is ours."""
        while not await self._try():  # noqa: ASYNC110  # nobody tells when another's lease runs out
            await asyncio.sleep(RETRY_S)

    async def hold(self) -> None:
        """Renew it until cancelled, and let it go then.

        Raises:
            LeaseLost: it is another's, or could not be renewed in time.
        """
        loop = asyncio.get_running_loop()
        renewed = loop.time()
        try:
            while True:
                await asyncio.sleep(RETRY_S)
                began = loop.time()
                if await self._try_until(renewed + RENEW_WITHIN_S):
                    renewed = began
                elif loop.time() >= renewed + RENEW_WITHIN_S:
                    raise LeaseLost(f"the lease {self._where} could not be renewed for {RENEW_WITHIN_S:.0f} s")
        except asyncio.CancelledError:
            await asyncio.shield(self._release())
            raise

    async def _try_until(self, at: float) -> bool:
        """Whether the lease is ours by that time of the loop: a request may take longer than the lease is for."""
        try:
            async with asyncio.timeout_at(at):
                return await self._try()
        except TimeoutError:
            return False

    async def _try(self) -> bool:
        try:
            return await self._write()
        except ApiError as error:
            if not error.conflict:
                log.warning("lease %s: %s", self._where, error)
            return False

    async def _write(self) -> bool:
        now = _micro(datetime.now(UTC))
        spec: Object = {"holderIdentity": self._identity, "leaseDurationSeconds": LEASE_S, "renewTime": now}
        try:
            found = await self._api.get(LEASE, self._where)
        except ApiError as error:
            if not error.missing:
                raise
            metadata = {"name": self._where.name, "namespace": self._where.namespace}
            item = {"apiVersion": LEASE.api_version, "kind": LEASE.name, "metadata": metadata}
            await self._api.create(LEASE, {**item, "spec": {**spec, "acquireTime": now, "leaseTransitions": 0}})
            return True
        holder = at(found, "spec", "holderIdentity")
        if holder != self._identity:
            if holder and not self._expired(found):
                return False
            spec |= {"acquireTime": now, "leaseTransitions": int(at(found, "spec", "leaseTransitions") or 0) + 1}
        found["spec"] = {**(found.get("spec") or {}), **spec}
        await self._api.replace(LEASE, found)
        self._seen = (spec["renewTime"], asyncio.get_running_loop().time())
        return True

    def _expired(self, found: Object) -> bool:
        """Whether another's lease has not been renewed for its duration, as we have watched it."""
        record = at(found, "spec", "renewTime")
        now = asyncio.get_running_loop().time()
        if record != self._seen[0]:
            self._seen = (record, now)
        duration = int(at(found, "spec", "leaseDurationSeconds") or LEASE_S)
        return now - self._seen[1] > duration

    async def _release(self) -> None:
        try:
            found = await self._api.get(LEASE, self._where)
            if at(found, "spec", "holderIdentity") == self._identity:
                found["spec"] |= {
                    "holderIdentity": "",
                    "renewTime": _micro(datetime.now(UTC) - timedelta(seconds=LEASE_S)),
                }
                await self._api.replace(LEASE, found)
        except ApiError as error:
            log.warning("the lease %s could not be let go: %s", self._where, error)


def _micro(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
