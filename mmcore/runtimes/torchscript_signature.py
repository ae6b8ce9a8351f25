"""Which tensor of a request is which argument of a TorchScript module's ``forward``, and likewise for its answer.

A module says how many tensors it takes and answers, and nothing of their names, datatypes and shapes. Those come from
the settings, under the conventions of Triton's users (its model configuration, "Inputs and Outputs"): names are those
of ``forward``'s arguments, or end in an index (``INPUT__0``), or else stand in the order of the arguments. Without
settings they are ``INPUT__0``, …, ``OUTPUT__0``, …, of any shape. A dictionary's tensors have its keys' names.

Schemas and nodes are PyTorch's own, looked at through their methods: this module imports no framework.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from mmcore.errors import LoadFailed
from mmcore.model import TensorSpec
from mmcore.runtimes.declared import check_datatypes

_INDEXED: Final = re.compile(r".*__([0-9]+)")
_DECLARE: Final = "in config.pbtxt, _schema.json or mmcore.yaml"


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs of a module.

    Attributes:
        specs: names, datatypes and shapes.
        declared: whether the settings state them; else any datatype and shape will do.
        order: for each argument the input's name, or None for an optional one that is left out.
        collected: whether ``forward`` takes them one by one (None), or all in one ``list`` or ``dict``.
    """

    specs: tuple[TensorSpec, ...]
    declared: bool
    order: tuple[str | None, ...]
    collected: str | None = None


@dataclass(frozen=True, slots=True)
class Outputs:
    """The outputs of a module; ``keys`` tells which part of what ``forward`` returns each is (None: all of it)."""

    specs: tuple[TensorSpec, ...]
    declared: bool
    keys: dict[str, int | str | None]


@dataclass(frozen=True, slots=True)
class _Argument:
    name: str
    is_text: bool
    optional: bool


def read_inputs(schema: Any, declared: tuple[TensorSpec, ...]) -> Inputs:
    """The inputs of a ``forward`` with this schema.

    Raises:
        LoadFailed: an argument that no tensor can be, or settings that contradict the schema.
    """
    check_datatypes(declared)
    stated = schema.arguments[1:]  # without self
    if len(stated) == 1 and (collected := _collected(stated[0].type)):
        if not declared:
            raise LoadFailed(f"forward takes a {stated[0].type}: declare its tensors as inputs {_DECLARE}")
        names = [spec.name for spec in declared]
        if collected == "list" and (indices := _indices(names)):
            names = [name for _, name in sorted(zip(indices, names, strict=True))]
        return Inputs(declared, True, tuple(names), collected)
    arguments = [one for argument in stated if (one := _argument(argument)) is not None]
    if not declared:
        return _assumed_inputs(arguments)
    return Inputs(declared, True, _matched(arguments, declared))


def read_outputs(schema: Any, last: Any, declared: tuple[TensorSpec, ...]) -> Outputs:
    """The outputs of a ``forward`` with this schema, whose graph ends in the node ``last``.

    Raises:
        LoadFailed: a result that no tensor can be, one of unknown length, or settings that contradict the schema.
    """
    check_datatypes(declared)
    (returned,) = schema.returns
    found = _results(returned.type, last)
    if not found:
        if not declared:
            raise LoadFailed(f"forward answers a {returned.type} of unknown length: declare the outputs {_DECLARE}")
        by_key = returned.type.kind() == "DictType"
        found = [(spec.name if by_key else index, False) for index, spec in enumerate(declared)]
    if not declared:
        specs = tuple(
            TensorSpec(key if isinstance(key, str) else f"OUTPUT__{key or 0}", "BYTES" if is_text else "FP32", ())
            for key, is_text in found
        )
        return Outputs(specs, False, {spec.name: key for spec, (key, _) in zip(specs, found, strict=True)})
    names = [spec.name for spec in declared]
    keys = [key for key, _ in found]
    if isinstance(keys[0], str):
        if unknown := [name for name in names if name not in keys]:
            raise LoadFailed(
                f"the settings declare output {unknown[0]!r}, but forward answers {', '.join(map(repr, keys))}"
            )
        return Outputs(declared, True, {name: name for name in names})
    indices = _indices(names) or range(len(names))
    if max(indices) >= len(keys):
        raise LoadFailed(f"the settings declare {max(indices) + 1} outputs, but forward answers {len(keys)}")
    return Outputs(declared, True, {name: keys[index] for name, index in zip(names, indices, strict=True)})


