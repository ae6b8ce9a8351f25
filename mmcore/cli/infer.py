"""``mmcore infer``: one inference from the command line, its input given inline or in a file."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
from numpy.typing import NDArray

from mmcore._ext.v2codec import InferResponse, decode_infer_response, encode_infer_request
from mmcore.cli.connection import Connection, ask, connection_options
from mmcore.errors import RpcError, Status
from mmcore.model import NUMPY_DTYPES
from mmcore.pb import inference_pb2

Tensor = tuple[str, str, NDArray[Any]]

#: ``name=``, ``name:DATATYPE=`` or nothing before the value.
_INPUT: Final = re.compile(r"(?:(?P<name>[^=\[{\"@]*?)(?::(?P<datatype>[A-Z0-9]+))?=)?(?P<value>.*)", re.DOTALL)
_DATATYPES: Final = {"b": "BOOL", "i": "INT64", "u": "UINT64", "f": "FP64", "U": "BYTES", "S": "BYTES", "O": "BYTES"}
_SHOWN_VALUES: Final = 12


@click.command("infer")
@click.argument("model")
@click.option(
    "-i",
    "--input",
    "inputs",
    multiple=True,
    metavar="[NAME[:DATATYPE]=]DATA",
    help="JSON such as [[1, 2, 3]], text, or @FILE (.json or .npy). Name and datatype default to the model's.",
)
@click.option("-o", "--output", "outputs", multiple=True, help="Ask for this output only; repeat it for more.")
@click.option("--version", default="", help="Version of the model; the server chooses without one.")
@connection_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON on a terminal too; elsewhere it always is.")
def command(
    model: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    version: str,
    target: str,
    timeout: float,
    as_json: bool,
) -> None:
    """Ask a running instance for one inference of MODEL and print its outputs.

    \b
    mmcore infer iris --input '[[5.1, 3.5, 1.4, 0.2]]'
    mmcore infer adder --input INPUT0:INT32='[[1, 2]]' --input INPUT1:INT32=@b.npy
    """

    async def infer(connection: Connection) -> InferResponse:
        known = await known_inputs(connection, model, version)
        tensors = [read_input(text, known) for text in inputs]
        body = encode_infer_request(model, tensors, model_version=version, outputs=outputs)
        return decode_infer_response(await connection.send("ModelInfer", body))

    response = ask(target, timeout, infer)
    if as_json or not sys.stdout.isatty():
        click.echo(json.dumps(to_json(response)))
    else:
        _print_table(response)


async def known_inputs(connection: Connection, model: str, version: str) -> dict[str, str]:
    """The model's inputs and their datatypes; none where its runtime does not tell."""
    request = inference_pb2.ModelMetadataRequest(name=model, version=version)
    try:
        metadata = await connection.call("ModelMetadata", request, inference_pb2.ModelMetadataResponse)
    except RpcError as error:
        if error.status is not Status.UNIMPLEMENTED:
            raise
        return {}
    return {one.name: one.datatype for one in metadata.inputs}


def read_input(text: str, known: Mapping[str, str]) -> Tensor:
    """One ``--input`` as name, datatype and array; ``known`` are the model's inputs and their datatypes.

    Raises:
        click.UsageError: no name where one is needed, an unknown datatype, or a value that is none.
    """
    match = _INPUT.fullmatch(text)
    assert match is not None  # every part is optional
    name, datatype = match["name"] or "", match["datatype"] or ""
    if not name:
        if len(known) != 1:
            raise click.UsageError(
                f"--input needs a name; the model's inputs are {', '.join(known) or 'unknown'} (write NAME=DATA)"
            )
        name = next(iter(known))
    array = _read_value(match["value"])
    datatype = datatype or known.get(name) or _DATATYPES.get(array.dtype.kind, "")
    dtype = NUMPY_DTYPES.get(datatype)
    if dtype is None:
        raise click.UsageError(f"--input {name}: {datatype or array.dtype} is no datatype; known are {_names()}")
    try:
        if datatype == "BYTES":
            flat = [one if isinstance(one, bytes) else str(one).encode() for one in array.ravel().tolist()]
            typed = np.array([*flat, None], dtype=object)[:-1].reshape(array.shape)
        else:
            typed = np.asarray(array, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise click.UsageError(f"--input {name}: not {datatype}: {error}") from None
    return name, datatype, typed


def _names() -> str:
    return ", ".join(NUMPY_DTYPES)


def _read_value(text: str) -> NDArray[Any]:
    try:
        if text.startswith("@"):
            file = Path(text[1:])
            if file.suffix == ".npy":
                array: NDArray[Any] = np.load(file, allow_pickle=False)
                return array
            return np.array(json.loads(file.read_text()))
        if text[:1] in {"[", "{", '"'}:
            return np.array(json.loads(text))
    except (OSError, ValueError) as error:
        raise click.UsageError(f"--input {text}: {error}") from None
    try:
        return np.array([json.loads(text)])
    except ValueError:
        return np.array([text])


def to_json(response: InferResponse) -> dict[str, Any]:
    """The response as the v2 REST protocol writes it; BYTES that are no UTF-8 have their odd bytes escaped."""
    return {
        "model_name": response.model_name,
        "model_version": response.model_version,
        "outputs": [
            {"name": one.name, "datatype": one.datatype, "shape": list(one.shape), "data": _values(one.array())}
            for one in response.outputs
        ],
    }


def _values(array: NDArray[Any]) -> list[Any]:
    flat: list[Any] = array.ravel().tolist()
    return [one.decode(errors="backslashreplace") if isinstance(one, bytes) else one for one in flat]


def _print_table(response: InferResponse) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title=f"{response.model_name} version {response.model_version}")
    for title in ("OUTPUT", "DATATYPE", "SHAPE", "VALUES"):
        table.add_column(title, overflow="fold")
    for one in response.outputs:
        values = _values(one.array())
        more = f" … and {len(values) - _SHOWN_VALUES} more" if len(values) > _SHOWN_VALUES else ""
        shown = ", ".join(
            f"{value:.6g}" if isinstance(value, float) else str(value) for value in values[:_SHOWN_VALUES]
        )
        table.add_row(one.name, one.datatype, "×".join(map(str, one.shape)) or "scalar", shown + more)
    Console(highlight=False, markup=False).print(table)
