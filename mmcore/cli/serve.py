"""``mmcore serve``: the one place where the options of a serving instance are declared.

Every option is a flag, an environment variable ``MMCORE_<NAME>`` and a key of the ``--config`` file, in that order of
precedence. Keys of the file are the flags' names without the leading dashes.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Final

import click

from mmcore import log
from mmcore.cli.parameters import AUTHORITIES, COLLECTOR, DURATION, FILE, REGISTRY, RUNTIME, SIZE, config_option, option
from mmcore.cli.tls import runtime_settings, runtime_tls_options, tls_files, tls_options
from mmcore.config import (
    EVICTIONS,
    ISOLATION_POLICIES,
    THREAD_POOLS,
    CacheSettings,
    PayloadSettings,
    ServeSettings,
    StorageSettings,
    TraceSettings,
    TransportSettings,
    default_capacity,
)

_SERVE: Final = ServeSettings()
_STORAGE: Final = StorageSettings()


@click.command("serve", context_settings={"show_default": True})
@config_option
@option(
    "--models",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of models, one folder or file each; kept in step while running.",
)
@option("--host", metavar="ADDRESS", default="127.0.0.1", help="Address to listen on; :: is every one, of IPv4 too.")
@option("--grpc-port", type=click.IntRange(0, 65535), default=8033, help="gRPC port; 0 picks a free one.")
@option("--rest-port", type=click.IntRange(0, 65535), default=8008, help="REST port; 0 picks a free one.")
@option(
    "--metrics-port", type=click.IntRange(0, 65535), default=2112, help="Port of metrics and probes; 0: a free one."
)
@option(
    "--metrics-per-model",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Metrics with labels of their own for the N models used last.",
)
@option("--dashboard/--no-dashboard", default=True, help="Serve the dashboard, /dashboard on the REST port.")
@option("--uds", type=click.Path(path_type=Path), help="Listen for gRPC on this Unix socket as well.")
@option("--peer-port", type=click.IntRange(0, 65535), help="Port for other instances; 0 picks a free one.")
@option(
    "--advertise",
    metavar="HOST[:PORT]",
    show_default="as it listens",
    help="Where other instances reach the peer port.",
)
@option(
    "--runtime",
    type=RUNTIME,
    metavar="ADDRESS",
    show_default="this process",
    help="Load models into this runtime and pass requests to it: unix:PATH or HOST:PORT speaking mmesh.ModelRuntime, "
    "or SERVER://HOST:PORT?repo=DIR with triton, mlserver, ovms or torchserve.",
)
@runtime_tls_options("--runtime", "the --runtime")
@option(
    "--runtime-load-timeout",
    type=DURATION,
    show_default="as it says",
    help="How long a --runtime may take for a load.",
)
@option(
    "--runtime-loads-at-once",
    type=click.IntRange(1),
    show_default="as it says",
    help="How many models a --runtime loads at once.",
)
@option(
    "--runtime-model-concurrency",
    type=click.IntRange(0),
    show_default="as it says",
    help="How many requests a model of a --runtime takes at once, further ones wait; 0: any number.",
)
@option(
    "--workers",
    type=click.IntRange(1),
    default=1,
    help="Serving processes that share the ports and the memory; not before a --runtime.",
)
@option(
    "--zone",
    metavar="NAME",
    default="",
    show_default="none",
    help="Where this instance runs; copies are spread over zones.",
)
@option(
    "--label", metavar="LABEL", multiple=True, help="What this instance is fit for, for type constraints; repeat it."
)
@option(
    "--capacity",
    type=SIZE,
    show_default="80 % of the memory limit",
    help="What loaded models may take together, for example 2GiB or 500MB.",
)
@option("--max-message", type=SIZE, default="16MiB", help="Longest message taken; others get RESOURCE_EXHAUSTED.")
@option(
    "--response-cache",
    type=SIZE,
    default="64MiB",
    help="What kept answers may take together, of models whose settings say response_cache.",
)
@option(
    "--registry",
    type=REGISTRY,
    default=_SERVE.registry,
    help="Where registered models are kept, and what instances share: memory:, sqlite:PATH, "
    "etcd://HOST:PORT[,HOST:PORT]/PREFIX, etcds://… with TLS, or etcd:FILE with a connection file.",
)
@option(
    "--management-port",
    type=click.IntRange(0, 65535),
    help="Serve the management API, which the gRPC port has too, on a port of its own as well.",
)
@option(
    "--shared-management/--no-shared-management",
    default=True,
    help="Whether the gRPC and REST ports take management too, or --management-port alone.",
)
@tls_options("the gRPC, REST and management ports", "clients")
@option("--metrics-tls/--no-metrics-tls", default=False, help="The same certificate on the metrics port.")
@option(
    "--peer-ca", type=AUTHORITIES, help="Take only instances whose certificate, --tls-cert, it has signed; likewise."
)
@option("--auth-tokens", type=FILE, help="YAML of the bearer tokens that callers need; read again when it changes.")
@option(
    "--address-rate",
    type=click.FloatRange(0),
    default=0.0,
    help="Requests per second that each client address may send; 0 for no limit.",
)
@option(
    "--address-concurrent",
    type=click.IntRange(0),
    default=0,
    help="Requests that each client address may have under way; 0 for no limit.",
)
@option(
    "--vmodel-owner",
    metavar="NAME",
    default="",
    show_default="nobody",
    help="Owner of vmodels that are set without one.",
)
@option("--static-models", type=FILE, help="JSON list of models and vmodels to register; read again when it changes.")
@option("--type-constraints", type=FILE, help="JSON of the labels that types of models need; read again likewise.")
@option("--dataplane-config", type=FILE, help="JSON of what is served and where requests name their model; likewise.")
@option(
    "--preload", metavar="MODEL", multiple=True, help="Load this model before being ready; repeat it, or say 'all'."
)
@option(
    "--storage-config",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of JSON files, one for each storage key, that registered models are pulled by.",
)
@option(
    "--model-cache",
    type=click.Path(file_okay=False, path_type=Path),
    default=str(_STORAGE.cache),
    help="Folder that pulled models are kept in; instances may share it.",
)
@option(
    "--model-cache-limit",
    type=SIZE,
    show_default="half of the free disk",
    help="What pulled models may take there, for example 100GiB.",
)
@option(
    "--pvc-mounts",
    type=click.Path(file_okay=False, path_type=Path),
    default=str(_STORAGE.pvc_mounts),
    help="Folder that volume claims are mounted in, each by its name.",
)
@option(
    "--isolate",
    type=click.Choice(ISOLATION_POLICIES),
    default=ISOLATION_POLICIES[0],
    help="Models to run in worker processes whatever their settings say; untrusted are pickles and Python classes.",
)
@option(
    "--worker-network/--no-worker-network",
    default=False,
    help="Whether models in worker processes may use the network.",
)
@option(
    "--eviction",
    type=click.Choice(EVICTIONS),
    default=EVICTIONS[0],
    help="What goes when space is needed: what is least worth its reload, or the least recently used.",
)
@option("--min-residency", type=DURATION, default="2s", help="How long a loaded model stays while others can go.")
@option("--idle-timeout", type=DURATION, default="0", help="Unload models that are idle for so long; 0 for never.")
@option("--device-capacity", type=SIZE, default=None, help="What loaded models may take of a device's memory.")
@option("--loader-threads", type=click.IntRange(1, 64), default=2, help="How many models are loaded at once.")
@option(
    "--server-name", metavar="NAME", default="mmcore", help="The name in ServerMetadata; 'triton' for clients that ask."
)
@option("--log-level", type=click.Choice(log.LEVELS, case_sensitive=False), default="info", help="Lines to log.")
@option("--log-format", type=click.Choice(log.LINES), default="text", help="Lines as text, or each a JSON object.")
@option("--log-requests/--no-log-requests", default=False, help="A line in the log for each request.")
@option(
    "--otlp-endpoint",
    type=COLLECTOR,
    metavar="URL",
    show_default="no traces",
    help="Send traces to this OpenTelemetry collector, http://HOST:4318.",
)
@option(
    "--trace-ratio",
    type=click.FloatRange(0, 1),
    default=0.01,
    show_default="0.01",
    help="Share of requests to trace unasked.",
)
@option("--payload-log", metavar="FILE|URL", help="Write requests and answers to a file or post them as CloudEvents.")
@option(
    "--payload-ratio", type=click.FloatRange(0, 1), default=1.0, show_default="1", help="Share of requests to write."
)
@option("--payload-model", multiple=True, show_default="all", help="Write those of this model alone; repeat it.")
@option(
    "--payload-method",
    multiple=True,
    default=PayloadSettings().methods,
    show_default=", ".join(PayloadSettings().methods),
    help="Write calls of this method; repeat it.",
)
@option("--grace", type=DURATION, default="90s", help="How long calls in flight may finish after SIGTERM.")
@option("--keepalive", type=DURATION, default="2h", help="PING a connection that has been silent for so long.")
@option("--max-connection-age", type=DURATION, default="0", help="Ask connections to go at this age; 0 for never.")
@option("--event-loop", type=click.Choice(["uvloop", "asyncio"]), default="uvloop", help="Event loop to run on.")
def command(
    models: Path | None,
    host: str,
    grpc_port: int,
    rest_port: int,
    metrics_port: int,
    metrics_per_model: int,
    dashboard: bool,
    uds: Path | None,
    peer_port: int | None,
    advertise: str | None,
    runtime: str | None,
    runtime_ca: Path | None,
    runtime_cert: Path | None,
    runtime_key: Path | None,
    runtime_load_timeout: float | None,
    runtime_loads_at_once: int | None,
    runtime_model_concurrency: int | None,
    workers: int,
    zone: str,
    label: tuple[str, ...],
    capacity: int | None,
    max_message: int,
    response_cache: int,
    registry: str,
    management_port: int | None,
    shared_management: bool,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
    metrics_tls: bool,
    peer_ca: Path | None,
    auth_tokens: Path | None,
    address_rate: float,
    address_concurrent: int,
    vmodel_owner: str,
    static_models: Path | None,
    type_constraints: Path | None,
    dataplane_config: Path | None,
    preload: tuple[str, ...],
    storage_config: Path | None,
    model_cache: Path,
    model_cache_limit: int | None,
    pvc_mounts: Path,
    isolate: str,
    worker_network: bool,
    eviction: str,
    min_residency: float,
    idle_timeout: float,
    device_capacity: int | None,
    loader_threads: int,
    server_name: str,
    log_level: str,
    log_format: str,
    log_requests: bool,
    otlp_endpoint: str | None,
    trace_ratio: float,
    payload_log: str | None,
    payload_ratio: float,
    payload_model: tuple[str, ...],
    payload_method: tuple[str, ...],
    grace: float,
    keepalive: float,
    max_connection_age: float,
    event_loop: str,
) -> int:
    """Serve a folder of models over KServe v2, gRPC and REST.

    One line of JSON on standard output says when the instance is ready and on which addresses. SIGTERM and SIGINT
    finish the calls in flight before leaving, a second signal leaves at once.
    """
    if runtime is not None and workers > 1:
        raise click.UsageError(
            "--workers: a --runtime has one process before it, which alone says what is loaded there; start a runtime"
            " and an instance for each, or leave --workers out"
        )
    tls = tls_files(tls_cert, tls_key, tls_client_ca)
    beside = runtime_settings("--runtime", runtime, (runtime_ca, runtime_cert, runtime_key), tls, capacity)
    if beside is not None:
        beside = replace(
            beside,
            load_timeout_s=runtime_load_timeout,
            loads_at_once=runtime_loads_at_once,
            model_concurrency=runtime_model_concurrency,
        )
    if tls is None and (metrics_tls or peer_ca):
        raise click.UsageError("--metrics-tls and --peer-ca need --tls-cert and --tls-key")
    if tls is not None and peer_port is not None and peer_ca is None:
        raise click.UsageError("--peer-port would be in plain text beside --tls-cert; give it --peer-ca")
    if not shared_management and management_port is None:
        raise click.UsageError("--no-shared-management needs a --management-port")
    # Before numpy is imported, whose library starts its threads then.
    for pool in THREAD_POOLS:
        os.environ.setdefault(pool, "1")
    from mmcore.server.node import run

    return run(
        ServeSettings(
            models=models,
            host=host,
            grpc_port=grpc_port,
            rest_port=rest_port,
            metrics_port=metrics_port,
            metrics_per_model=metrics_per_model,
            dashboard=dashboard,
            uds=uds,
            peer_port=peer_port,
            advertise=advertise,
            workers=workers,
            zone=zone,
            labels=label,
            capacity_bytes=capacity or default_capacity(),
            runtime=beside,
            registry=registry,
            management_port=management_port,
            shared_management=shared_management,
            tls=tls,
            metrics_tls=metrics_tls,
            peer_ca=peer_ca,
            auth_tokens=auth_tokens,
            address_requests_per_s=address_rate,
            address_concurrent=address_concurrent,
            vmodel_owner=vmodel_owner,
            static_models=static_models,
            type_constraints=type_constraints,
            dataplane_config=dataplane_config,
            preload=preload,
            response_cache_bytes=response_cache,
            isolate=isolate,
            worker_network=worker_network,
            cache=CacheSettings(
                eviction=eviction,
                device_bytes=device_capacity or 0,
                min_residency_s=min_residency,
                idle_timeout_s=idle_timeout,
                loader_threads=loader_threads,
            ),
            server_name=server_name,
            log_level=log_level,
            log_format=log_format,
            log_requests=log_requests,
            grace_s=grace,
            event_loop=event_loop,
            traces=TraceSettings(otlp_endpoint, trace_ratio),
            payloads=PayloadSettings(payload_log, payload_ratio, payload_model, payload_method),
            storage=StorageSettings(
                entries=storage_config,
                cache=model_cache,
                cache_limit_bytes=model_cache_limit,
                pvc_mounts=pvc_mounts,
            ),
            transport=TransportSettings(
                max_message_bytes=max_message, keepalive_s=keepalive, max_connection_age_s=max_connection_age
            ),
        )
    )
