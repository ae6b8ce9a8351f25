"""What instances tell each other beside a request: how it may be answered, how far it has come and who was asked.

What an instance works at goes back with its answers (``mmcore-working``, ``ext/h2server.pyx``) whenever it has changed.
Requests carry the rest as metadata named ``mmcore-…``, which the transport drops where a request does not come from
another instance (``ServerSession.internal``), and which never leaves with an answer to a client.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from enum import StrEnum
from typing import Any, Final, NamedTuple

from mmcore.errors import MmcoreError, Status
from mmcore.transport import ClientCall, ServerCall

#: A request is passed on at most so often: from where it came in to an instance that is to load the model, and from
#: there to one that has loaded it meanwhile.
MAX_HOPS: Final = 2

_FORWARD: Final = "mmcore-forward"
_MODEL: Final = "mmcore-model-bin"
_NOT_HERE: Final = "mmcore-not-here"


class Mode(StrEnum):
    """How the instance that a request was passed on to may answer it."""

    #: With a copy that is loaded or being loaded there, or else with :func:`not_here`.
    HIT = "hit"
    #: By loading the model there, or from another instance that has it.
    LOAD = "load"


class Arrival(NamedTuple):
    """How a request has come here from another instance.

    ``hops`` counts the times it was passed on, ``tried`` names the instances that are not to be asked again, and
    ``model`` is the concrete model's name where the sender has resolved it, else empty.
    """

    mode: Mode
    hops: int
    tried: tuple[str, ...]
    model: str

    @property
    def goes_on(self) -> bool:
        """Whether it may be passed on once more."""
        return self.mode is Mode.LOAD and self.hops < MAX_HOPS


def arrival_of(call: Any) -> Arrival | None:
    """How a call has come from another instance; None for one that came from a client.

    ``call`` is a call of the transport or one request of a stream. What cannot be read goes no further than here.
    """
    if isinstance(call, ServerCall) and not call.internal:
        return None
    found = dict(call.metadata)
    text = found.get(_FORWARD)
    if text is None:
        return None
    model = found.get(_MODEL, b"")
    name = model.decode(errors="replace") if isinstance(model, bytes) else model
    mode, _, rest = str(text).partition(" ")
    hops, _, tried = rest.partition(" ")
    if mode not in (Mode.HIT, Mode.LOAD) or not hops.isdecimal():
        return Arrival(Mode.HIT, MAX_HOPS, (), name)
    return Arrival(Mode(mode), int(hops), tuple(tried.split(",")) if tried else (), name)


def hop_headers(mode: Mode, hops: int, tried: Iterable[str], model: str = "") -> list[tuple[bytes, bytes]]:
    """The metadata, encoded, of a request that is passed on for the ``hops``-th time."""
    headers = [(_FORWARD.encode(), f"{mode} {hops} {','.join(tried)}".encode())]
    if model:
        headers.append((_MODEL.encode(), base64.b64encode(model.encode())))
    return headers


def not_here(call: Any, instance: str, failure: MmcoreError | None = None) -> None:
    """Answer, as ``instance``, that there is no copy of the model here: the sender asks another one.

    ``failure`` is why, where it is more than that.
    """
    call.set_trailers([(_NOT_HERE, instance)])
    if failure is None:
        call.fail(Status.UNAVAILABLE, f"instance {instance} has no copy of the model")
    else:
        call.fail(failure.status, str(failure))


def says_not_here(call: ClientCall) -> bool:
    """Whether this is the answer of :func:`not_here`."""
    return any(name == _NOT_HERE for name, _ in call.trailers)
