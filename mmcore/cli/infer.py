"""``mmcore infer``: one inference from the command line, its input given inline or in a file."""

from __future__ import annotations

import json
import sys
from typing import Any, Final

import click
from numpy.typing import NDArray

from mmcore._ext.v2codec import InferResponse, decode_infer_response, encode_infer_request
from mmcore.cli.completion import model_names
from mmcore.cli.connection import Connection, ask, connection_options
from mmcore.cli.inputs import known_inputs, read_input

_SHOWN_VALUES: Final = 12


@click.command("infer")
@click.argument("model", shell_complete=model_names)
@click.option(
    "-i",
    "--input",
    "inputs",
    multiple=True,
    metavar="[NAME[:DATATYPE]=]DATA",
    help="JSON such as [[1, 2, 3]], text, or @FILE: .json, .csv, .npy, an image, or bytes. Name and datatype default "
    "to the model's.",
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
    mmcore infer iris --input @flowers.csv
    mmcore infer resnet --input @cat.jpg
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
