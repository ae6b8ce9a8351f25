"""Starts MLServer as its documentation says, models in its own process, adaptive batching on.

    python -m bench.peers.mlserver ENVIRONMENT MODEL …
    python -m bench.peers.mlserver ENVIRONMENT --repository DIR

ENVIRONMENT is the folder of its virtual environment, each MODEL the JSON of a ``ServedModel``. With a repository it
loads what it is told to load from there.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from bench.peers.served import ServedModel, free_ports, keep

#: Those that it has a runtime for; the identity's is ours (mlserver_identity.py).
IMPLEMENTATIONS: Final = {
    "identity": "bench.peers.mlserver_identity.Identity",
    "sklearn": "mlserver_sklearn.SKLearnModel",
    "xgboost": "mlserver_xgboost.XGBoostModel",
    "lightgbm": "mlserver_lightgbm.LightGBMModel",
}
#: Adaptive batching: as many as may come together from 64 callers, and how long the first of them waits for others.
MAX_BATCH_SIZE: Final = 64
MAX_BATCH_TIME_S: Final = 0.001


def server_settings(http_port: int, grpc_port: int, metrics_port: int) -> dict[str, object]:
    """``settings.json``."""
    return {
        "host": "127.0.0.1",
        "http_port": http_port,
        "grpc_port": grpc_port,
        "metrics_port": metrics_port,
        "parallel_workers": 0,
        "debug": False,
    }


def model_settings(model: ServedModel) -> dict[str, object]:
    """``model-settings.json`` of one model.

    Raises:
        KeyError: MLServer has no runtime for its framework.
    """
    return {
        "name": model.name,
        "implementation": IMPLEMENTATIONS[model.framework],
        "max_batch_size": MAX_BATCH_SIZE,
        "max_batch_time": MAX_BATCH_TIME_S,
        "parameters": {"uri": model.path},
    }


def main(environment: str, models: Sequence[ServedModel], repository: str | None = None) -> None:
    """Write the folder of models, or take ``repository`` for one, and serve it until ended."""
    http_port, grpc_port, metrics_port = free_ports(3)
    settings = {**server_settings(http_port, grpc_port, metrics_port), "load_models_at_startup": repository is None}
    with tempfile.TemporaryDirectory(prefix="mmcore-bench-mlserver-") as made:
        name = repository or made
        folder = Path(name)
        (folder / "settings.json").write_text(json.dumps(settings))
        for model in models:
            (folder / model.name).mkdir()
            (folder / model.name / "model-settings.json").write_text(json.dumps(model_settings(model)))
        keep(
            [str(Path(environment) / "bin" / "mlserver"), "start", name],
            {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"},
            grpc_port,
            http_port,
            models,
        )


if __name__ == "__main__":
    if sys.argv[2:3] == ["--repository"]:
        main(sys.argv[1], (), sys.argv[3])
    else:
        main(sys.argv[1], [ServedModel.from_json(text) for text in sys.argv[2:]])
