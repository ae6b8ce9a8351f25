"""What a model's settings say of its tensors, laid over what the framework says.

config.pbtxt, model-settings.json and mmcore.yaml arrive here as ``ModelSettings``; a contradiction with the model
itself is an error at load, where its owner sees it, rather than at every request.
"""

from __future__ import annotations

from mmcore.errors import LoadFailed
from mmcore.model import NUMPY_DTYPES, TensorSpec


def merge_declared(
    kind: str, found: tuple[TensorSpec, ...], declared: tuple[TensorSpec, ...]
) -> tuple[TensorSpec, ...]:
    """The framework's specs, free dimensions narrowed by the declared ones.

    ``kind`` is ``input`` or ``output``, for the messages.

    Raises:
        LoadFailed: a declared tensor the model does not have, or of another datatype, rank or size.
    """
    by_name = {spec.name: spec for spec in declared}
    unknown = [name for name in by_name if all(name != spec.name for spec in found)]
    if unknown:
        names = ", ".join(repr(spec.name) for spec in found)
        raise LoadFailed(f"the settings declare {kind} {unknown[0]!r}, but the model's {kind}s are {names}")
    return tuple(_merge(kind, spec, by_name.get(spec.name, spec)) for spec in found)


def _merge(kind: str, found: TensorSpec, declared: TensorSpec) -> TensorSpec:
    if found.datatype != declared.datatype:
        raise LoadFailed(
            f"the settings declare {kind} {found.name!r} as {declared.datatype}, the model as {found.datatype}"
        )
    if () in (found.shape, declared.shape):
        return TensorSpec(found.name, found.datatype, found.shape or declared.shape)
    agree = len(found.shape) == len(declared.shape) and all(
        here == there or -1 in (here, there) for here, there in zip(found.shape, declared.shape, strict=True)
    )
    if not agree:
        raise LoadFailed(
            f"the settings declare {kind} {found.name!r} with shape {list(declared.shape)},"
            f" the model with {list(found.shape)}"
        )
    shape = tuple(there if here == -1 else here for here, there in zip(found.shape, declared.shape, strict=True))
    return TensorSpec(found.name, found.datatype, shape)


def single_input(found: TensorSpec, declared: tuple[TensorSpec, ...]) -> TensorSpec:
    """The one input of a model over a feature matrix: the declared one if there is one, else ``found``.

    Such a model has no names of its own, so that any declared name is right; its width must fit.

    Raises:
        LoadFailed: more than one input is declared, an unknown datatype, or a shape that cannot fit.
    """
    if not declared:
        return found
    if len(declared) > 1:
        raise LoadFailed(f"the settings declare {len(declared)} inputs; this format takes one matrix of features")
    check_datatypes(declared)
    (spec,) = declared
    if not spec.shape or not found.shape:
        return TensorSpec(spec.name, spec.datatype, spec.shape or found.shape)
    width = found.shape[1]
    if spec.datatype != "BYTES" and (
        len(spec.shape) != 2 or (spec.shape[1] != width and -1 not in (spec.shape[1], width))
    ):
        raise LoadFailed(
            f"the settings declare input {spec.name!r} with shape {list(spec.shape)},"
            f" the model takes {list(found.shape)}"
        )
    return spec


def method_outputs(
    found: tuple[TensorSpec, ...], default: str, declared: tuple[TensorSpec, ...]
) -> tuple[tuple[TensorSpec, ...], dict[str, str], str]:
    """The outputs of a model whose outputs are methods, the method behind each name, and the default output's name.

    A declared output names a method, or, where it is the only one declared and no method's name, it is another name
    for the default (``output__0`` in the config.pbtxt of Triton's tree backend). Its datatype and shape win.

    Raises:
        LoadFailed: a declared output that is neither, or an unknown datatype.
    """
    check_datatypes(declared)
    specs = {spec.name: spec for spec in found}
    methods = {name: name for name in specs}
    answered = default
    for spec in declared:
        if spec.name not in methods:
            if len(declared) > 1:
                raise LoadFailed(
                    f"the settings declare output {spec.name!r}, but the model answers {', '.join(map(repr, specs))}"
                )
            methods[spec.name] = default
            answered = spec.name
        specs[spec.name] = spec
    return tuple(specs.values()), methods, answered


def check_datatypes(specs: tuple[TensorSpec, ...]) -> None:
    """Refuse a spec whose datatype the protocol does not know.

    Raises:
        LoadFailed: naming the tensor and the datatype.
    """
    for spec in specs:
        if spec.datatype not in NUMPY_DTYPES:
            raise LoadFailed(f"tensor {spec.name!r} has the unknown datatype {spec.datatype!r}")
