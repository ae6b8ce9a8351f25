"""What a model is to every room: its files, its settings, its tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

#: V2 datatype to the numpy dtype a runtime sees (Open Inference Protocol, "Tensor Data Types").
#: BF16 has no numpy type and is widened to float32, exactly; BYTES is an object array of ``bytes``.
NUMPY_DTYPES: Final[dict[str, np.dtype]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "BF16": np.dtype(np.float32),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(np.object_),
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, V2 datatype and shape of one input or output; -1 where a dimension is free.

    The shape is the full one: a batch dimension, where the model has one, is its first element. An empty shape says
    nothing: any shape will do (an ONNX graph that states none, a class that answers what it gets).
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """What becomes of requests that wait for a model (Triton, ModelQueuePolicy); times in microseconds."""

    #: Requests that may wait; 0: the instance's limit.
    limit: int = 0
    #: How long one may wait; 0: for as long as its caller does.
    timeout_us: int = 0
    #: Whether one that has waited too long is put behind all others instead of being refused.
    delays: bool = False
    #: Whether a request may bring a shorter timeout of its own.
    takes_timeouts: bool = True


@dataclass(frozen=True, slots=True)
class Batching:
    """How requests for one model are put together and queued (Triton, ModelDynamicBatching)."""

    #: How long the first of a batch waits for others, in microseconds; 0: only for as long as the model is busy.
    delay_us: int = 0
    #: Numbers of rows at which a batch does not wait any longer, ascending.
    preferred: tuple[int, ...] = ()
    #: Whether answers leave in the order of the requests.
    ordered: bool = False
    #: Levels 1, the most urgent, to this one; 0: all requests are alike.
    levels: int = 0
    default_level: int = 0
    policy: QueuePolicy = QueuePolicy()
    #: By level, where it differs from ``policy``.
    policies: dict[int, QueuePolicy] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WarmupInput:
    """One input of a warm-up request: its full shape, and the file of its raw bytes or what it is filled with."""

    datatype: str
    shape: tuple[int, ...]
    #: Values drawn at random instead of zeros.
    random: bool = False
    data: Path | None = None


@dataclass(frozen=True, slots=True)
class Warmup:
    """A request that a model must have answered ``count`` times before it is called ready."""

    name: str
    inputs: dict[str, WarmupInput]
    count: int = 1


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """What config.pbtxt, model-settings.json and mmcore.yaml say of a model; defaults where they are silent."""

    max_batch_size: int = 0
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    #: Class labels per output name, for the classification extension.
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    #: Free parameters (config.pbtxt ``parameters``, model-settings.json ``parameters.extra``), as text.
    parameters: dict[str, str] = field(default_factory=dict)
    #: Where inference runs: ``auto`` (by measured time), ``inline`` or ``thread``.
    execution: str = "auto"
    #: Memory the loaded model takes, in bytes, where its owner states it.
    size_bytes: int | None = None
    #: Memory of a device that it takes, in bytes.
    device_bytes: int = 0
    #: Whether it is loaded before the instance is ready, and whether it is never evicted.
    preload: bool = False
    pinned: bool = False
    #: How long it stays at least when it has been loaded, and how long it may be idle before it is unloaded, in
    #: seconds; None: as the instance says. An ``idle_timeout_s`` of 0: for ever.
    min_residency_s: float | None = None
    idle_timeout_s: float | None = None
    #: ``process`` for a worker process of its own, ``none`` for the serving process where the instance allows it.
    isolation: str = "none"
    #: Private memory that a worker process may have, in bytes.
    isolation_memory_bytes: int | None = None
    #: Processor cores that it may run on, all together.
    isolation_cpus: int | None = None
    #: How long an inference in a worker process may take, in seconds.
    timeout_s: float | None = None
    #: Whether requests may be put together; None where nothing is said: by the format and the shapes.
    merges: bool | None = None
    #: Inferences that may run at once, each in a worker process of its own where it is isolated; 0: not stated.
    instances: int = 0
    batching: Batching = Batching()
    warmups: tuple[Warmup, ...] = ()
    #: Whether the same request may get the same answer again without asking the model.
    response_cache: bool = False


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """How a model is registered (mmesh.ModelInfo): a type, a path in some store, and the key to that.

    ``type`` is a format, or a label such as ``mt:sklearn:1`` or ``rt:RUNTIME``; ``key`` is a JSON object with
    ``storage_key``, ``storage_params``, ``model_type`` and ``schema_path``, all optional, or empty.
    """

    type: str
    path: str
    key: str = ""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """One version of one model on the local disk, ready to be loaded.

    ``path`` is what the runtime opens: the model file, or the folder where the format is a folder. Pulled files stay
    where they are for as long as anybody holds the source, which is what ``lease`` is for.
    """

    name: str
    version: str
    format: str
    path: Path
    settings: ModelSettings = ModelSettings()
    #: What it is registered as, and the schema that came with it, where its files are handed to a runtime unread.
    info: ModelInfo | None = None
    schema: Path | None = None
    #: The model's own folder, where it has one: files beside ``path`` that it may read.
    folder: Path | None = None
    lease: object = field(default=None, compare=False, repr=False)
