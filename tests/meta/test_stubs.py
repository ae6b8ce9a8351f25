"""Each hand-written stub says of its compiled module what is true, and all of it."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
STUBS = sorted((ROOT / "mmcore/_ext").glob("*.pyi"))
SOURCES = sorted((ROOT / "ext").glob("*.pyx"))
#: Kinds of parameters in the order in which ``ast.arguments`` keeps them.
POSITIONAL, STARRED, KEYWORD, DOUBLE_STARRED = "positional", "*", "keyword", "**"
Parameters = list[tuple[str, str, bool]]  # name, kind, has a default


def stub_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Parameters:
    args = function.args
    positional = [*args.posonlyargs, *args.args]
    required = len(positional) - len(args.defaults)
    found = [(arg.arg, POSITIONAL, index >= required) for index, arg in enumerate(positional)]
    if args.vararg:
        found.append((args.vararg.arg, STARRED, False))
    found += [(a.arg, KEYWORD, d is not None) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    if args.kwarg:
        found.append((args.kwarg.arg, DOUBLE_STARRED, False))
    return found


def compiled_parameters(function: object) -> Parameters | None:
    """The parameters as compiled; None for the slots of a C type, which keep no names."""
    if "cython" not in type(function).__name__:
        return None
    kinds = {
        inspect.Parameter.POSITIONAL_ONLY: POSITIONAL,
        inspect.Parameter.POSITIONAL_OR_KEYWORD: POSITIONAL,
        inspect.Parameter.VAR_POSITIONAL: STARRED,
        inspect.Parameter.KEYWORD_ONLY: KEYWORD,
        inspect.Parameter.VAR_KEYWORD: DOUBLE_STARRED,
    }
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]  # a compiled function
    return [(p.name, kinds[p.kind], p.default is not p.empty) for p in parameters]


def names_declared(body: list[ast.stmt]) -> dict[str, list[ast.stmt]]:
    """What a module's or class's stub declares: name to its statements (several where overloaded)."""
    found: dict[str, list[ast.stmt]] = {}
    for node in body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found.setdefault(name, []).append(node)
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
                found.setdefault(name, []).append(node)
    return found


def made_here(module: ModuleType) -> dict[str, object]:
    """Public functions and classes that the module itself defines."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and callable(value) and getattr(value, "__module__", None) == module.__name__
    }


def differences(where: str, declared: dict[str, list[ast.stmt]], owner: object, present: set[str]) -> list[str]:
    """What the stub's names and those of the compiled owner (a module or class) tell differently."""
    found = [f"{where}.{name} is compiled but not in the stub" for name in sorted(present - declared.keys())]
    for name, nodes in declared.items():
        if not hasattr(owner, name):
            if not name.startswith("_"):
                found.append(f"{where}.{name} is in the stub but not compiled")
            continue
        value = getattr(owner, name)
        match nodes:
            case [ast.ClassDef(body=body)]:
                # What overrides a base's is declared there.
                inherited = {member for base in value.__mro__[1:] for member in vars(base)}
                members = {member for member in vars(value) if not member.startswith("_")} - inherited
                found += differences(f"{where}.{name}", names_declared(body), value, members)
            case [ast.FunctionDef() | ast.AsyncFunctionDef() as node] if not node.decorator_list:
                compiled = compiled_parameters(value)
                if compiled is not None and compiled != stub_parameters(node):
                    found.append(f"{where}.{name} takes {compiled}; its stub says {stub_parameters(node)}")
    return found


@pytest.mark.parametrize("stub", STUBS, ids=lambda path: path.stem)
def test_stub_and_compiled_module_agree(stub: Path) -> None:
    module = importlib.import_module(f"mmcore._ext.{stub.stem}")
    declared = names_declared(ast.parse(stub.read_text()).body)
    assert differences(stub.stem, declared, module, set(made_here(module))) == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_each_compiled_module_has_a_stub_unless_python_sees_nothing_of_it(source: Path) -> None:
    module = importlib.import_module(f"mmcore._ext.{source.stem}")
    assert source.stem in {stub.stem for stub in STUBS} or not made_here(module)


def test_a_stub_for_no_module_is_found() -> None:
    assert {stub.stem for stub in STUBS} <= {source.stem for source in SOURCES}


def test_differences_are_told_apart() -> None:
    """The check itself: it sees a missing name, a name too many, and a changed parameter."""
    import mmcore._ext.grpcwire as module

    stub = "def parse_timeout(words: bytes) -> int | None: ...\ndef invented() -> None: ...\n"
    found = differences("grpcwire", names_declared(ast.parse(stub).body), module, {"parse_timeout", "decode_message"})
    assert [line.split(" ", 1)[0] for line in found] == [
        "grpcwire.decode_message",
        "grpcwire.parse_timeout",
        "grpcwire.invented",
    ]
