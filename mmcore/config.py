"""The settings of every room, as frozen groups, and how their text forms are read.

Values come from the command line, the environment and a file; ``mmcore.cli`` reads those once and passes the groups
down. Nothing here looks at the environment, and nothing else in the package does either.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

#: What loaded models may take when nobody says: this share of the memory limit, the rest is for requests and for us.
CAPACITY_SHARE: Final = 0.8

#: Which models an instance can demand to be run in worker processes.
ISOLATION_POLICIES: Final = ("none", "untrusted", "all")

#: What the libraries under frameworks (OpenMP, OpenBLAS, MKL) read when they are loaded: threads that each may start.
#: One, unless the environment says otherwise: requests are what runs in parallel here.
THREAD_POOLS: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

_UNITS: Final = {
    "": 1, "b": 1,
    "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "t": 10**12, "tb": 10**12,
    "ki": 2**10, "kib": 2**10, "mi": 2**20, "mib": 2**20, "gi": 2**30, "gib": 2**30, "ti": 2**40, "tib": 2**40,
}  # fmt: skip
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)
_DURATION_UNITS: Final = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class TransportSettings:
    """Limits and timings of gRPC connections, for servers and channels alike."""

    #: Longest message taken; a longer one is answered RESOURCE_EXHAUSTED without buffering it.
    max_message_bytes: int = 16 * 2**20
    #: Calls a peer may have open at once on one connection (SETTINGS_MAX_CONCURRENT_STREAMS).
    max_concurrent_streams: int = 1024
    #: Flow-control windows. A 602 KB tensor fits one stream's window, so it never waits for an update.
    stream_window_bytes: int = 4 * 2**20
    connection_window_bytes: int = 64 * 2**20
    #: Longest frame taken (SETTINGS_MAX_FRAME_SIZE).
    max_frame_bytes: int = 2**20
    #: Names and values of one call's metadata together (SETTINGS_MAX_HEADER_LIST_SIZE counts 32 more a pair).
    max_header_bytes: int = 32 * 2**10
    #: Messages half received on one connection, together; above it new ones are refused.
    max_receiving_bytes: int = 256 * 2**20
    #: Answers one connection has not taken yet; above it its new calls are refused.
    max_unsent_bytes: int = 64 * 2**20
    #: PING, SETTINGS, PRIORITY and empty DATA frames, and resets, a peer may send: a burst, then a rate.
    #: Beyond, the connection is closed with ENHANCE_YOUR_CALM. The figures are nghttp2's own for resets.
    control_frame_burst: int = 1000
    control_frames_per_s: float = 33.0
    #: A connection that has not finished its preface and SETTINGS by then is closed.
    handshake_timeout_s: float = 10.0
    #: A connection that has answers waiting and takes none for so long is closed.
    send_stall_timeout_s: float = 60.0
    #: A PING after so long without a byte from the peer, or after so long while calls of ours wait for their answers,
    #: and how long its answer may take.
    keepalive_s: float = 7200.0
    keepalive_waiting_s: float = 7200.0
    keepalive_timeout_s: float = 20.0
    #: Age at which a server asks a connection to go (GOAWAY), 0 for never, and how long its calls may then take.
    max_connection_age_s: float = 0.0
    max_connection_age_grace_s: float = 30.0
    #: A channel's reconnects: first pause, and the longest; each is doubled and spread by a fifth.
    backoff_s: float = 0.1
    max_backoff_s: float = 10.0
    connect_timeout_s: float = 5.0


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """A certificate with its chain and its key, PEM; ``client_ca`` signs the certificates that clients must have.

    ``client_ca`` is a file, or a folder whose ``*.crt`` all count.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None


#: Ways to choose what is unloaded when space is needed, the default first.
EVICTIONS: Final = ("cost", "lru")


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """How an instance keeps loaded models.

    Attributes:
        eviction: what goes when space is needed: ``cost``, what is least worth its reload, or ``lru``.
        device_bytes: what loaded models may take of a device's memory together.
        min_residency_s: how long a loaded model stays at least while others can go.
        idle_timeout_s: how long a model may be idle before it is unloaded; 0 for ever.
        loader_threads: how many models are loaded at once.
    """

    eviction: str = EVICTIONS[0]
    device_bytes: int = 0
    min_residency_s: float = 2.0
    idle_timeout_s: float = 0.0
    loader_threads: int = 2


@dataclass(frozen=True, slots=True)
class StorageSettings:
    """Where registered models are pulled from and kept.

    Attributes:
        entries: folder of JSON entries, the mounted secret ``storage-config``; None has none.
        cache: folder that pulled files are kept in; a leading ``~`` stands for the home folder.
        cache_limit_bytes: what they may take there; None is half of what the disk has for them.
        pvc_mounts: folder that volume claims are mounted in, each by its name.
    """

    entries: Path | None = None
    cache: Path = Path("~/.cache/mmcore/models")
    cache_limit_bytes: int | None = None
    pvc_mounts: Path = Path("/pvc_mounts")


