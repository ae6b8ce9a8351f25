"""Warnings that a framework gives while it loads a model go to the log, under that model's name.

``warnings.catch_warnings`` swaps the process's state and is not safe with several loading threads, so a hook stands
where Python shows warnings and asks which model its thread is loading.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

log = logging.getLogger(__name__)

_loading = threading.local()
_shown_before = warnings.showwarning


@contextmanager
def logged_for(model: str) -> Iterator[None]:
    """Log the warnings of this thread as ``model``'s until the block ends."""
    global _shown_before
    if warnings.showwarning is not _show:
        _shown_before = warnings.showwarning
        warnings.showwarning = _show
    _loading.model = model
    try:
        yield
    finally:
        _loading.model = None


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    model = getattr(_loading, "model", None)
    if model is None:
        _shown_before(message, category, filename, lineno, file, line)
    else:
        log.warning("model %r: %s: %s", model, category.__name__, str(message).strip())