def _argument(argument: Any) -> _Argument | None:
    """One of ``forward``'s arguments; None where it is a number or flag with a default, which nobody needs to send."""
    kind, optional = argument.type, argument.has_default_value()
    if kind.kind() == "OptionalType":
        kind, optional = kind.getElementType(), True
    if kind.kind() == "TensorType":
        return _Argument(argument.name, False, optional)
    if str(kind) == "List[str]":
        return _Argument(argument.name, True, optional)
    if optional:
        return None
    raise LoadFailed(f"forward takes {argument.name!r}, a {argument.type}, which cannot be sent over KServe v2")


def _collected(kind: Any) -> str | None:
    return {"List[Tensor]": "list", "Dict[str, Tensor]": "dict"}.get(str(kind))


def _assumed_inputs(arguments: Sequence[_Argument]) -> Inputs:
    needed = [one for one in arguments if not one.optional] or arguments[:1]
    if not needed:
        raise LoadFailed("forward takes no tensor")
    specs = tuple(
        TensorSpec(f"INPUT__{index}", "BYTES" if one.is_text else "FP32", (-1,) if one.is_text else ())
        for index, one in enumerate(needed)
    )
    return Inputs(specs, False, tuple(spec.name for spec in specs))


def _matched(arguments: Sequence[_Argument], declared: tuple[TensorSpec, ...]) -> tuple[str | None, ...]:
    """The declared input for each argument, up to the last that has one."""
    names, taken = [spec.name for spec in declared], [one.name for one in arguments]
    if all(name in taken for name in names):
        chosen: dict[str, str] = dict(zip(names, names, strict=True))
    else:
        indices = _indices(names) or range(len(names))
        if max(indices) >= len(taken):
            raise LoadFailed(
                f"the settings declare the inputs {', '.join(names)}, but forward takes {', '.join(taken)}"
            )
        chosen = {taken[index]: name for index, name in zip(indices, names, strict=True)}
    texts = {spec.name: spec.datatype == "BYTES" for spec in declared}
    order: list[str | None] = []
    for one in arguments:
        name = chosen.get(one.name)
        if name is None and not one.optional:
            raise LoadFailed(f"the settings declare no input for forward's argument {one.name!r}")
        if name is not None and texts[name] != one.is_text:
            raise LoadFailed(
                f"input {name!r} is forward's argument {one.name!r},"
                f" {'a list of texts: declare it as BYTES' if one.is_text else 'a tensor: it cannot be BYTES'}"
            )
        order.append(name)
    while order and order[-1] is None:
        order.pop()
    return tuple(order)


def _indices(names: Sequence[str]) -> list[int]:
    """The indices that names end in, where all of them do and each differently; else nothing."""
    matches = [_INDEXED.fullmatch(name) for name in names]
    indices = [int(match[1]) for match in matches if match is not None]
    return indices if len(indices) == len(names) == len(set(indices)) else []


def _results(kind: Any, last: Any) -> list[tuple[int | str | None, bool]]:
    """Key, and whether it is text, of every part of what is returned; nothing where only its owner can know."""
    name = kind.kind()
    if name == "TensorType" or str(kind) == "List[str]":
        return [(None, name != "TensorType")]
    if name == "TupleType":
        parts = kind.elements()
        wrong = [part for part in parts if part.kind() != "TensorType" and str(part) != "List[str]"]
        if parts and not wrong:
            return [(index, part.kind() != "TensorType") for index, part in enumerate(parts)]
    elif _collected(kind) == "list":
        return [(index, False) for index in range(len(list(last.inputs())))] if _builds(last, "List") else []
    elif _collected(kind) == "dict":
        return [(key, False) for key in _constant_keys(last)] if _builds(last, "Dict") else []
    raise LoadFailed(f"forward answers a {kind}, which cannot be sent over KServe v2")


def _builds(last: Any, what: str) -> bool:
    """Whether the node makes a list or dictionary that is returned with the elements it is made with."""
    return bool(last.kind() == f"prim::{what}Construct" and len(list(last.output().uses())) == 1)


def _constant_keys(last: Any) -> Iterator[str]:
    keys = [value.node() for value in list(last.inputs())[::2]]
    constant = all(key.kind() == "prim::Constant" for key in keys)
    return (str(key.output().toIValue()) for key in keys) if constant else iter(())
