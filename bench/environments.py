"""Virtual environments of third-party servers in build/bench/venv-NAME, made when a suite first needs them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from rich.console import Console

from bench.builds import FOLDER, NotMeasured
from bench.processes import ROOT

#: Lies in an environment whose installation is complete, and holds what was asked for.
STAMP: Final = ".made-of"
INSTALL_S: Final = 900.0
MLSERVER: Final = ("mlserver==1.7.1", "mlserver-sklearn==1.7.1", "mlserver-xgboost==1.7.1", "mlserver-lightgbm==1.7.1")
TRITON: Final = ("nvidia-pytriton==0.7.0",)
TORCHSERVE: Final = ("torchserve==0.12.0", "torch-model-archiver==0.12.0", "packaging", "psutil", "PyYAML")
#: What the server may load the same files with. One release everywhere: a pickle belongs to the one that wrote it.
MLSERVER_FRAMEWORKS: Final = ("scikit-learn", "joblib", "xgboost-cpu", "lightgbm")
TRITON_FRAMEWORKS: Final = (*MLSERVER_FRAMEWORKS, "onnxruntime", "openvino", "torch")
#: MLServer's runtime asks for the full package, of the same releases.
FULL_NAMES: Final = {"xgboost-cpu": "xgboost"}


def mlserver(console: Console) -> Path:
    """The environment of MLServer.

    Raises:
        NotMeasured: it cannot be installed here; holds what pip said.
    """
    pins = [FULL_NAMES.get(name, name) + pin for name, pin in _installed(MLSERVER_FRAMEWORKS)]
    return _environment("mlserver", (*MLSERVER, *pins), console)


def triton(console: Console) -> Path:
    """The environment of nvidia-pytriton's tritonserver, its backends beside it with the stub where it looks for it.

    Raises:
        NotMeasured: it cannot be installed here; holds what pip said.
    """
    pins = [name + pin for name, pin in _installed(TRITON_FRAMEWORKS)]
    folder = _environment("triton", (*TRITON, *pins), console)
    stub = folder / "backends" / "python" / "triton_python_backend_stub"
    if not stub.exists():
        bundled = site_packages(folder) / "pytriton" / "tritonserver"
        try:
            shutil.copytree(bundled / "backends", folder / "backends", dirs_exist_ok=True)
            release = f"{sys.version_info.major}.{sys.version_info.minor}"
            shutil.copy2(bundled / "python_backend_stubs" / release / stub.name, stub)
        except OSError as error:
            raise NotMeasured(f"nvidia-pytriton holds no server for this Python: {error}") from error
    return folder


def torchserve(console: Console) -> Path:
    """The environment of TorchServe, which takes torch from here. It needs Java, 11 at least.

    Raises:
        NotMeasured: it cannot be installed here, or there is no Java or torch; holds what pip said.
    """
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        raise NotMeasured("TorchServe needs torch")
    if shutil.which("java") is None:
        raise NotMeasured("TorchServe needs Java: apt-get install openjdk-17-jre-headless")
    folder = _environment("torchserve", TORCHSERVE, console)
    (site_packages(folder) / "torch-from.pth").write_text(str(Path(torch.origin).parents[1]), encoding="utf-8")
    return folder


def site_packages(environment: Path) -> Path:
    """Where an environment keeps its packages."""
    return environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def _installed(packages: Sequence[str]) -> list[tuple[str, str]]:
    """Those of the packages that are installed here, with ``==`` their release (without a local part like +cpu)."""
    found = []
    for name in packages:
        try:
            found.append((name, f"=={version(name).partition('+')[0]}"))
        except PackageNotFoundError:
            continue  # its cases are left out
    return found


def _environment(name: str, packages: Sequence[str], console: Console) -> Path:
    folder = FOLDER / f"venv-{name}"
    stamp = folder / STAMP
    wanted = "\n".join((sys.version, *packages))
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return folder
    console.print(f"installing {packages[0]} into {folder.relative_to(ROOT)}: some minutes, once")
    stamp.unlink(missing_ok=True)
    _run(name, sys.executable, "-m", "venv", str(folder))
    pip = (str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--quiet")
    _run(name, *pip, "install", *packages)
    stamp.write_text(wanted, encoding="utf-8")
    return folder


def _run(name: str, *argv: str) -> None:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=INSTALL_S)
    except (OSError, subprocess.TimeoutExpired) as failure:
        raise NotMeasured(f"{name} cannot be installed: {failure}") from failure
    if done.returncode:
        raise NotMeasured(f"{name} cannot be installed: {(done.stderr or done.stdout).strip()[-800:]}")


if __name__ == "__main__":
    # What the tests call, made beforehand: an installation of minutes is no part of a test.
    for make in (mlserver, triton, *((torchserve,) if shutil.which("java") else ())):
        make(Console())
