"""Where inference runs: on the loop when that is cheaper than handing it over, otherwise in a thread.

The surface: :class:`Execution`.
"""

from mmcore.batching.execution import Caller, Done, Execution

__all__ = ["Caller", "Done", "Execution"]
