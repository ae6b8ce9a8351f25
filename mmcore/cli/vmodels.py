"""``mmcore vmodels``: the names that stand for models, and pointing them to others."""

from __future__ import annotations

from typing import Any

import click

from mmcore.cli.completion import model_names
from mmcore.cli.connection import CLUSTER, MANAGEMENT, Connection, ask, connection_options
from mmcore.cli.models import json_option, list_options, plain_status
from mmcore.cli.tables import print_json, print_rest, print_table
from mmcore.pb import cluster_pb2
from mmcore.pb import model_mesh_pb2 as mesh

_States = mesh.VModelStatusInfo.VModelStatus


@click.group("vmodels", invoke_without_command=True)
@connection_options
@click.option("--prefix", default="", help="Only vmodels whose names begin so.")
@list_options
@click.pass_context
def command(ctx: click.Context, target: str, timeout: float, prefix: str, limit: int, as_json: bool) -> None:
    """List the vmodels: what each stands for, what it is to stand for, and whether it is on its way there."""
    if ctx.invoked_subcommand is not None:
        return

    async def vmodels(connection: Connection) -> cluster_pb2.ListVModelsResponse:
        request = cluster_pb2.ListRequest(prefix=prefix, limit=limit)
        return await connection.call("ListVModels", request, cluster_pb2.ListVModelsResponse, service=CLUSTER)

    response = ask(target, timeout, vmodels)
    found = sorted(response.vmodels, key=lambda vmodel: vmodel.name)
    if as_json:
        print_json([_plain(one) for one in found])
    elif not found:
        click.echo(f"{target} knows no {'such vmodels' if prefix else 'vmodels; mmcore vmodels set makes one'}.")
    else:
        print_table(("NAME", "STATE", "MODEL", "TARGET", "OWNER", "REASON"), [_row(one) for one in found])
    print_rest(len(found), response.total)


@command.command("set")
@click.argument("name")
@click.argument("model", shell_complete=model_names)
@click.option("--type", "model_type", help="Register MODEL as this type if it is not registered.")
@click.option("--path", default="", help="With --type: where its files are.")
@click.option("--key", default="", help="With --type: JSON of its storage.")
@click.option(
    "--auto-delete", is_flag=True, help="With --type: unregister MODEL with the last vmodel that refers to it."
)
@click.option("--owner", default="", help="Who owns NAME; one of another owner is left alone.")
@click.option("--expected", default="", help="Change it only if it points to this model now.")
@click.option("--force", is_flag=True, help="Switch at once, whether or not MODEL is loaded.")
@click.option("--load", is_flag=True, help="Load MODEL now.")
@click.option("--sync", is_flag=True, help="Wait until NAME stands for MODEL.")
@connection_options
@json_option
def put(
    name: str,
    model: str,
    model_type: str | None,
    path: str,
    key: str,
    auto_delete: bool,
    owner: str,
    expected: str,
    force: bool,
    load: bool,
    sync: bool,
    target: str,
    timeout: float,
    as_json: bool,
) -> None:
    """Have the vmodel NAME stand for MODEL, as soon as that is loaded if NAME stands for another one."""
    if model_type is None and (path or key or auto_delete):
        raise click.UsageError("--path, --key and --auto-delete need --type")
    request = mesh.SetVModelRequest(
        vModelId=name,
        targetModelId=model,
        modelInfo=mesh.ModelInfo(type=model_type, path=path, key=key) if model_type is not None else None,
        autoDeleteTargetModel=auto_delete,
        owner=owner,
        expectedTargetModelId=expected,
        force=force,
        loadNow=load,
        sync=sync,
    )

    async def send(connection: Connection) -> mesh.VModelStatusInfo:
        return await connection.call("setVModel", request, mesh.VModelStatusInfo, service=MANAGEMENT)

    status = ask(target, timeout, send, doing=f"loading {model}" if sync else "")
    if as_json:
        print_json(_plain(cluster_pb2.ListVModelsResponse.VModel(name=name, status=status)))
    else:
        click.echo(f"{name}: {_States.Name(status.status)}, stands for {status.activeModelId}")
    if status.status == _States.TRANSITION_FAILED:
        raise click.ClickException("; ".join(status.targetModelStatus.errors))


@command.command("delete")
@click.argument("name")
@click.option("--owner", default="", help="Only if it has this owner.")
@connection_options
@json_option
def delete(name: str, owner: str, target: str, timeout: float, as_json: bool) -> None:
    """Delete the vmodel NAME, and models that go with it."""

    async def send(connection: Connection) -> None:
        request = mesh.DeleteVModelRequest(vModelId=name, owner=owner)
        await connection.call("deleteVModel", request, mesh.DeleteVModelResponse, service=MANAGEMENT)

    ask(target, timeout, send)
    if as_json:
        print_json({"name": name})


def _row(one: cluster_pb2.ListVModelsResponse.VModel) -> tuple[str, ...]:
    status = one.status
    moving = status.targetModelId != status.activeModelId
    errors = (status.targetModelStatus if moving else status.activeModelStatus).errors
    return (
        one.name,
        _States.Name(status.status),
        status.activeModelId,
        status.targetModelId if moving else "",
        status.owner,
        errors[0] if errors else "",
    )


def _plain(one: cluster_pb2.ListVModelsResponse.VModel) -> dict[str, Any]:
    status = one.status
    row = {
        "name": one.name,
        "status": _States.Name(status.status),
        "owner": status.owner,
        "active": status.activeModelId,
        "target": status.targetModelId,
        "active_status": plain_status(status.activeModelStatus),
    }
    if status.HasField("targetModelStatus"):
        row["target_status"] = plain_status(status.targetModelStatus)
    return row
