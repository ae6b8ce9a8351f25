"""The copies held by this instance: states, sizes, loads, eviction and unloads.

The surface: a :class:`Cache` of :class:`Copy` objects, each in a :class:`CopyState`; loads have a :class:`Priority`.
"""

from mmcore.cache.cache import Cache
from mmcore.cache.copies import Copy, CopyState, LoadTimes
from mmcore.cache.loads import Priority

__all__ = ["Cache", "Copy", "CopyState", "LoadTimes", "Priority"]