@dataclass(frozen=True, slots=True)
class RuntimeSettings:
    """A runtime of its own process that loads and answers all models.

    Attributes:
        address: as :func:`mmcore.adapters.open_runtime` takes it.
        capacity_bytes: what its models may take together; None: as it says itself.
        ca: signs the certificate that it must have for its host; None: plain text.
        own: the certificate that it is shown over TLS; None: none.
        load_timeout_s: how long a load may take; None: as it says itself.
        loads_at_once: how many models it loads at once; None: as it says itself.
        model_concurrency: how many requests a model takes at once, 0 for any number; None: as it says itself.
    """

    address: str
    capacity_bytes: int | None = None
    ca: Path | None = None
    own: TlsFiles | None = None
    load_timeout_s: float | None = None
    loads_at_once: int | None = None
    model_concurrency: int | None = None


@dataclass(frozen=True, slots=True)
class TraceSettings:
    """Where traces go.

    Attributes:
        endpoint: of an OpenTelemetry collector that takes OTLP over HTTP; None: there are no traces.
        ratio: the share of requests that are traced without their caller's asking for it.
    """

    endpoint: str | None = None
    ratio: float = 0.01


@dataclass(frozen=True, slots=True)
class PayloadSettings:
    """Which requests and answers are written out.

    Attributes:
        destination: a file, or an HTTP endpoint that takes CloudEvents; None: nothing is written.
        ratio: the share of requests.
        models: of these alone; empty: of all.
        methods: gRPC methods, by their short names; REST's requests count as the one they stand for, and those within a
            stream one by one.
    """

    destination: str | None = None
    ratio: float = 1.0
    models: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("ModelInfer", "ModelStreamInfer")


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """All that one serving instance is told.

    Attributes:
        models: folder of models to serve and to keep in step with; None serves none.
        host: address of the TCP listener.
        grpc_port: its port; 0 picks a free one.
        rest_port: the port of REST on the same address; 0 picks a free one.
        metrics_port: the port of metrics and probes; 0 picks a free one.
        metrics_per_model: how many models, those used last, have metrics of their own.
        dashboard: whether the REST port serves the dashboard, to everybody who reaches that port.
        uds: path of a Unix socket to listen on as well.
        peer_port: port for other instances, on the same address; 0 picks a free one, None: no other instances.
        peer_uds: path of a Unix socket for them instead, between the workers of one machine.
        advertise: host, or host and port, under which others reach the peer port; None: as it listens.
        workers: serving processes, each an instance of its own, that share the ports.
        shares_ports: whether other processes listen on the same ports.
        hands_over: whether models in use are loaded by other instances before this one leaves.
        zone: where this instance runs; copies of a model are spread over zones.
        labels: what this instance is fit for, as the constraints of types name it.
        capacity_bytes: what loaded models may take together.
        registry: where registered models and vmodels are kept, as :func:`mmcore.registry.open_registry` reads it.
        management_port: a port that the management API is served on alone; None for the gRPC port only.
        vmodel_owner: who owns vmodels that are set without an owner.
        static_models, type_constraints, dataplane_config: files, read again when they change.
        cache: how loaded models are kept.
        preload: names of models to load before the instance is ready; ``("all",)`` means every one.
        response_cache_bytes: what answers may take that are kept for models whose settings ask for that.
        isolate: the models to be run in worker processes whatever they say: ``none``, ``untrusted`` formats or ``all``.
        worker_network: whether models in worker processes may use the network.
        server_name: what ServerMetadata calls this server.
        log_level: name of a level of :mod:`logging`, in lower case.
        log_format: ``text`` or ``json``, one object a line.
        log_requests: whether each request is logged, until a client changes that.
        grace_s: how long a draining instance waits for calls in flight.
        event_loop: ``uvloop`` or ``asyncio``.
        tls: for the gRPC, REST and management ports; None: plain text.
        metrics_tls: whether the metrics port has the same certificate; clients need none there.
        peer_ca: signs the certificates of the instances, which the peer port then asks for; None: plain text.
        auth_tokens: file of the bearer tokens that callers need, read again when it changes; None: they need none.
        address_requests_per_s, address_concurrent: what each client address may ask, and have under way at once; 0 for
            no limit.
        shared_management: whether the gRPC and REST ports serve management too.
        transport: limits of its connections.
        storage: where registered models come from.
        runtime: what loads and answers the models instead of this process; None: this process.
        traces: where traces go.
        payloads: which requests and answers are written out.
    """

    models: Path | None = None
    host: str = "127.0.0.1"
    grpc_port: int = 8033
    rest_port: int = 8008
    metrics_port: int = 2112
    metrics_per_model: int = 0
    dashboard: bool = True
    uds: Path | None = None
    peer_port: int | None = None
    peer_uds: Path | None = None
    advertise: str | None = None
    workers: int = 1
    shares_ports: bool = False
    hands_over: bool = True
    zone: str = ""
    labels: tuple[str, ...] = ()
    capacity_bytes: int = 2**30
    cache: CacheSettings = CacheSettings()
    registry: str = "memory:"
    management_port: int | None = None
    vmodel_owner: str = ""
    static_models: Path | None = None
    type_constraints: Path | None = None
    dataplane_config: Path | None = None
    preload: tuple[str, ...] = ()
    response_cache_bytes: int = 64 * 2**20
    isolate: str = "none"
    worker_network: bool = False
    server_name: str = "mmcore"
    log_level: str = "info"
    log_format: str = "text"
    log_requests: bool = False
    grace_s: float = 90.0
    event_loop: str = "uvloop"
    tls: TlsFiles | None = None
    metrics_tls: bool = False
    peer_ca: Path | None = None
    auth_tokens: Path | None = None
    address_requests_per_s: float = 0.0
    address_concurrent: int = 0
    shared_management: bool = True
    transport: TransportSettings = TransportSettings()
    storage: StorageSettings = StorageSettings()
    runtime: RuntimeSettings | None = None
    traces: TraceSettings = TraceSettings()
    payloads: PayloadSettings = PayloadSettings()


