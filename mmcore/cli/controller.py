"""``mmcore controller``: the Kubernetes controller, and a check of manifests that exist already."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Final, TextIO

import click

from mmcore import log
from mmcore.cli.parameters import option
from mmcore.cli.tables import print_json

_NAMESPACE_FILE: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def own_namespace() -> str:
    """The pod's namespace; outside of a cluster ``model-serving``."""
    try:
        return _NAMESPACE_FILE.read_text().strip()
    except OSError:
        return "model-serving"


@click.group("controller", invoke_without_command=True)
@click.option(
    "--namespace",
    envvar="NAMESPACE",
    show_envvar=True,
    default=own_namespace,
    show_default="the pod's",
    help="The controller's own namespace, where its configuration is.",
)
@click.option(
    "--namespace-scope",
    is_flag=True,
    envvar="NAMESPACE_SCOPE",
    show_envvar=True,
    help="Serve this namespace alone, without anything of the cluster.",
)
@click.option(
    "--etcd-secret",
    envvar="ETCD_SECRET_NAME",
    show_envvar=True,
    show_default=True,
    default="model-serving-etcd",
    help="Secret of the connection to etcd.",
)
@option(
    "--kubeconfig",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    show_default="the pod's account, else kubectl's",
    help="Where the API server is.",
)
@click.option("--leader-elect/--no-leader-elect", default=True, help="Work only while holding the lease.")
@option("--probe-port", type=click.IntRange(1, 65535), default=8081, help="Port of /healthz, /readyz and /metrics.")
@option("--log-level", type=click.Choice(log.LEVELS, case_sensitive=False), default="info", help="Lines to log.")
@option("--log-format", type=click.Choice(log.LINES), default="text", help="Lines as text, or each a JSON object.")
@click.pass_context
def command(
    ctx: click.Context,
    namespace: str,
    namespace_scope: bool,
    etcd_secret: str,
    kubeconfig: Path | None,
    leader_elect: bool,
    probe_port: int,
    log_level: str,
    log_format: str,
) -> int:
    """Run the controller of Predictors, InferenceServices and ServingRuntimes."""
    if ctx.invoked_subcommand is not None:
        return 0
    from mmcore.controller.api import Api
    from mmcore.controller.app import Controller
    from mmcore.controller.known import Installation
    from mmcore.controller.probes import Probes

    log.configure(log_level, log_format)
    installation = Installation(namespace, cluster=not namespace_scope, etcd_secret=etcd_secret)
    controller = Controller(Api(kubeconfig), installation, elect=leader_elect)

    async def run() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, task.cancel)
        server = await Probes(controller.is_ready, controller.metrics).listen("", probe_port)
        try:
            await controller.run()
        except asyncio.CancelledError:
            return
        finally:
            server.close()

    asyncio.run(run())
    return 0


@command.command("check")
@click.argument("files", nargs=-1, required=True, type=click.File())
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list instead of lines.")
def check_files(files: tuple[TextIO, ...], as_json: bool) -> int:
    """Tell what will happen to the manifests in FILE…, without a cluster.

    Runtimes among them are those that models are matched with. Exits with 1 where something will not work.
    """
    import yaml

    from mmcore.controller.check import check, read

    objects = []
    for file in files:
        try:
            objects += read([file.read()])
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise click.ClickException(f"{file.name}: {' '.join(str(error).split())}") from None
    findings = check(objects)
    if as_json:
        print_json([{"level": one.level, "name": one.name, "text": one.text} for one in findings])
    for finding in () if as_json else findings:
        click.echo(f"{finding.level:5}  {finding.name}: {finding.text}")
    if not findings and not as_json:
        click.echo("nothing that the controller serves is in these files")
    return 1 if any(finding.level == "error" for finding in findings) else 0
