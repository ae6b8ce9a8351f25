"""Real Kubernetes API servers for tests, where ``KUBEBUILDER_ASSETS`` names the folder of their programs.

``make kube-apiserver`` builds one. The convention is envtest's: ``kube-apiserver`` and ``etcd`` lie in that folder.
"""

from __future__ import annotations

import base64
import json
import os
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Final

import yaml

from tests.etcds import Etcd, free_port
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


class RealApiServer:
    """One server with an etcd of its own.

    Attributes:
        url: where it is.
        kubeconfig: a file by which its administrator reaches it.
        controller_kubeconfig: the same for the controller, which has the rights that are shipped and no others.
        etcd: the etcd, which tests use for their instances as well.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.etcd = Etcd(folder / "etcd")
        self.url = f"https://127.0.0.1:{free_port()}"
        self.kubeconfig = folder / "kubeconfig"
        self.controller_kubeconfig = folder / "kubeconfig-of-the-controller"
        self._process: subprocess.Popen[bytes] | None = None
        self._trust = ssl.create_default_context()
        self._trust.check_hostname, self._trust.verify_mode = False, ssl.CERT_NONE

    def start(self) -> RealApiServer:
        found = assets()
        assert found is not None
        self.etcd.start()
        key, tokens = self._folder / "sa.key", self._folder / "tokens.csv"
        subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
        tokens.write_text(f'{TOKEN},admin,1,"system:masters"\n{CONTROLLER_TOKEN},{CONTROLLER},2\n')
        write_kubeconfig(self.kubeconfig, self.url, TOKEN)
        write_kubeconfig(self.controller_kubeconfig, self.url, CONTROLLER_TOKEN)
        port = self.url.rpartition(":")[2]
        command = [
            found / "kube-apiserver",
            f"--etcd-servers={self.etcd.url}",
            f"--cert-dir={self._folder}",
            f"--secure-port={port}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            "--service-cluster-ip-range=10.0.0.0/24",
            f"--token-auth-file={tokens}",
            "--authorization-mode=RBAC",
            f"--service-account-issuer={self.url}",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--disable-admission-plugins=ServiceAccount",
            "--allow-privileged=true",
        ]
        with (self._folder / "apiserver.log").open("wb") as log:
            self._process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
        self._wait()
        for file in sorted(CRDS.glob("*s.yaml")):
            self.ask(
                "POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", yaml.safe_load(file.read_text())
            )
        for file in sorted(CRDS.glob("*s.yaml")):
            self._wait_for(f"/apis/serving.kserve.io/{version_of(file)}/{file.stem}")
        return self

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self.etcd.kill()

    def ask(self, method: str, path: str, body: Any = None, content: str = "application/json") -> Any:
        """One request as the administrator; urllib's HTTPError otherwise."""
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": content}
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.url + path, data=data, method=method, headers=headers)
        with urllib.request.urlopen(request, context=self._trust, timeout=30) as answer:
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
            assert self._process.poll() is None, (self._folder / "apiserver.log").read_text()[-2000:]
            request = urllib.request.Request(self.url + "/readyz", headers={"Authorization": f"Bearer {TOKEN}"})
            try:
                urllib.request.urlopen(request, context=self._trust, timeout=5).close()
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


def version_of(file: Path) -> str:
    """The version of a custom resource's file."""
    return str(yaml.safe_load(file.read_text())["spec"]["versions"][0]["name"])


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
