"""The instances of Deployments as local processes: what a kubelet would mount and set, without a cluster."""

from __future__ import annotations

import os
import random
import ssl
import subprocess
import threading
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from mmcore.controller.objects import Object
from tests.serving import command, environment

READY_WITHIN_S: Final = 30.0
OWN: Final = "mmcore"


def instance_of(deployment: Object) -> Object:
    """The container of the instance."""
    containers = deployment["spec"]["template"]["spec"]["containers"]
    found: Object = next(one for one in containers if one["name"] == OWN)
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


def mounted(deployment: Object, folder: Path, files: Mapping[str, Mapping[str, bytes]]) -> dict[str, Path]:
    """A folder for each volume of a pod, with the files of the secret or ConfigMap that it names.

    ``files`` holds these by name; one that is missing fails as it would keep a pod from starting, unless optional.
    """
    folders: dict[str, Path] = {}
    for volume in deployment["spec"]["template"]["spec"]["volumes"]:
        made = folders[volume["name"]] = folder / volume["name"]
        made.mkdir(parents=True)
        secret, config_map = volume.get("secret"), volume.get("configMap")
        source = secret or config_map or {}
        name = source.get("secretName") or source.get("name")
        if name is None or (source.get("optional") and name not in files):
            continue
        for key, content in files[name].items():
            (made / key).write_bytes(content)
    return folders


class Pod:
    """One running instance; ``address`` is its pod's."""

    def __init__(
        self, deployment: Object, folder: Path, files: Mapping[str, Mapping[str, bytes]], claims: Path
    ) -> None:
        self.address = f"127.{random.randrange(2, 250)}.{random.randrange(250)}.{random.randrange(2, 250)}"
        self.container = instance_of(deployment)
        self.log = folder / f"{os.urandom(4).hex()}.log"
        env = variables(self.container, mounted(deployment, self.log.with_suffix(""), files), self.address)
        # Loopback addresses stand for those of pods: all of them listen on the same ports.
        env |= {"MMCORE_HOST": self.address, "MMCORE_PVC_MOUNTS": str(claims)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command(*self.container["args"]), stdout=subprocess.PIPE, stderr=log, text=True, env=environment(**env)
            )

    def ready(self) -> Pod:
        """Wait until it says that it serves."""
        assert self.process.stdout is not None
        timer = threading.Timer(READY_WITHIN_S, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        assert line, self.log.read_text()
        return self

    def port(self, name: str) -> int:
        """One of its ports, by the name that Services have for it."""
        return next(int(one["containerPort"]) for one in self.container["ports"] if one["name"] == name)

    def target(self, name: str) -> str:
        return f"{self.address}:{self.port(name)}"

    def probe(self, kind: str) -> int:
        """The status that a probe gets, asked for as kubelets do: they look at no certificate."""
        asked: dict[str, Any] = self.container[kind]["httpGet"]
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        url = f"{asked.get('scheme', 'HTTP').lower()}://{self.target(asked['port'])}{asked['path']}"
        with urllib.request.urlopen(url, timeout=20, context=context) as answer:
            return int(answer.status)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=20)


def beside(deployment: Object, name: str, folders: Mapping[str, Path]) -> tuple[list[str], dict[str, str]]:
    """The command line and the variables of another server's container, with the paths of its mounts in both."""
    pod = deployment["spec"]["template"]["spec"]
    container = next(one for one in (*pod.get("initContainers", []), *pod["containers"]) if one["name"] == name)

    def placed(text: str) -> str:
        for mount in container["volumeMounts"]:
            text = text.replace(mount["mountPath"], str(folders[mount["name"]]))
        return text

    line = [placed(one) for one in (*(container.get("command") or []), *(container.get("args") or []))]
    return line, {entry["name"]: placed(entry["value"]) for entry in container.get("env") or []}
