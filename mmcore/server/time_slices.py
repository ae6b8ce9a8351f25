"""How long a thread of this process may keep a processor core from another one that has woken up (sched_setattr(2)).

Linux lets a running thread finish its slice, some 3 ms, though a request has come for another thread: the loop waits
for a load in a thread beside it wherever they share a core. Since Linux 6.12 a process may choose a shorter slice; the
share of the core that each thread gets stays what it was. With the loop's slice alone being short, loads that hold
Python's lock are kept from the core so that the loop waits for the lock: all threads have to have it.
"""

from __future__ import annotations

import ctypes
import os
import platform
from typing import Final

#: The shortest there is.
SLICE_NS: Final = 100_000

#: The system call's number; of machines that are not listed here the slices stay as they are.
_SETATTR: Final = {"x86_64": 314, "aarch64": 274}
_GETATTR: Final = {"x86_64": 315, "aarch64": 275}


class _Attributes(ctypes.Structure):
    """struct sched_attr, in its first version."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )


def take_short_slices() -> bool:
    """Give this thread, and those that it starts from now on, short slices; whether the kernel took it.

    Kernels before 6.12 take it and change nothing. A process that somebody has given another policy, such as a
    real-time one, keeps that.
    """
    number = _SETATTR.get(platform.machine())
    if number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = _Attributes(ctypes.sizeof(_Attributes), os.SCHED_OTHER, 0, nice, 0, SLICE_NS, 0, 0)
    return _call(number, ctypes.byref(attributes), 0)


def slice_ns() -> int | None:
    """The calling thread's slice; None where it cannot be told, as before Linux 6.12."""
    number = _GETATTR.get(platform.machine())
    attributes = _Attributes()
    size = ctypes.sizeof(attributes)
    if number is None or not _call(number, ctypes.byref(attributes), size, 0):
        return None
    return attributes.runtime or None


def _call(number: int, attributes: object, *rest: int) -> bool:
    """A system call about the calling thread; whether it succeeded."""
    return bool(ctypes.CDLL(None).syscall(number, 0, attributes, *rest) == 0)
