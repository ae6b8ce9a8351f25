"""Kubernetes API servers for tests: the real one where ``KUBEBUILDER_ASSETS`` says where it is, else ours.

``make kube-apiserver`` builds the real one. The convention is envtest's: ``kube-apiserver`` lies in that folder.
"""

from __future__ import annotations

import base64
import json
import os
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self

import psutil
import yaml

from tests.etcds import Etcd, free_port
from tests.guardian import guarded
from tests.serving import ROOT

START_S: Final = 90.0
TOKEN: Final = "admin-of-tests"
CONTROLLER_TOKEN: Final = "controller-of-tests"
#: The user that the controller is.
CONTROLLER: Final = "controller"
CRDS: Final = ROOT / "deploy" / "crds"


def assets() -> Path | None:
    """The folder of the API server's program; None where there is none."""
    folder = os.environ.get("KUBEBUILDER_ASSETS") or str(ROOT / "build" / "kubernetes")
    return Path(folder) if (Path(folder) / "kube-apiserver").exists() else None


def api_server(folder: Path) -> ApiServer:
    """The server that this machine has, not started."""
    return RealApiServer(folder) if assets() is not None else OwnApiServer(folder)


class ApiServer:
    """One server, with an etcd that tests use for their instances.

    Attributes:
        url: where it is.
        kubeconfig: a file by which its administrator reaches it.
        controller_kubeconfig: the same for the controller, which has the rights that are shipped and no others.
        etcd: the etcd.
    """

    scheme = "http"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.etcd = Etcd(folder / "etcd")
        self.port = free_port()
        self.url = f"{self.scheme}://127.0.0.1:{self.port}"
        self.kubeconfig = folder / "kubeconfig"
        self.controller_kubeconfig = folder / "kubeconfig-of-the-controller"
        self.tokens = folder / "tokens.csv"
        self._process: subprocess.Popen[bytes] | None = None
        self.trust = ssl.create_default_context()
        self.trust.check_hostname, self.trust.verify_mode = False, ssl.CERT_NONE

    def command(self) -> list[object]:
        """What starts it."""
        raise NotImplementedError

    def start(self) -> Self:
        """Start it, with the custom resources that are shipped."""
        self.etcd.start()
        self.tokens.write_text(f'{TOKEN},admin,1,"system:masters"\n{CONTROLLER_TOKEN},{CONTROLLER},2\n')
        write_kubeconfig(self.kubeconfig, self.url, TOKEN)
        write_kubeconfig(self.controller_kubeconfig, self.url, CONTROLLER_TOKEN)
        with (self.folder / "apiserver.log").open("wb") as log:
            self._process = guarded(subprocess.Popen(list(map(str, self.command())), stdout=log, stderr=log, cwd=ROOT))
        self._wait()
        for file in sorted(CRDS.glob("*s.yaml")):
            self.define(yaml.safe_load(file.read_text()))
        return self

    @property
    def process(self) -> psutil.Process:
        """Its process."""
        assert self._process is not None
        return psutil.Process(self._process.pid)

    def define(self, definition: Any) -> None:
        """Have custom resources served."""
        self.ask("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", definition)
        spec = definition["spec"]
        self._wait_for(f"/apis/{spec['group']}/{spec['versions'][0]['name']}/{spec['names']['plural']}")

    def stop(self) -> None:
        """End it and its etcd."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self.etcd.kill()

    @cached_property
    def has_cel(self) -> bool:
        """Whether it checks the rules in CEL of custom resources, as servers do since 1.25."""
        return int(self.ask("GET", "/version")["gitVersion"].split(".")[1]) >= 25

    def ask(
        self, method: str, path: str, body: Any = None, content: str = "application/json", token: str = TOKEN
    ) -> Any:
        """One request, of the administrator unless ``token`` is another's; urllib's HTTPError where it is refused."""
        headers = {"Authorization": f"Bearer {token}", "Content-Type": content}
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.url + path, data=data, method=method, headers=headers)
        with urllib.request.urlopen(request, context=self.trust, timeout=30) as answer:
            return json.loads(answer.read() or b"{}")

    def grant(self, namespace: str, *, cluster_scope: bool) -> None:
        """Give the controller the rights that are shipped for a scope, with its own namespace being this one."""
        folder = ROOT / "deploy" / "kustomize"
        for file in (
            folder / "base" / "leader.yaml",
            folder / ("cluster" if cluster_scope else "namespace") / "rbac.yaml",
        ):
            for item in yaml.safe_load_all(file.read_text()):
                kind = item["kind"]
                where = "" if kind.startswith("Cluster") else f"/namespaces/{namespace}"
                if "subjects" in item:
                    item["subjects"] = [{"kind": "User", "name": CONTROLLER}]
                path = f"/apis/rbac.authorization.k8s.io/v1{where}/{kind.lower()}s"
                try:
                    self.ask("POST", path, item)
                except urllib.error.HTTPError as error:
                    if error.code != 409:
                        raise

    def _wait(self) -> None:
        give_up_at = time.monotonic() + START_S
        while time.monotonic() < give_up_at:
            assert self._process is not None
            assert self._process.poll() is None, (self.folder / "apiserver.log").read_text()[-2000:]
            request = urllib.request.Request(self.url + "/readyz", headers={"Authorization": f"Bearer {TOKEN}"})
            try:
                urllib.request.urlopen(request, context=self.trust, timeout=5).close()
            except OSError:
                time.sleep(0.05)
            else:
                return
        raise TimeoutError("the API server did not start")

    def _wait_for(self, path: str) -> None:
        give_up_at = time.monotonic() + START_S
        while time.monotonic() < give_up_at:
            try:
                self.ask("GET", path)
            except urllib.error.HTTPError:
                time.sleep(0.05)
            else:
                return
        raise TimeoutError(f"{path} is not served")


class RealApiServer(ApiServer):
    """Kubernetes' own."""

    scheme = "https"

    def command(self) -> list[object]:
        found = assets()
        assert found is not None
        key = self.folder / "sa.key"
        subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True, timeout=60)
        return [
            found / "kube-apiserver",
            f"--etcd-servers={self.etcd.url}",
            f"--cert-dir={self.folder}",
            f"--secure-port={self.port}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            "--service-cluster-ip-range=10.0.0.0/16",
            f"--token-auth-file={self.tokens}",
            "--authorization-mode=RBAC",
            f"--service-account-issuer={self.url}",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--disable-admission-plugins=ServiceAccount",
            "--allow-privileged=true",
        ]


