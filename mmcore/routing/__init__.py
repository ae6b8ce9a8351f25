"""From a model's name to the copy that answers, and everything that registers, loads and unloads models.

The surface: :class:`Router`, the rows of its index, and the :class:`Copy` it hands out; of the registry's models
:class:`Registered`, :class:`VModels` and :class:`Transitions`; :class:`Names`, from what a request says to a model; and
of the other instances :class:`Members`, :class:`Forwarding` and :class:`Mesh`.
"""

from mmcore.cache import Copy, CopyState
from mmcore.routing.forwarding import Forwarding
from mmcore.routing.known import IndexRow
from mmcore.routing.members import Members
from mmcore.routing.mesh import Mesh
from mmcore.routing.names import Kind, Names
from mmcore.routing.refilling import Refilling
from mmcore.routing.registered import Loads, LocalLoads, Registered
from mmcore.routing.router import Router
from mmcore.routing.status import ModelState, ModelStatus
from mmcore.routing.transitions import Transitions
from mmcore.routing.vmodel_changes import Wanted, in_transition
from mmcore.routing.vmodels import VModels, VModelStatus

__all__ = [
    "Copy",
    "CopyState",
    "Forwarding",
    "IndexRow",
    "Kind",
    "Loads",
    "LocalLoads",
    "Members",
    "Mesh",
    "ModelState",
    "ModelStatus",
    "Names",
    "Refilling",
    "Registered",
    "Router",
    "Transitions",
    "VModelStatus",
    "VModels",
    "Wanted",
    "in_transition",
]
