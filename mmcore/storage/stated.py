"""What a model's settings files may state, and the checks that all of those files share.

Each kind of file is read by its own module into a :class:`Stated`; a later one is laid over an earlier one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

from mmcore.errors import InvalidModel
from mmcore.model import NUMPY_DTYPES, Batching, ModelSettings, TensorSpec, Warmup

#: Names under which other servers know our formats.
FORMAT_ALIASES: Final = {
    "joblib": "sklearn",
    "keras": "tensorflow",
    "mmcore_python": "python",
    "onnxruntime": "onnx",
    "openvino_ir": "openvino",
    "pytorch": "torchscript",
    "scikit-learn": "sklearn",
}

#: Inferences of one model that may run at once; it is threads or processes that they take.
MOST_INSTANCES: Final = 256

#: Where a model may ask to be run.
ISOLATIONS: Final = ("none", "process")


@dataclass(frozen=True, slots=True)
class VersionPolicy:
    """Which of the version folders are served: the ``latest`` so many, the ``specific`` ones, or all with neither."""

    latest: int | None = None
    specific: frozenset[str] | None = None

    def allowed(self, versions: Iterable[str]) -> list[str]:
        """Those of ``versions``, numbers as text, that are served; ascending."""
        ascending = sorted(versions, key=int)
        if self.specific is not None:
            return [version for version in ascending if version in self.specific]
        return ascending[-self.latest :] if self.latest is not None else ascending


@dataclass(frozen=True, slots=True)
class Stated:
    """What settings files say; None or empty where they are silent.

    Attributes:
        name: the model's name, when it is not its folder's.
        format: one of our formats' names, lower case.
        version: the version of a folder without version folders.
        file: the model's file or folder, relative to the version folder.
    """

    name: str | None = None
    format: str | None = None
    version: str | None = None
    file: str | None = None
    max_batch_size: int | None = None
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    execution: str | None = None
    size_bytes: int | None = None
    device_bytes: int | None = None
    preload: bool | None = None
    pinned: bool | None = None
    min_residency_s: float | None = None
    idle_timeout_s: float | None = None
    isolation: str | None = None
    isolation_memory_bytes: int | None = None
    isolation_cpus: int | None = None
    timeout_s: float | None = None
    policy: VersionPolicy | None = None
    merges: bool | None = None
    instances: int | None = None
    batching: Batching | None = None
    warmups: tuple[Warmup, ...] = ()
    response_cache: bool | None = None

    def over(self, below: Stated) -> Stated:
        """This laid over ``below``: what is stated here wins, free parameters and labels are joined."""
        stated = {
            one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) not in (None, ())
        }
        stated["labels"] = {**below.labels, **self.labels}
        stated["parameters"] = {**below.parameters, **self.parameters}
        return replace(below, **stated)

    def settings(self) -> ModelSettings:
        """The part that a runtime and the service see."""
        return ModelSettings(
            max_batch_size=self.max_batch_size or 0,
            inputs=self.inputs,
            outputs=self.outputs,
            labels=dict(self.labels),
            parameters=dict(self.parameters),
            execution=self.execution or "auto",
            size_bytes=self.size_bytes,
            device_bytes=self.device_bytes or 0,
            preload=bool(self.preload),
            pinned=bool(self.pinned),
            min_residency_s=self.min_residency_s,
            idle_timeout_s=self.idle_timeout_s,
            isolation=self._isolation(),
            isolation_memory_bytes=self.isolation_memory_bytes,
            isolation_cpus=self.isolation_cpus,
            timeout_s=self.timeout_s,
            merges=self.merges,
            instances=self.instances or 0,
            batching=self.batching or Batching(),
            warmups=self.warmups,
            response_cache=bool(self.response_cache),
        )

    def _isolation(self) -> str:
        """As stated, or as one of the free parameters, which is where files of other servers have room for it."""
        stated = self.isolation or self.parameters.get("isolation", ISOLATIONS[0])
        if stated not in ISOLATIONS:
            raise InvalidModel(f"isolation: expected one of {', '.join(ISOLATIONS)}, got '{stated}'")
        return stated


class Reader:
    """Takes typed values out of one settings file's mapping, and names file and field when they are wrong."""

    def __init__(self, values: object, file: str, at: str = "") -> None:
        if not isinstance(values, dict):
            where = f"{file}: {at.rstrip('.')}" if at else file
            raise InvalidModel(f"{where}: expected a mapping, got {_kind(values)}")
        self.values: dict[str, Any] = values
        self._file = file
        self._at = at

    def where(self, key: str) -> str:
        """File and full name of a field, as error texts begin."""
        return f"{self._file}: {self._at}{key}"

    def only(self, known: Iterable[str]) -> None:
        """Refuse fields that nobody would read: they are mistyped."""
        unknown = sorted(str(key) for key in self.values.keys() - set(known))
        if unknown:
            raise InvalidModel(f"{self.where(unknown[0])}: no such setting; known are {', '.join(sorted(known))}")

    def text(self, key: str) -> str | None:
        """A text that is not empty, or None where the field is absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, str) or not value:
            raise InvalidModel(f"{self.where(key)}: expected a text, got {_kind(value)}")
        return value

    def count(self, key: str) -> int | None:
        """A whole number of at least zero, or None where the field is absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise InvalidModel(f"{self.where(key)}: expected a whole number from 0 on, got {value!r}")
        return value

    def switch(self, key: str) -> bool | None:
        """A boolean, or None where the field is absent."""
        value = self.values.get(key)
        if value is None or isinstance(value, bool):
            return value
        raise InvalidModel(f"{self.where(key)}: expected true or false, got {value!r}")

    def mapping(self, key: str) -> Reader:
        """The mapping of that name, empty where the field is absent."""
        value = self.values.get(key)
        return Reader({} if value is None else value, self._file, f"{self._at}{key}.")

    def readers(self, key: str) -> list[Reader]:
        """A list of mappings, empty where the field is absent."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise InvalidModel(f"{self.where(key)}: expected a list, got {_kind(value)}")
        return [Reader(one, self._file, f"{self._at}{key}[{index}].") for index, one in enumerate(value)]

    def tensors(self, key: str) -> tuple[TensorSpec, ...]:
        """A list of tensors, each with name, V2 datatype and full shape."""
        return tuple(one.tensor() for one in self.readers(key))

    def tensor(self) -> TensorSpec:
        """This mapping as a tensor: name, V2 datatype, and the full shape with -1 for free dimensions."""
        name, stated = self.text("name"), self.text("datatype")
        if name is None or stated is None:
            raise InvalidModel(f"{self.where('name' if name is None else 'datatype')}: is missing")
        datatype = "BYTES" if stated.upper() == "STRING" else stated.upper()
        if datatype not in NUMPY_DTYPES:
            raise InvalidModel(
                f"{self.where('datatype')}: '{stated}' is not a datatype; known are {', '.join(NUMPY_DTYPES)}"
            )
        shape = self.values.get("shape")
        if not isinstance(shape, list) or not all(type(one) is int and one >= -1 for one in shape):
            raise InvalidModel(f"{self.where('shape')}: expected a list of whole numbers from -1 on, got {shape!r}")
        return TensorSpec(name, datatype, tuple(shape))

    def texts(self, key: str) -> dict[str, str]:
        """A mapping of free parameters, as text: what is no text is written as JSON."""
        value = self.mapping(key).values
        return {
            str(one): stated if isinstance(stated, str) else json.dumps(stated, default=str)
            for one, stated in value.items()
        }


def known_format(stated: str) -> str:
    """Our name of a format stated in a settings file: lower case, without the version after a colon."""
    name = stated.lower().partition(":")[0]
    return FORMAT_ALIASES.get(name, name)


def _kind(value: object) -> str:
    if value is None or value == "":
        return "nothing"
    return {dict: "a mapping", list: "a list", str: "a text", bool: "a boolean"}.get(type(value), repr(value))
