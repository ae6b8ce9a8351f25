"""``mmcore runtime``: hold models for a mesh, in this process or in a server that an adapter speaks to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import click

from mmcore import log
from mmcore.cli.parameters import DURATION, RUNTIME, SIZE, config_option, option
from mmcore.cli.tls import runtime_settings, runtime_tls_options, tls_files, tls_options
from mmcore.config import ISOLATION_POLICIES, THREAD_POOLS, HeldSettings, default_capacity

_HELD: Final = HeldSettings()


@click.command("runtime", context_settings={"show_default": True})
@config_option
@option("--host", default=_HELD.host, help="Address to listen on. Whoever reaches it can have any file loaded.")
@option("--grpc-port", type=click.IntRange(0, 65535), default=_HELD.port, help="Port; 0 picks a free one.")
@option("--uds", type=click.Path(path_type=Path), help="Listen on this Unix socket as well.")
@option(
    "--adapter",
    type=RUNTIME,
    metavar="ADDRESS",
    show_default="this process",
    help="The server that holds the models: triton://HOST:PORT?repo=DIR or another that serve --runtime takes.",
)
@runtime_tls_options("--adapter", "that server")
@tls_options("the gRPC port", "a mesh")
@option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    show_default="none",
    help="Port of metrics and probes; 0: a free one.",
)
@option(
    "--capacity",
    type=SIZE,
    show_default="80 % of the memory limit",
    help="What loaded models may take together, for example 2GiB.",
)
@option("--load-timeout", type=DURATION, default="90s", help="How long the mesh lets a load take.")
@option("--loader-threads", type=click.IntRange(1, 64), default=2, help="How many models are loaded at once.")
@option(
    "--isolate",
    type=click.Choice(ISOLATION_POLICIES),
    default=ISOLATION_POLICIES[0],
    help="Models to run in worker processes whatever their settings say; untrusted are pickles and Python classes.",
)
@option("--server-name", default=_HELD.server_name, help="The server's name in ServerMetadata.")
@option("--log-level", type=click.Choice(log.LEVELS, case_sensitive=False), default="info", help="Lines to log.")
@option("--log-format", type=click.Choice(log.LINES), default="text", help="Lines as text, or each a JSON object.")
@option("--grace", type=DURATION, default="30s", help="How long calls in flight may finish after SIGTERM.")
@option("--event-loop", type=click.Choice(["uvloop", "asyncio"]), default="uvloop", help="Event loop to run on.")
def command(
    host: str,
    grpc_port: int,
    uds: Path | None,
    adapter: str | None,
    adapter_ca: Path | None,
    adapter_cert: Path | None,
    adapter_key: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
    metrics_port: int | None,
    capacity: int | None,
    load_timeout: float,
    loader_threads: int,
    isolate: str,
    server_name: str,
    log_level: str,
    log_format: str,
    grace: float,
    event_loop: str,
) -> int:
    """Hold the models that a mesh says, behind its protocol mmesh.ModelRuntime.

    One line of JSON on standard output says when models can be loaded. Nothing is loaded or unloaded unasked; that is
    the business of the mesh, `mmcore serve --runtime`, or of ModelMesh.
    """
    tls = tls_files(tls_cert, tls_key, tls_client_ca)
    server = runtime_settings("--adapter", adapter, (adapter_ca, adapter_cert, adapter_key), tls, capacity)
    # Before numpy is imported, whose library starts its threads then.
    for pool in THREAD_POOLS:
        os.environ.setdefault(pool, "1")
    from mmcore.server.runtime import run

    return run(
        HeldSettings(
            host=host,
            port=grpc_port,
            uds=uds,
            tls=tls,
            metrics_port=metrics_port,
            adapter=server,
            capacity_bytes=capacity or (0 if adapter is not None else default_capacity()),
            load_timeout_s=load_timeout,
            loader_threads=loader_threads,
            isolate=isolate,
            server_name=server_name,
            log_level=log_level,
            log_format=log_format,
            grace_s=grace,
            event_loop=event_loop,
        )
    )
