"""The records of the registry and their stored form: small JSON objects, one for each model, vmodel and instance.

Fields at their defaults are left out. Fields that this version does not know are kept in ``extra`` and written back, so
that instances of different versions can share a registry. Times are milliseconds since the epoch, for people and for
ages; nothing expires by them.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Final, TypeVar, cast

from mmcore.errors import MmcoreError, Status

R = TypeVar("R", bound="Record")


class CorruptRecord(MmcoreError):
    """What the registry holds under an id is no record of its kind; the text tells the id and the field."""

    status = Status.INTERNAL


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What all records have: ``extra``, the fields that a newer version wrote."""

    extra: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CopyRecord(Record):
    """One copy of a model: where it stands (``LOADING``, ``LOADED``, as cache.CopyState names it) and since when."""

    state: str = ""
    since_ms: int = 0


@dataclass(frozen=True, slots=True)
class FailureRecord(Record):
    """The last failed load of a model on one instance, and why."""

    at_ms: int = 0
    message: str = ""


@dataclass(frozen=True, slots=True)
class LossRecord(Record):
    """An instance that ended while it loaded a model: when, and how many models it was loading, this one included.

    0 loads: it answered a request for this one alone.
    """

    at_ms: int = 0
    loads: int = 0


@dataclass(frozen=True, slots=True)
class ModelRecord(Record):
    """A registered model.

    Attributes:
        type, path, key: as registered; the key is a JSON text of its own.
        copies, failures: by instance.
        losses: the instances that ended while they loaded it, or answered a request for it.
        size_bytes: what a copy takes, as measured where one was loaded last; 0 while none was.
        references: vmodels that have it as their active or target model.
        auto_delete: whether it goes with its last reference.
        last_used_ms: written rarely; instances know better for the copies they hold.
        min_copies, max_copies: bounds on its copies; 0 for none.
        everywhere: whether there is to be a copy at each instance that may host it.
        static: the file of static models that alone has registered it; empty where somebody else has.
    """

    type: str = ""
    path: str = ""
    key: str = ""
    copies: dict[str, CopyRecord] = field(default_factory=dict, metadata={"of": CopyRecord})
    failures: dict[str, FailureRecord] = field(default_factory=dict, metadata={"of": FailureRecord})
    losses: dict[str, LossRecord] = field(default_factory=dict, metadata={"of": LossRecord})
    size_bytes: int = 0
    references: int = 0
    auto_delete: bool = False
    last_used_ms: int = 0
    min_copies: int = 0
    max_copies: int = 0
    everywhere: bool = False
    static: str = ""


@dataclass(frozen=True, slots=True)
class VModelRecord(Record):
    """A name that stands for the model ``active``, and is to stand for ``target``.

    ``failed`` tells that the target could not be loaded; the transition goes on when that changes. ``static`` is the
    file of static models that alone has set it; empty where somebody else has.
    """

    owner: str = ""
    active: str = ""
    target: str = ""
    failed: bool = False
    static: str = ""


@dataclass(frozen=True, slots=True)
class InstanceRecord(Record):
    """What the others know of an instance.

    Attributes:
        address: where it takes forwarded requests.
        started_ms, version: of its process and its program.
        location, zone, labels: where it runs (a host, a failure domain), and what it is fit for.
        capacity_bytes, used_bytes, models: its memory for models, what of it is taken, and by how many.
        fixed_bytes, unloading_bytes: what of it cannot be evicted now, and what is given up and not free yet.
        oldest_used_ms: when its least recently used copy was last used; 0 when it holds none.
        loading, loader_threads: loads queued and running, and how many may run at once.
        requests_per_minute, in_flight: its load.
        draining: whether it is leaving and takes no new copies.
        published_ms: when this record was made, by the instance's clock.
    """

    address: str = ""
    started_ms: int = 0
    version: str = ""
    location: str = ""
    zone: str = ""
    labels: tuple[str, ...] = ()
    capacity_bytes: int = 0
    used_bytes: int = 0
    fixed_bytes: int = 0
    unloading_bytes: int = 0
    models: int = 0
    oldest_used_ms: int = 0
    loading: int = 0
    loader_threads: int = 0
    requests_per_minute: int = 0
    in_flight: int = 0
    draining: bool = False
    published_ms: int = 0


_EXTRA: Final = "extra"


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


#: Python's own takes NaN and infinities, which no other reader of a registry does.
_DECODER: Final = json.JSONDecoder(parse_constant=_no_constant)


def encode(record: Record) -> bytes:
    """The stored form: compact JSON, UTF-8."""
    return json.dumps(_plain(record), separators=(",", ":"), ensure_ascii=False).encode()


def decode(kind: type[R], name: str, value: bytes) -> R:
    """The record of the id ``name``.

    Raises:
        CorruptRecord: the value is no JSON object, or a field has another type.
    """
    try:
        content = _DECODER.decode(value.decode())
        if b"\\u" in value:
            # Half of a pair of surrogates is no text: neither a message of protobuf nor this record could be written.
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CorruptRecord(f"the registry's {kind.__name__} of '{name}' is not JSON: {error}") from None
    return _record(kind, name, content)


def _default(one: Field[object]) -> object:
    return one.default if one.default_factory is MISSING else one.default_factory()


#: By kind and field: its default, and the kind of record that a mapping holds.
_FIELDS: Final[dict[type[Record], dict[str, tuple[object, type[Record] | None]]]] = {
    kind: {one.name: (_default(one), one.metadata.get("of")) for one in fields(kind) if one.name != _EXTRA}
    for kind in (CopyRecord, FailureRecord, LossRecord, ModelRecord, VModelRecord, InstanceRecord)
}


def _plain(record: Record) -> dict[str, object]:
    content = dict(record.extra)
    for name, (default, of) in _FIELDS[type(record)].items():
        value = getattr(record, name)
        if value != default:
            content[name] = {key: _plain(one) for key, one in value.items()} if of else value
    return content


def _record(kind: type[R], name: str, content: object) -> R:
    if not isinstance(content, dict):
        raise CorruptRecord(f"the registry's {kind.__name__} of '{name}' is no JSON object")
    values: dict[str, object] = {}
    for key, (default, of) in _FIELDS[kind].items():
        if key not in content:
            continue
        value = content.pop(key)
        if isinstance(default, tuple) and isinstance(value, list):
            value = tuple(value)
        if type(value) is not type(default):
            raise CorruptRecord(
                f"the registry's {kind.__name__} of '{name}': {key} is a {type(value).__name__}, "
                f"not a {type(default).__name__}"
            )
        values[key] = (
            {each: _record(of, name, one) for each, one in cast(dict[str, object], value).items()} if of else value
        )
    if content:
        values[_EXTRA] = content
    return kind(**values)  # type: ignore[arg-type]  # checked against the defaults above
