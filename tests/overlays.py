"""What ``deploy/`` makes: kustomize's overlays and the Helm chart, by the programs that users have."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_python import Chart, disable_logging

from mmcore.controller.objects import Object
from tests.serving import ROOT

CHART = ROOT / "deploy/helm"


def kustomized(folder: Path | str) -> list[Object]:
    """The objects of ``deploy/FOLDER``; skips the test where there is neither kustomize nor kubectl."""
    return _kustomized(ROOT / "deploy" / folder)


@functools.cache
def _kustomized(folder: Path) -> list[Object]:
    if program := shutil.which("kustomize"):
        call = [program, "build", str(folder)]
    elif program := shutil.which("kubectl"):
        call = [program, "kustomize", str(folder)]
    else:
        pytest.skip("neither kustomize nor kubectl is installed")
    done = subprocess.run(call, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [item for item in yaml.safe_load_all(done.stdout) if item]


def charted(values: dict[str, Any] | None = None, namespace: str = "model-serving") -> list[Object]:
    """The objects of the Helm chart, without the custom resources, which Helm installs by itself."""
    disable_logging()
    with Chart.load(CHART) as chart:
        rendered = chart.render(values, name="mmcore", namespace=namespace)
    texts = [text for name, text in rendered.items() if name.endswith(".yaml")]
    return [item for text in texts for item in yaml.safe_load_all(text) if item]


def named(items: list[Object]) -> dict[tuple[str, str], Object]:
    """Objects by kind and name; two with the same fail."""
    found = {(item["kind"], item["metadata"]["name"]): item for item in items}
    assert len(found) == len(items)
    return found
