"""From a model's name to the copy that answers, and everything that registers, loads and unloads models.

The surface: :class:`Router`, the rows of its index, and the :class:`Copy` it hands out.
"""

from mmcore.cache import Copy, CopyState
from mmcore.routing.router import IndexRow, Router

__all__ = ["Copy", "CopyState", "IndexRow", "Router"]