class OwnApiServer(ApiServer):
    """Ours: :mod:`tests.apiserver`. ``cel`` False is one that is too old for rules in CEL."""

    def __init__(self, folder: Path, *, cel: bool = True) -> None:
        super().__init__(folder)
        self._cel = cel

    def command(self) -> list[object]:
        options = [] if self._cel else ["--without-cel"]
        return [sys.executable, "-m", "tests.apiserver", "--port", self.port, "--tokens", self.tokens, *options]

    def expire(self) -> None:
        """End all watches, and have it know no version of objects older than now."""
        self.ask("POST", "/testing/expire")

    def requests(self, user: str = CONTROLLER) -> dict[str, int]:
        """How often a user has asked so far, by method and plural, as ``GET pods``; watches are ``WATCH pods``."""
        found: dict[str, int] = self.ask("GET", "/testing/requests").get(user, {})
        return found


def write_kubeconfig(file: Path, url: str, token: str) -> None:
    """A kubeconfig for one user of one server."""
    file.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "test", "cluster": {"server": url, "insecure-skip-tls-verify": True}}],
                "users": [{"name": "user", "user": {"token": token}}],
                "contexts": [{"name": "test", "context": {"cluster": "test", "user": "user"}}],
                "current-context": "test",
            }
        )
    )


def secret(namespace: str, name: str, **data: Any) -> dict[str, Any]:
    """A secret; values that are no text are written as JSON."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in data.items()}
    encoded = {key: base64.b64encode(value.encode()).decode() for key, value in texts.items()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": namespace}, "data": encoded}
