"""How MLServer wants a model: a folder with ``model-settings.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from mmcore.adapters.schema import read_tensors
from mmcore.errors import InvalidModel

_SETTINGS: Final = "model-settings.json"
_IMPLEMENTATIONS: Final = {
    "lightgbm": "mlserver_lightgbm.LightGBMModel",
    "mllib": "mlserver_mllib.MLlibModel",
    "sklearn": "mlserver_sklearn.SKLearnModel",
    "xgboost": "mlserver_xgboost.XGBoostModel",
}


def lay_out(folder: Path, name: str, kind: str, path: Path, schema: Path | None) -> None:
    """Link the model's files into ``folder`` and write its settings, over its own where it has some.

    A type that is not known is left to the server's own default (``MLSERVER_MODEL_IMPLEMENTATION``).

    Raises:
        InvalidModel: its settings or its schema cannot be read.
    """
    settings: dict[str, Any] = {}
    if path.is_dir() and (path / _SETTINGS).is_file():
        settings = _read(path / _SETTINGS)
        for entry in path.iterdir():
            if entry.name != _SETTINGS:
                (folder / entry.name).symlink_to(entry)
        parameters = settings.setdefault("parameters", {})
        if not isinstance(parameters, dict):
            raise InvalidModel(f"{_SETTINGS}: 'parameters' must be an object")
        uri = parameters.get("uri")
        if isinstance(uri, str) and "://" not in uri:
            parameters["uri"] = str(_inside(folder, uri))
    else:
        link = folder / path.name
        link.symlink_to(path)
        settings["parameters"] = {"uri": str(_only_file(link))}
        if kind in _IMPLEMENTATIONS:
            settings["implementation"] = _IMPLEMENTATIONS[kind]
    settings["name"] = name
    if schema is not None:
        settings.update(read_tensors(schema))
    (folder / _SETTINGS).write_text(json.dumps(settings), encoding="utf-8")


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise InvalidModel(f"{_SETTINGS} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidModel(f"{_SETTINGS} is no JSON object")
    return content


def _inside(folder: Path, uri: str) -> Path:
    """A path that the model's settings name, which must stay in its folder."""
    if Path(uri).is_absolute() or ".." in Path(uri).parts:
        raise InvalidModel(f"{_SETTINGS}: 'uri' leads out of the model's folder: {uri!r}")
    return folder / uri


def _only_file(path: Path) -> Path:
    """The file of a folder that holds it alone, whatever its name; MLServer itself knows some names only."""
    if path.is_dir():
        entries = [entry for entry in path.iterdir() if not entry.name.startswith("_")]
        if len(entries) == 1 and entries[0].is_file():
            return entries[0]
    return path
