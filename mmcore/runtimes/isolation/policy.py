"""Which models are loaded into a worker process: what the instance demands, and else what the model's settings say."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from mmcore.model import ModelSource
from mmcore.runtimes.interface import LoadedModel
from mmcore.runtimes.isolation.group import IsolatedGroup
from mmcore.runtimes.isolation.model import IsolatedModel
from mmcore.runtimes.loading import load_model

#: Formats that are programs: reading one runs what its author put in it.
_UNTRUSTED: Final = frozenset({"python", "sklearn"})
#: A file of such a format that is data all the same.
_DATA_SUFFIX: Final = ".skops"


def policy_loader(policy: str, *, network: bool = False) -> Callable[[ModelSource], LoadedModel]:
    """What takes the place of ``load_model`` in an instance with one of ``config.ISOLATION_POLICIES``.

    A model's own settings can ask for more than the policy, never for less. ``network``: whether workers may use it.
    """
    return partial(_load, policy, network)


def _load(policy: str, network: bool, source: ModelSource) -> LoadedModel:
    if not is_isolated(source, policy):
        return load_model(source)
    instances = source.settings.instances
    if instances > 1:
        return IsolatedGroup(source, instances, network=network)
    return IsolatedModel(source, network=network)


def is_isolated(source: ModelSource, policy: str) -> bool:
    """Whether a version is to be loaded into a worker process."""
    if policy == "all" or source.settings.isolation == "process":
        return True
    return policy == "untrusted" and source.format in _UNTRUSTED and source.path.suffix.lower() != _DATA_SUFFIX
