"""What is imported, and when: frameworks wait until a model needs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import mmcore

SDKS = {"azure", "boto3", "botocore", "requests", "urllib3"}
FRAMEWORKS = {"joblib", "lightgbm", "onnxruntime", "pandas", "scipy", "sklearn", "skops", "xgboost"}
NEVER = {"grpc", "tritonclient", "tests", "bench"}


@pytest.mark.parametrize("module", ["mmcore.cli.main", "mmcore.server.node", "mmcore.runtimes", "mmcore.storage"])
def test_no_framework_is_imported_before_a_model_needs_it(module: str) -> None:
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not set(loaded) & (FRAMEWORKS | SDKS | NEVER)


def test_google_auth_is_imported_by_one_provider_alone() -> None:
    """The import rules cannot say so: protobuf lives in the same package."""
    package = Path(mmcore.__file__).parent
    users = [path.name for path in package.rglob("*.py") if "google.auth" in path.read_text()]
    assert users == ["gcs.py"]
