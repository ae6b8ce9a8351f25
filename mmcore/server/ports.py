"""What a port that cannot be listened on is told by: the reason, and the option to change."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from mmcore.errors import Unavailable


@contextmanager
def listening(host: str, port: int, option: str) -> Iterator[None]:
    """Inside the block a port is bound, which ``option`` chooses.

    Raises:
        Unavailable: it cannot be, as the system says.
    """
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise Unavailable(
            f"cannot listen on {host}:{port}: {reason}; choose another --host or {option} (0 picks a free port)"
        ) from error
