"""A model folder's own settings, each file winning over those before it.

They are ``config.pbtxt``, ``model-settings.json``, the archived stack's ``_schema.json`` and ``mmcore.yaml``.

It reads and checks what they state; which files are the model is ``layout``'s to find.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import yaml

from mmcore.config import parse_duration, parse_size
from mmcore.errors import InvalidModel
from mmcore.model import Batching, QueuePolicy
from mmcore.storage.config_pbtxt import CONFIG_PBTXT, read_config_pbtxt
from mmcore.storage.containment import inside
from mmcore.storage.stated import ISOLATIONS, MOST_INSTANCES, Reader, Stated, known_format

MODEL_SETTINGS: Final = "model-settings.json"
SCHEMA: Final = "_schema.json"
MMCORE_YAML: Final = "mmcore.yaml"
SETTINGS_FILES: Final = frozenset({CONFIG_PBTXT, MODEL_SETTINGS, SCHEMA, MMCORE_YAML})

#: Settings are small; what is larger is no settings file.
LIMIT_BYTES: Final = 4 * 2**20
EXECUTIONS: Final = ("auto", "inline", "thread")

#: MLServer's runtime classes, by the package they come from.
_IMPLEMENTATIONS: Final = {
    "mlserver_sklearn": "sklearn",
    "mlserver_xgboost": "xgboost",
    "mlserver_lightgbm": "lightgbm",
    "mlserver_onnx": "onnx",
    "mlserver_catboost": "catboost",
    "mlserver_mlflow": "mlflow",
    "mlserver_mllib": "mllib",
    "mlserver_huggingface": "huggingface",
}
_YAML_FIELDS: Final = (
    *("name", "format", "version", "file", "max_batch_size", "inputs", "outputs"),
    *("device_bytes", "preload", "pinned", "min_residency", "idle_timeout"),
    *("execution", "size_bytes", "isolation", "isolation_memory", "isolation_cpus", "timeout"),
    *("parameters", "max_queue_delay_us", "queue_limit", "response_cache", "instances"),
)


def read_settings(folder: Path) -> Stated:
    """What the settings files in ``folder`` state together; nothing when there are none.

    Raises:
        InvalidModel: a file cannot be read as what its name says, or a field is wrong; the text names both.
    """
    stated = Stated()
    for name, read in (
        (CONFIG_PBTXT, read_config_pbtxt),
        (MODEL_SETTINGS, _read_model_settings),
        (SCHEMA, _read_schema),
        (MMCORE_YAML, _read_mmcore_yaml),
    ):
        if (folder / name).is_file():
            stated = read(_text(inside(folder, name, name)), folder).over(stated)
            if name == SCHEMA and stated.max_batch_size:
                _check_batched(stated)
    return stated


def read_schema(file: Path) -> Stated:
    """What a schema states that is not in the model's folder; raises as :func:`read_settings` does."""
    return _read_schema(_text(file), file.parent)


def _check_batched(stated: Stated) -> None:
    """The archived stack's rule for a schema beside a config.pbtxt: shapes are whole, the batch dimension included."""
    for spec in (*stated.inputs, *stated.outputs):
        if spec.shape[:1] != (-1,):
            raise InvalidModel(
                f"{SCHEMA}: '{spec.name}': its first dimension must be -1, for {CONFIG_PBTXT} states max_batch_size"
            )


def _text(file: Path) -> str:
    try:
        if file.stat().st_size > LIMIT_BYTES:
            raise InvalidModel(f"{file.name}: is longer than {LIMIT_BYTES} bytes")
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidModel(f"{file.name}: is not UTF-8 text") from error
    except OSError as error:
        raise InvalidModel(f"{file.name}: cannot be read: {error.strerror}") from error


def _read_model_settings(text: str, folder: Path) -> Stated:
    """MLServer's ``model-settings.json`` (its documentation, "Model Settings")."""
    reader = _json(text, MODEL_SETTINGS)
    parameters = reader.mapping("parameters")
    uri = parameters.text("uri")
    if uri is not None:
        if "://" in uri:
            raise InvalidModel(f"{parameters.where('uri')}: '{uri}' is remote; only the model's folder is read")
        inside(folder, uri, parameters.where("uri"))
    return Stated(
        name=reader.text("name"),
        format=_implemented(reader, reader.text("implementation")),
        version=parameters.text("version"),
        file=uri,
        inputs=reader.tensors("inputs"),
        outputs=reader.tensors("outputs"),
        parameters=parameters.texts("extra"),
    )


def _read_schema(text: str, folder: Path) -> Stated:
    """The archived stack's schema of a model (ModelMesh Serving's documentation, "Model Schema")."""
    del folder
    reader = _json(text, SCHEMA)
    reader.only(("inputs", "outputs"))
    return Stated(inputs=reader.tensors("inputs"), outputs=reader.tensors("outputs"))


def _json(text: str, file: str) -> Reader:
    try:
        return Reader(json.loads(text), file)
    except (ValueError, RecursionError) as error:
        raise InvalidModel(f"{file}: is not JSON: {error}") from error


