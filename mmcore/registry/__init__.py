"""The state that all instances share: models, vmodels, instances and the leader; each holds a replica of the tables.

The surface: :func:`open_registry` gives a :class:`Registry`; its tables are read without waiting, its writes are
transactions that compare what they replace.
"""

from mmcore.registry.memory import MemoryStore
from mmcore.registry.opening import open_registry, registry_url
from mmcore.registry.records import (
    CopyRecord,
    CorruptRecord,
    FailureRecord,
    InstanceRecord,
    LossRecord,
    ModelRecord,
    Record,
    VModelRecord,
)
from mmcore.registry.registry import Registry
from mmcore.registry.store import NotLeader
from mmcore.registry.table import Table

__all__ = [
    "CopyRecord",
    "CorruptRecord",
    "FailureRecord",
    "InstanceRecord",
    "LossRecord",
    "MemoryStore",
    "ModelRecord",
    "NotLeader",
    "Record",
    "Registry",
    "Table",
    "VModelRecord",
    "open_registry",
    "registry_url",
]
