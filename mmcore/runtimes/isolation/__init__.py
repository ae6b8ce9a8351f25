"""Models in processes of their own, so that one that crashes, hangs or eats memory harms only itself.

The serving process keeps an :class:`IsolatedModel`, which looks like any loaded model and hands each inference to its
worker, a fresh interpreter that has loaded the files. The worker runs code of the model's owner and is not trusted:
whatever it answers is checked, and ``confined.py`` takes from it what a model does not need.
"""

from mmcore.runtimes.isolation.group import Isolated, IsolatedGroup
from mmcore.runtimes.isolation.model import IsolatedModel
from mmcore.runtimes.isolation.policy import policy_loader
from mmcore.runtimes.isolation.totals import totals as worker_totals

__all__ = ["Isolated", "IsolatedGroup", "IsolatedModel", "policy_loader", "worker_totals"]