def _implemented(reader: Reader, implementation: str | None) -> str | None:
    if implementation is None:
        return None
    known = _IMPLEMENTATIONS.get(implementation.partition(".")[0].replace("-", "_"))
    if known is None:
        raise InvalidModel(
            f"{reader.where('implementation')}: '{implementation}' is a runtime class of its own; "
            f"write it as a model.py instead. Known are {', '.join(_IMPLEMENTATIONS)}"
        )
    return known


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: a few of them within each other stand for more than memory holds, or for themselves."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """The next node."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not taken")
        return super().compose_node(parent, index)


def _read_mmcore_yaml(text: str, folder: Path) -> Stated:
    try:
        values = yaml.load(text, _PlainLoader)  # noqa: S506  # a SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, TypeError, AttributeError) as error:
        # The last four come of values that are not what their tag says.
        raise InvalidModel(f"{MMCORE_YAML}: is not YAML: {' '.join(str(error).split())}") from error
    reader = Reader({} if values is None else values, MMCORE_YAML)
    reader.only(_YAML_FIELDS)
    file, stated_format, execution = reader.text("file"), reader.text("format"), reader.text("execution")
    if file is not None:
        inside(folder, file, reader.where("file"))
    if execution is not None and execution not in EXECUTIONS:
        raise InvalidModel(f"{reader.where('execution')}: expected one of {', '.join(EXECUTIONS)}, got '{execution}'")
    most_rows = reader.count("max_batch_size")
    version = reader.values.get("version")
    if type(version) is int:
        reader.values["version"] = str(version)
    return Stated(
        name=reader.text("name"),
        format=known_format(stated_format) if stated_format else None,
        version=reader.text("version"),
        file=file,
        max_batch_size=most_rows,
        inputs=reader.tensors("inputs"),
        outputs=reader.tensors("outputs"),
        labels=_labels(reader),
        parameters=reader.texts("parameters"),
        execution=execution,
        size_bytes=_size(reader, "size_bytes"),
        device_bytes=0 if reader.values.get("device_bytes") == 0 else _size(reader, "device_bytes"),
        preload=_flag(reader, "preload"),
        pinned=_flag(reader, "pinned"),
        min_residency_s=_duration(reader, "min_residency"),
        idle_timeout_s=_duration(reader, "idle_timeout", zero=True),
        isolation=_isolation(reader),
        isolation_memory_bytes=_size(reader, "isolation_memory"),
        isolation_cpus=_cpus(reader),
        timeout_s=_duration(reader, "timeout"),
        merges=None if most_rows is None else most_rows > 0,
        instances=_instances(reader),
        batching=_batching(reader),
        response_cache=reader.switch("response_cache"),
    )


def _batching(reader: Reader) -> Batching | None:
    delay_us, limit = reader.count("max_queue_delay_us"), reader.count("queue_limit")
    if delay_us is None and limit is None:
        return None
    return Batching(delay_us=delay_us or 0, policy=QueuePolicy(limit=limit or 0))


def _instances(reader: Reader) -> int | None:
    stated = reader.count("instances")
    if stated is not None and not 1 <= stated <= MOST_INSTANCES:
        raise InvalidModel(f"{reader.where('instances')}: must be from 1 to {MOST_INSTANCES}, got {stated}")
    return stated


def _cpus(reader: Reader) -> int | None:
    stated = reader.count("isolation_cpus")
    if stated == 0:
        raise InvalidModel(f"{reader.where('isolation_cpus')}: must be at least 1, got 0")
    return stated


def _labels(reader: Reader) -> dict[str, tuple[str, ...]]:
    """The class labels written with the outputs, as lists."""
    labels: dict[str, tuple[str, ...]] = {}
    for output in reader.readers("outputs"):
        stated = output.values.get("labels")
        if stated is None:
            continue
        if not isinstance(stated, list) or not all(isinstance(one, str | int) for one in stated):
            raise InvalidModel(f"{output.where('labels')}: expected a list of texts")
        labels[output.tensor().name] = tuple(str(one) for one in stated)
    return labels


def _isolation(reader: Reader) -> str | None:
    stated = reader.text("isolation")
    if stated is not None and stated not in ISOLATIONS:
        raise InvalidModel(f"{reader.where('isolation')}: expected one of {', '.join(ISOLATIONS)}, got '{stated}'")
    return stated


def _size(reader: Reader, key: str) -> int | None:
    stated = reader.values.get(key)
    if stated is None:
        return None
    if isinstance(stated, str | int) and not isinstance(stated, bool):
        try:
            return parse_size(str(stated))
        except ValueError as error:
            raise InvalidModel(f"{reader.where(key)}: {error}") from error
    raise InvalidModel(f"{reader.where(key)}: expected a size such as 64MiB, got {stated!r}")


def _flag(reader: Reader, key: str) -> bool | None:
    stated = reader.values.get(key)
    if stated is not None and not isinstance(stated, bool):
        raise InvalidModel(f"{reader.where(key)}: expected true or false, got {stated!r}")
    return stated


def _duration(reader: Reader, key: str, *, zero: bool = False) -> float | None:
    stated = reader.values.get(key)
    if stated is None:
        return None
    if isinstance(stated, str | int | float) and not isinstance(stated, bool):
        try:
            seconds = parse_duration(str(stated))
        except ValueError as error:
            raise InvalidModel(f"{reader.where(key)}: {error}") from error
        if seconds > 0 or (zero and seconds == 0):
            return seconds
    raise InvalidModel(f"{reader.where(key)}: expected a time such as 30s, got {stated!r}")
