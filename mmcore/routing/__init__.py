"""From a model's name to the copy that answers, and everything that registers, loads and unloads models.

The surface: :class:`Router`, the rows of its index, and the :class:`Copy` it hands out; of the registry's models
:class:`Registered`, :class:`VModels` and :class:`Transitions`; and :class:`Names`, from what a request says to a model.
"""

from mmcore.cache import Copy, CopyState
from mmcore.routing.names import Kind, Names
from mmcore.routing.registered import Loads, LocalLoads, Registered
from mmcore.routing.router import IndexRow, Router
from mmcore.routing.status import ModelState, ModelStatus
from mmcore.routing.transitions import Transitions
from mmcore.routing.vmodel_changes import Wanted, in_transition
from mmcore.routing.vmodels import VModels, VModelStatus

__all__ = [
    "Copy",
    "CopyState",
    "IndexRow",
    "Kind",
    "Loads",
    "LocalLoads",
    "ModelState",
    "ModelStatus",
    "Names",
    "Registered",
    "Router",
    "Transitions",
    "VModelStatus",
    "VModels",
    "Wanted",
    "in_transition",
]
