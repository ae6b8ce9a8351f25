"""``mmcore models``: the models that an instance knows and the state each is in, and registering them."""

from __future__ import annotations

from typing import Any, Final

import click

from mmcore.cli.completion import model_names
from mmcore.cli.connection import CLUSTER, MANAGEMENT, Connection, ask, connection_options
from mmcore.cli.tables import ago, print_json, print_rest, print_table
from mmcore.pb import cluster_pb2
from mmcore.pb import model_mesh_pb2 as mesh

#: Rows listed unless more are asked for.
LISTED: Final = 1000

_States = mesh.ModelStatusInfo.ModelStatus


def json_option(function: Any) -> Any:
    """Add ``--json`` to a command that changes something."""
    return click.option("--json", "as_json", is_flag=True, help="Print what came of it as JSON.")(function)


def list_options(function: Any) -> Any:
    """Add ``--limit`` and ``--json`` to a command that lists."""
    function = click.option("--json", "as_json", is_flag=True, help="Print one JSON list instead of a table.")(function)
    return click.option(
        "--limit", type=click.IntRange(0), default=LISTED, show_default=True, help="Rows at most; 0 for all."
    )(function)


@click.group("models", invoke_without_command=True)
@connection_options
@click.option("--prefix", default="", help="Only models whose names begin so.")
@list_options
@click.pass_context
def command(ctx: click.Context, target: str, timeout: float, prefix: str, limit: int, as_json: bool) -> None:
    """List the models that a running instance knows: name, version, state and the reason for it.

    Of registered models the copies are those of all instances.
    """
    if ctx.invoked_subcommand is not None:
        return

    async def models(connection: Connection) -> cluster_pb2.ListModelsResponse:
        request = cluster_pb2.ListRequest(prefix=prefix, limit=limit)
        return await connection.call("ListModels", request, cluster_pb2.ListModelsResponse, service=CLUSTER)

    response = ask(target, timeout, models)
    found = sorted(response.models, key=lambda model: model.name)
    if as_json:
        print_json([_plain(model) for model in found])
    elif not found:
        click.echo(
            f"{target} serves no {'such models' if prefix else 'models; give it a folder of them with --models'}."
        )
    else:
        rows = [(one.name, one.version, one.state, _copies(one), _reason(one)) for one in found]
        print_table(("NAME", "VERSION", "STATE", "COPIES", "REASON"), rows)
    print_rest(len({model.name for model in found}), response.total)


@command.command("register")
@click.argument("name")
@click.option("--type", "model_type", required=True, help="The format, for example sklearn.")
@click.option("--path", default="", help="Where the files are, in the store that the key names.")
@click.option("--key", default="", help="JSON: storage_key, storage_params, model_type, schema_path.")
@click.option("--load", is_flag=True, help="Load it now.")
@click.option("--sync", is_flag=True, help="Load it now and wait until it is loaded.")
@connection_options
@json_option
def register(
    name: str,
    model_type: str,
    path: str,
    key: str,
    load: bool,
    sync: bool,
    target: str,
    timeout: float,
    as_json: bool,
) -> None:
    """Register the model NAME with all instances; the same again changes nothing."""
    request = mesh.RegisterModelRequest(
        modelId=name,
        modelInfo=mesh.ModelInfo(type=model_type, path=path, key=key),
        loadNow=load or sync,
        sync=sync,
    )

    async def send(connection: Connection) -> mesh.ModelStatusInfo:
        return await connection.call("registerModel", request, mesh.ModelStatusInfo, service=MANAGEMENT)

    status = ask(target, timeout, send, doing=f"loading {name}" if sync else "")
    if as_json:
        print_json({"name": name, **plain_status(status)})
    else:
        click.echo(f"{name}: {_States.Name(status.status)}")
    if status.status == _States.LOADING_FAILED:
        raise click.ClickException("; ".join(status.errors))


@command.command("unregister")
@click.argument("name", shell_complete=model_names)
@connection_options
@json_option
def unregister(name: str, target: str, timeout: float, as_json: bool) -> None:
    """Take the model NAME out of the registry; every instance lets its copies go."""

    async def send(connection: Connection) -> None:
        request = mesh.UnregisterModelRequest(modelId=name)
        await connection.call("unregisterModel", request, mesh.UnregisterModelResponse, service=MANAGEMENT)

    ask(target, timeout, send)
    if as_json:
        print_json({"name": name})


def plain_status(status: mesh.ModelStatusInfo) -> dict[str, Any]:
    """A model's status as JSON has it."""
    return {
        "status": _States.Name(status.status),
        "errors": list(status.errors),
        "copies": [
            {"instance": copy.location, "state": _States.Name(copy.copyStatus), "since_ms": copy.time}
            for copy in status.modelCopyInfos
        ],
    }


def _plain(model: cluster_pb2.ListModelsResponse.Model) -> dict[str, Any]:
    row = {"name": model.name, "version": model.version, "state": model.state, "reason": model.reason}
    if not model.registered:
        return row
    return {
        **row,
        "type": model.info.type,
        "path": model.info.path,
        "references": model.references,
        "auto_delete": model.auto_delete,
        "last_used_ms": model.last_used,
        **plain_status(model.status),
    }


def _copies(model: cluster_pb2.ListModelsResponse.Model) -> str:
    return ", ".join(
        f"{copy.location} {_States.Name(copy.copyStatus)} {ago(copy.time)}" for copy in model.status.modelCopyInfos
    )


def _reason(model: cluster_pb2.ListModelsResponse.Model) -> str:
    return model.status.errors[0] if model.status.errors else model.reason
