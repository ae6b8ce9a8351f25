"""The copies held by this instance: states, sizes, loads, eviction and unloads.

The surface: a :class:`Cache` of :class:`Copy` objects, each in a :class:`CopyState`.
"""

from mmcore.cache.cache import Cache
from mmcore.cache.copies import Copy, CopyState

__all__ = ["Cache", "Copy", "CopyState"]
