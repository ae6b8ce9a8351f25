"""A kubelet for tests, and what makes pods of Deployments: their containers run as processes on loopback addresses.

Each pod has an address of its own in 127.0.0.0/8, so that all listen on the same ports, as in a cluster. Mounted
volumes are folders, written anew when a pod's annotations change, which is when real kubelets do so at once.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import os
import random
from pathlib import Path
from typing import Any

from mmcore.controller.api import Api, ApiError
from mmcore.controller.informer import Informer
from mmcore.controller.objects import CONFIG_MAP, DEPLOYMENT, POD, SECRET, Object, Ref, at, ref
from tests.pods import Pod, Program, instance_of, sources

log = logging.getLogger(__name__)

READY_WITHIN_S = 60.0


class Kubelet:
    """Runs the pods of the Deployments in namespaces whose names start so.

    ``claims`` holds the folder of each volume claim.

    Attributes:
        broken: names of Deployments whose pods do not start, and what they tell instead.
        programs: what stands for the images of the servers beside instances, by the names of their containers.
    """

    def __init__(self, api: Api, folder: Path, claims: Path, namespaces: str) -> None:
        self.broken: dict[str, str] = {}
        self.programs: dict[str, Program] = {}
        self._api = api
        self._folder = folder
        self._claims = claims
        self._namespaces = namespaces
        self._address = f"127.{random.randrange(2, 250)}.{random.randrange(250)}"
        self._numbers = iter(range(2, 250))
        self._dirty = asyncio.Event()
        self._deployments = Informer(api, DEPLOYMENT, lambda before, after: self._dirty.set())
        self._pods = Informer(api, POD, self._pod_changed)
        #: Pods that were made and that the watch has not brought yet.
        self._made: dict[Ref, Object] = {}
        self._running: dict[Ref, Pod] = {}
        self._started: list[Pod] = []
        self._annotations: dict[Ref, Any] = {}
        self._starting: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Work until cancelled, and end all processes then."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._deployments.run())
                group.create_task(self._pods.run())
                await self._deployments.synced.wait()
                await self._pods.synced.wait()
                while True:
                    self._dirty.clear()
                    try:
                        await self._step()
                    except ApiError as error:
                        # 403: a namespace that ends takes no new pods.
                        if not (error.conflict or error.missing or error.code == 403):
                            raise
                        self._dirty.set()
                    await self._dirty.wait()
        finally:
            for task in self._starting:
                task.cancel()
            if self._starting:
                await asyncio.wait(self._starting)
            for pod in self._started:
                await asyncio.to_thread(pod.end)

    async def close(self) -> None:
        await self._api.close()

    @property
    def pods(self) -> list[Pod]:
        """Those that run."""
        return list(self._running.values())

    def kill(self, pod: Ref) -> None:
        """As a machine that dies."""
        self._running[pod].process.kill()

    def _pod_changed(self, before: Object | None, after: Object | None) -> None:
        found = after if after is not None else before
        assert found is not None
        self._made.pop(ref(found), None)
        self._dirty.set()

    async def _step(self) -> None:
        owned: set[Ref] = set()
        for deployment in list(self._deployments.items.values()):
            if not self._is_mine(ref(deployment)) or at(deployment, "metadata", "deletionTimestamp"):
                continue
            owned |= await self._keep(deployment)
        for where, pod in list(self._pods.items.items()):
            if not self._is_mine(where):
                continue
            if where not in owned:
                await self._end(where)
            elif self._annotations.get(where) != at(pod, "metadata", "annotations"):
                self._annotations[where] = at(pod, "metadata", "annotations")
                if where in self._running:
                    self._running[where].mount(await self._files(where.namespace, pod))

    def _is_mine(self, where: Ref) -> bool:
        return where.namespace.startswith(self._namespaces)

    async def _keep(self, deployment: Object) -> set[Ref]:
        namespace, name = deployment["metadata"]["namespace"], deployment["metadata"]["name"]
        template = deployment["spec"]["template"]
        digest = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:8]
        pods = {
            where: pod
            for where, pod in {**self._made, **self._pods.items}.items()
            if where.namespace == namespace and pod["metadata"]["name"].startswith(f"{name}-{digest}-")
        }
        wanted = int(deployment["spec"].get("replicas", 1))
        kept = dict(sorted(pods.items(), key=lambda one: one[0].name)[:wanted])
        for _ in range(wanted - len(kept)):
            item = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    **template["metadata"],
                    "name": f"{name}-{digest}-{os.urandom(3).hex()}",
                    "namespace": namespace,
                },
                "spec": template["spec"],
            }
            made = await self._api.create(POD, item)
            kept[ref(made)] = made
            if ref(made) not in self._pods.items:
                self._made[ref(made)] = made
            task = asyncio.get_running_loop().create_task(self._start(ref(made), made, name))
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)
        # Those of an older template stay until the new ones are ready.
        if all(_ready(self._pods.items.get(where)) for where in kept):
            return set(kept)
        older = [
            where for where in self._pods.items if where.namespace == namespace and where.name.startswith(f"{name}-")
        ]
        return {*kept, *(older if wanted else [])}

    async def _start(self, where: Ref, pod: Object, deployment: str) -> None:
        try:
            await self._run(where, pod, deployment)
        except (AssertionError, ApiError, OSError, TimeoutError):
            log.exception("the pod %s does not start", where)

    async def _run(self, where: Ref, pod: Object, deployment: str) -> None:
        if deployment in self.broken:
            waiting = {"reason": "CrashLoopBackOff", "message": self.broken[deployment]}
            status = {"name": "mmcore", "ready": False, "restartCount": 3, "image": "i", "imageID": "i"}
            await self._status(where, {"containerStatuses": [{**status, "state": {"waiting": waiting}}]})
            return
        address = f"{self._address}.{next(self._numbers)}"
        files, claims = await self._files(where.namespace, pod), self._mount_claims(where, instance_of(pod))
        running = self._running[where] = Pod(
            pod, self._folder / where.name, files, claims, address=address, programs=self.programs
        )
        self._started.append(running)
        await asyncio.to_thread(running.ready, READY_WITHIN_S)
        ready = [{"type": "Ready", "status": "True"}]
        await self._status(where, {"phase": "Running", "podIP": address, "conditions": ready})

    def _mount_claims(self, where: Ref, container: Object) -> Path:
        """The folder of the claims that the pod mounts, as they are below the folder of all."""
        made = self._folder / where.name / "claims"
        made.mkdir(parents=True, exist_ok=True)
        for mount in container["volumeMounts"]:
            path = Path(mount["mountPath"])
            if mount["name"].startswith("pvc-") and (self._claims / path.name).exists():
                (made / path.name).symlink_to(self._claims / path.name)
        return made

    async def _status(self, where: Ref, status: Object) -> None:
        await self._api.patch(POD, where, {"status": status}, "status")

    async def _files(self, namespace: str, pod: Object) -> dict[str, dict[str, bytes]]:
        found = {}
        for kind, name, optional in sources(pod).values():
            if kind == "Secret":
                data = (await self._read(SECRET, namespace, name, optional=optional)).get("data") or {}
                found[name] = {key: base64.b64decode(value) for key, value in data.items()}
            else:
                data = (await self._read(CONFIG_MAP, namespace, name, optional=optional)).get("data") or {}
                found[name] = {key: value.encode() for key, value in data.items()}
        return found

    async def _read(self, kind: Any, namespace: str, name: str, *, optional: bool) -> Object:
        for _ in range(200):
            try:
                return await self._api.get(kind, Ref(namespace, name))
            except ApiError as error:
                if not error.missing or optional:
                    return {}
            # As the kubelet does, which starts a pod when all that it mounts is there.
            await asyncio.sleep(0.05)
        raise AssertionError(f"{kind.name} {namespace}/{name} is missing")

    async def _end(self, where: Ref) -> None:
        running = self._running.pop(where, None)
        await self._api.delete(POD, where)
        if running is not None:
            task = asyncio.get_running_loop().create_task(asyncio.to_thread(running.leave))
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)


def _ready(pod: Object | None) -> bool:
    return any(one["type"] == "Ready" and one["status"] == "True" for one in at(pod, "status", "conditions") or [])
