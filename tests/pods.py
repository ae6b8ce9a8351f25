"""Pods as local processes: what a kubelet would mount, set and start, without a cluster."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import ssl
import subprocess
import threading
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from mmcore.controller.objects import Object
from tests.guardian import guarded
from tests.serving import command, environment

READY_WITHIN_S: Final = 60.0
OWN: Final = "mmcore"


def spec_of(item: Object) -> Object:
    """The spec of a pod, or of the pods of a Deployment."""
    found: Object = item["spec"]["template"]["spec"] if "template" in item["spec"] else item["spec"]
    return found


def instance_of(item: Object) -> Object:
    """The container of the instance."""
    found: Object = next(one for one in spec_of(item)["containers"] if one["name"] == OWN)
    return found


def variables(container: Object, folders: Mapping[str, Path], address: str) -> dict[str, str]:
    """A container's environment where its mounts are ``folders`` by volume, and its pod's address is this."""
    mounts = sorted(container["volumeMounts"], key=lambda one: -len(one["mountPath"]))
    found = {}
    for entry in container["env"]:
        text = str(entry.get("value", address)).replace("$(POD_IP)", address)
        for mount in mounts:
            if mount["mountPath"] in text:
                text = text.replace(mount["mountPath"], str(folders[mount["name"]]))
                break
        found[entry["name"]] = text
    return found


def sources(item: Object) -> dict[str, tuple[str, str, bool]]:
    """The kind (Secret, ConfigMap) and the name of what volumes hold, and whether it may be missing, by volume."""
    found = {}
    for volume in spec_of(item).get("volumes") or []:
        if secret := volume.get("secret"):
            found[volume["name"]] = ("Secret", secret["secretName"], bool(secret.get("optional")))
        elif config_map := volume.get("configMap"):
            found[volume["name"]] = ("ConfigMap", config_map["name"], bool(config_map.get("optional")))
    return found


def mounted(item: Object, folder: Path, files: Mapping[str, Mapping[str, bytes]]) -> dict[str, Path]:
    """A folder for each volume of a pod, with the files of the secret or ConfigMap that it names.

    ``files`` holds these by name; one that is missing fails as it would keep a pod from starting, unless optional. What
    was mounted before is brought up to date, each file in one step.
    """
    folders: dict[str, Path] = {}
    held = sources(item)
    for volume in spec_of(item).get("volumes") or []:
        made = folders[volume["name"]] = folder / volume["name"]
        made.mkdir(parents=True, exist_ok=True)
        if volume["name"] not in held:
            continue
        _, name, optional = held[volume["name"]]
        content = files.get(name, {}) if optional else files[name]
        for gone in {one.name for one in made.iterdir()} - content.keys():
            (made / gone).unlink()
        for key, text in content.items():
            written = folder / f".{key}"
            written.write_bytes(text)
            written.rename(made / key)
    return folders


@dataclass(frozen=True)
class Program:
    """What the image of a container would start with where its manifest names no command."""

    line: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


class Pod:
    """A running pod: the instance, and the servers beside it that ``programs`` has, by their containers' names.

    ``folder`` is the pod's own, for its volumes; logs lie beside it. ``claims`` holds the folders of volume claims.
    ``address`` is the pod's, one of 127.0.0.0/8 where none is given, so that all pods listen on the same ports; further
    variables go before those of the manifest.
    """

    def __init__(
        self,
        item: Object,
        folder: Path,
        files: Mapping[str, Mapping[str, bytes]],
        claims: Path,
        *,
        address: str = "",
        programs: Mapping[str, Program] | None = None,
        **more: str,
    ) -> None:
        self.address = address or f"127.{random.randrange(2, 250)}.{random.randrange(250)}.{random.randrange(2, 250)}"
        self.container = instance_of(item)
        self.log = folder.parent / f"{folder.name}.log"
        self._item, self._folder = item, folder
        self._servers: list[subprocess.Popen[bytes]] = []
        self._ending = threading.Lock()
        folders = mounted(item, folder, files)
        for name, program in (programs or {}).items():
            if name in [one["name"] for one in spec_of(item)["containers"]]:
                self._start_server(name, program, folders)
        env = variables(self.container, folders, self.address)
        # Loopback addresses stand for those of pods: all of them listen on the same ports.
        env |= {"MMCORE_HOST": self.address, "MMCORE_PVC_MOUNTS": str(claims), **more}
        with self.log.open("w") as log:
            self.process = guarded(
                subprocess.Popen(
                    command(*self.container["args"]),
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=environment(**env),
                )
            )

    def _start_server(self, name: str, program: Program, folders: Mapping[str, Path]) -> None:
        line, stated = beside(self._item, name, folders)
        env = {**os.environ, **stated, **program.environment}
        with (self.log.parent / f"{self._folder.name}-{name}.log").open("wb") as log:
            # A session of its own: servers start others.
            self._servers.append(
                guarded(
                    subprocess.Popen([*program.line, *line], stdout=log, stderr=log, env=env, start_new_session=True)
                )
            )

    def ready(self, within_s: float = READY_WITHIN_S) -> Pod:
        """Wait until it says that it serves."""
        assert self.process.stdout is not None
        timer = threading.Timer(within_s, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        assert line, self.log.read_text()
        return self

    def mount(self, files: Mapping[str, Mapping[str, bytes]]) -> None:
        """Bring its files up to date."""
        mounted(self._item, self._folder, files)

    def port(self, name: str) -> int:
        """One of its ports, by the name that Services have for it."""
        return next(int(one["containerPort"]) for one in self.container["ports"] if one["name"] == name)

    def target(self, name: str) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port(name)}"

    def probe(self, kind: str) -> int:
        """The status that a probe gets, asked for as kubelets do: they look at no certificate."""
        asked: dict[str, Any] = self.container[kind]["httpGet"]
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        url = f"{asked.get('scheme', 'HTTP').lower()}://{self.target(asked['port'])}{asked['path']}"
        with urllib.request.urlopen(url, timeout=20, context=context) as answer:
            return int(answer.status)

    def leave(self, within_s: float = READY_WITHIN_S) -> None:
        """As a pod that is deleted: the instance ends its calls, then its servers go, and its files."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(within_s)
        self.end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def end(self) -> None:
        """At once; may be called more than once, from any thread."""
        self.process.kill()
        with self._ending:
            if self.process.stdout is not None and not self.process.stdout.closed:
                self.process.communicate(timeout=20)
            for server in self._servers:
                if server.poll() is None:
                    os.killpg(server.pid, signal.SIGKILL)
                server.wait(20)


def beside(item: Object, name: str, folders: Mapping[str, Path]) -> tuple[list[str], dict[str, str]]:
    """The command line and the variables of another server's container, with the paths of its mounts in both."""
    pod = spec_of(item)
    container = next(one for one in (*pod.get("initContainers", []), *pod["containers"]) if one["name"] == name)

    def placed(text: str) -> str:
        for mount in container["volumeMounts"]:
            text = text.replace(mount["mountPath"], str(folders[mount["name"]]))
        return text

    line = [placed(one) for one in (*(container.get("command") or []), *(container.get("args") or []))]
    return line, {entry["name"]: placed(entry["value"]) for entry in container.get("env") or []}