@dataclass(frozen=True, slots=True)
class HeldSettings:
    """All that a process is told that holds models for a mesh.

    Attributes:
        host, port: where it listens; the port 0 picks a free one.
        uds: path of a Unix socket to listen on as well.
        tls: for its port; None: plain text.
        metrics_port: the port of metrics and probes on the same address; 0 picks a free one, None: there is none.
        adapter: the server that holds the models; None: this process.
        capacity_bytes: what the mesh may load; 0: what that server says.
        load_timeout_s: how long a load may take.
        loader_threads: how many models this process loads at once.
        isolate, server_name, log_level, log_format, grace_s, event_loop, response_cache_bytes: as for an instance.
        transport: limits of its connections; what the mesh lets through is not refused here.
    """

    host: str = "127.0.0.1"
    port: int = 8085
    uds: Path | None = None
    tls: TlsFiles | None = None
    metrics_port: int | None = None
    adapter: RuntimeSettings | None = None
    capacity_bytes: int = 0
    load_timeout_s: float = 90.0
    loader_threads: int = 2
    isolate: str = "none"
    server_name: str = "mmcore"
    log_level: str = "info"
    log_format: str = "text"
    grace_s: float = 30.0
    event_loop: str = "uvloop"
    response_cache_bytes: int = 64 * 2**20
    transport: TransportSettings = TransportSettings(max_message_bytes=2**31 - 1, max_receiving_bytes=2**31 - 1)


def parse_size(text: str) -> int:
    """``2GiB``, ``500MB``, ``1.5g`` or a plain number of bytes; i marks powers of 1024.

    Raises:
        ValueError: the text is no size, or nothing is left of it.
    """
    match = _SIZE.fullmatch(text)
    factor = _UNITS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a size; write for example 2GiB, 500MB or a number of bytes")
    size = int(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor
    if size <= 0:
        raise ValueError(f"{text!r} is not a size above zero")
    return size


def parse_target(text: str) -> str:
    """Where an instance is called: ``HOST:PORT``, ``[IPV6]:PORT`` or ``unix:PATH``, as it was written.

    Raises:
        ValueError: it is none of these.
    """
    host, _, port = text.rpartition(":")
    if text.startswith("unix:") and text != "unix:":
        return text
    if not host or "/" in text or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"{text!r} is not an instance's gRPC address; write HOST:PORT or unix:PATH")
    return text


def parse_collector(text: str) -> str:
    """Where a collector of traces is, ``http://HOST:PORT`` or with https, as it was written.

    Raises:
        ValueError: it is no such address.
    """
    if not text.startswith(("http://", "https://")) or not text.partition("://")[2]:
        raise ValueError(f"{text!r} is not a collector's address; write http://HOST:4318")
    return text


def parse_duration(text: str) -> float:
    """``90``, ``90s``, ``1.5m``, ``250ms`` or ``2h`` in seconds.

    Raises:
        ValueError: the text is no duration.
    """
    match = _SIZE.fullmatch(text)
    factor = _DURATION_UNITS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a duration; write for example 90s, 2m or a number of seconds")
    return float(match[1]) * factor


def memory_limit(root: Path = Path("/"), *, membership: Path | None = None) -> int:
    """Bytes a process may use, this one where nothing is said: the smallest of the machine's memory and its control
    groups' limits.

    Both versions of the control-group hierarchy are read, from the process's own group up to the top, since a limit
    anywhere above holds as well. ``root`` is where ``proc`` and ``sys`` are looked for, and ``membership`` the file
    that names another process's groups.

    Raises:
        OSError: what another process sees cannot be read.
    """
    limits = [_machine_memory(root)]
    try:
        groups = (membership or root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        groups = []
    for line in groups:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            base, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        folder = base / group.lstrip("/")
        # In a container the path is often the host's and absent here; the walk up still finds the mounted top.
        for level in (folder, *folder.parents):
            limit = _limit_in(level / name)
            if limit is not None:
                limits.append(limit)
            if level == base:
                break
    return min(limits)


def default_capacity() -> int:
    """The capacity in bytes of an instance that was told none."""
    return int(memory_limit() * CAPACITY_SHARE)


def _machine_memory(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo names no MemTotal")


def _limit_in(file: Path) -> int | None:
    """The limit a control-group file states; None where there is no file or no limit ('max')."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
