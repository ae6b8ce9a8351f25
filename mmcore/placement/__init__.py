"""Where copies of models live: decisions as functions of a view, without a clock, I/O or await.

The view is a :class:`Cluster` of instances, kept up to date record by record, and a :class:`Model` for the model in
question. Decisions return ids or lists of actions (:class:`Load`, :class:`Drop`, :class:`Move`) and note the loads they
plan as reservations in the cluster, so that the next decision counts them; ``bench/sim`` runs the same code for a
thousand instances in virtual time. The policies:

- A copy goes where the least harm is done (:func:`place`): into room, fullest last; else where what must be evicted has
  been idle longest; away from queues of loads, traffic, older versions; into other zones than its siblings. Each model
  has its own few candidates, found by hashing: instances that decide at once without talking to each other agree on
  one model and differ on different ones, and a model that returns finds its files on the disk it left.
- A request goes to the local copy unless it is overloaded, else to the cheaper of two copies drawn, by requests in
  flight and measured latency (:func:`choose`).
- Copies follow use (:func:`scale`): more for rate, concurrency or queueing, a second for steady use, fewer only when
  the rest would be far from busy, so that constant load never makes copies come and go.
- A hot instance hands busy or large copies to calm ones (:func:`relieve`); a model evicted in one place moves
  into room elsewhere (:func:`evicted`); new instances are filled before they are asked (:func:`fill`); one that leaves
  hands over first what is used most (:func:`drain`); what a dead one held is pruned (:func:`prune`).
"""

from mmcore.placement.actions import Drop, Load, Move, NoPlace
from mmcore.placement.choice import Traffic, choose, serving
from mmcore.placement.cluster import Cluster
from mmcore.placement.constraints import TypeConstraints
from mmcore.placement.instances import Instance, Member
from mmcore.placement.leaving import drain, prune
from mmcore.placement.models import Copy, CopyState, Demand, Model
from mmcore.placement.moves import evicted, fill, has_room, relieve
from mmcore.placement.places import place
from mmcore.placement.scaling import DEFAULT_POLICY, Policy, decider, scale

__all__ = [
    "DEFAULT_POLICY",
    "Cluster",
    "Copy",
    "CopyState",
    "Demand",
    "Drop",
    "Instance",
    "Load",
    "Member",
    "Model",
    "Move",
    "NoPlace",
    "Policy",
    "Traffic",
    "TypeConstraints",
    "choose",
    "decider",
    "drain",
    "evicted",
    "fill",
    "has_room",
    "place",
    "prune",
    "relieve",
    "scale",
    "serving",
]
