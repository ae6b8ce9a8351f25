"""A kubelet for tests, and what makes pods of Deployments: their instances run as processes on loopback addresses.

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
import shutil
from pathlib import Path
from typing import Any

from mmcore.controller.api import Api, ApiError
from mmcore.controller.informer import Informer
from mmcore.controller.objects import CONFIG_MAP, DEPLOYMENT, POD, SECRET, Object, Ref, at, ref
from tests.serving import command, environment

log = logging.getLogger(__name__)

READY_WITHIN_S = 30.0


class Kubelet:
    """Runs the containers named ``mmcore`` of the Deployments in namespaces whose names start so.

    ``claims`` holds the folder of each volume claim.

    Attributes:
        broken: names of Deployments whose pods do not start, and what they tell instead.
    """

    def __init__(self, api: Api, folder: Path, claims: Path, namespaces: str) -> None:
        self.broken: dict[str, str] = {}
        self._api = api
        self._folder = folder
        self._claims = claims
        self._namespaces = namespaces
        self._address = f"127.{random.randrange(2, 250)}.{random.randrange(250)}"
        self._numbers = iter(range(2, 250))
        self._dirty = asyncio.Event()
        self._deployments = Informer(api, DEPLOYMENT, lambda before, after: self._dirty.set())
        self._pods = Informer(api, POD, lambda before, after: self._dirty.set())
        self._processes: dict[Ref, asyncio.subprocess.Process] = {}
        self._started: list[asyncio.subprocess.Process] = []
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
            for process in self._started:
                if process.returncode is None:
                    process.kill()
                await process.communicate()

    async def close(self) -> None:
        await self._api.close()

    def kill(self, pod: Ref) -> None:
        """As a machine that dies."""
        self._processes[pod].kill()

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
                await self._mount(where, pod)

    def _is_mine(self, where: Ref) -> bool:
        return where.namespace.startswith(self._namespaces)

    async def _keep(self, deployment: Object) -> set[Ref]:
        namespace, name = deployment["metadata"]["namespace"], deployment["metadata"]["name"]
        template = deployment["spec"]["template"]
        digest = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:8]
        pods = {
            where: pod
            for where, pod in self._pods.items.items()
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
        folders = await self._mount(where, pod)
        container = next(one for one in pod["spec"]["containers"] if one["name"] == "mmcore")
        env = {entry["name"]: entry.get("value", "") for entry in container["env"]}
        env["POD_IP"] = address
        mounts = sorted(container["volumeMounts"], key=lambda one: -len(one["mountPath"]))
        for name, value in env.items():
            text = value.replace("$(POD_IP)", address)
            for mount in mounts:
                if f"{mount['mountPath']}" in text:
                    text = text.replace(mount["mountPath"], str(folders[mount["name"]]))
                    break
            env[name] = text
        env |= {"MMCORE_HOST": address, "MMCORE_PVC_MOUNTS": str(self._mount_claims(where, container))}
        with (self._folder / f"{where.name}.log").open("w") as log:
            self._processes[where] = process = await asyncio.create_subprocess_exec(
                *command("serve"), stdout=asyncio.subprocess.PIPE, stderr=log, env=environment(**env)
            )
        self._started.append(process)
        assert process.stdout is not None
        async with asyncio.timeout(READY_WITHIN_S):
            line = await process.stdout.readline()
        if not line:
            raise AssertionError((self._folder / f"{where.name}.log").read_text())
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

    async def _mount(self, where: Ref, pod: Object) -> dict[str, Path]:
        folders: dict[str, Path] = {}
        for volume in pod["spec"].get("volumes") or []:
            folder = folders[volume["name"]] = self._folder / where.name / volume["name"]
            folder.mkdir(parents=True, exist_ok=True)
            if source := volume.get("configMap"):
                found = await self._read(CONFIG_MAP, where.namespace, source["name"], optional=False)
                files = {key: value.encode() for key, value in (found.get("data") or {}).items()}
            elif source := volume.get("secret"):
                optional = bool(source.get("optional"))
                found = await self._read(SECRET, where.namespace, source["secretName"], optional=optional)
                files = {key: base64.b64decode(value) for key, value in (found.get("data") or {}).items()}
            else:
                continue
            for name in {one.name for one in folder.iterdir()} - files.keys():
                (folder / name).unlink()
            for name, content in files.items():
                made = folder.parent / f".{name}"
                made.write_bytes(content)
                made.rename(folder / name)
        return folders

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
        process = self._processes.pop(where, None)
        if process is not None and process.returncode is None:
            process.terminate()
        await self._api.delete(POD, where)
        if process is not None:
            task = asyncio.get_running_loop().create_task(self._ended(process, where))
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)

    async def _ended(self, process: asyncio.subprocess.Process, where: Ref) -> None:
        await process.wait()
        shutil.rmtree(self._folder / where.name, ignore_errors=True)


def _ready(pod: Object | None) -> bool:
    return any(one["type"] == "Ready" and one["status"] == "True" for one in at(pod, "status", "conditions") or [])
