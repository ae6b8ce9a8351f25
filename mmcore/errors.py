"""Every error a caller can see, each bound to one gRPC status.

An error's text goes to the client as it is, so it names what was wrong and never holds a traceback.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar, Self


class Status(IntEnum):
    """gRPC status codes (grpc/doc/statuscodes.md)."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class MmcoreError(Exception):
    """The root: raised only through its subclasses, caught at the boundary of a listener."""

    status: ClassVar[Status]

    def __new__(cls, *args: object, **fields: object) -> Self:
        """Refuse the root itself: an error without a status cannot be answered."""
        if not hasattr(cls, "status"):
            raise TypeError(f"{cls.__name__} has no status; raise a subclass")
        return super().__new__(cls, *args, **fields)


class InvalidRequest(MmcoreError):
    """The request contradicts the protocol or the model's signature."""

    status = Status.INVALID_ARGUMENT


class NotFound(MmcoreError):
    """No such model, version, region or method target."""

    status = Status.NOT_FOUND


class AlreadyExists(MmcoreError):
    """The name is taken by something else."""

    status = Status.ALREADY_EXISTS


class Overloaded(MmcoreError):
    """A queue, a limit or the capacity is full; the same call may succeed later."""

    status = Status.RESOURCE_EXHAUSTED


def no_thread(error: BaseException) -> Overloaded | None:
    """The error to answer where the system has refused a new thread: the interpreter has no class of its own for it."""
    if isinstance(error, RuntimeError) and str(error) == "can't start new thread":
        return Overloaded("the system lets this instance start no thread for this request; try again later")
    return None


class MessageTooLong(Overloaded):
    """A message, or what it decompresses to, is above the limit."""


class Unauthenticated(MmcoreError):
    """Nobody known: the call carries no token, or one that is in no file."""

    status = Status.UNAUTHENTICATED


class PermissionDenied(MmcoreError):
    """The caller is known and may not do this."""

    status = Status.PERMISSION_DENIED


class Conflict(MmcoreError):
    """What is there stands against the change: a model that vmodels refer to, a target other than expected."""

    status = Status.FAILED_PRECONDITION


class InvalidSetting(MmcoreError):
    """A file of settings says what cannot be; the text names the file and the field."""

    status = Status.INVALID_ARGUMENT


class LoadFailed(MmcoreError):
    """A model could not be loaded; the text tells the cause."""

    status = Status.FAILED_PRECONDITION


class InvalidModel(LoadFailed):
    """A model's files or settings say what cannot be; the text names the file and the field."""


class Unavailable(MmcoreError):
    """This instance or the other side cannot answer now."""

    status = Status.UNAVAILABLE


class DeadlineExceeded(MmcoreError):
    """The caller's deadline passed before the answer was there."""

    status = Status.DEADLINE_EXCEEDED


class Cancelled(MmcoreError):
    """The caller went away or took the call back."""

    status = Status.CANCELLED


class Unimplemented(MmcoreError):
    """The method, encoding or extension is not served here."""

    status = Status.UNIMPLEMENTED


class InferenceFailed(MmcoreError):
    """The model itself raised; the text is its exception's."""

    status = Status.INTERNAL


class RpcError(Exception):
    """What the other side of a call answered, its status kept as it came.

    Attributes:
        status: the gRPC status, an unknown number mapped to UNKNOWN.
        details: ``grpc-message``, decoded.
        trailers: the trailing metadata, names lower case, ``-bin`` values as bytes.
        lost: the connection ended before the answer, when the other side may have begun.
    """

    def __init__(
        self,
        status: Status,
        details: str,
        trailers: tuple[tuple[str, str | bytes], ...] = (),
        *,
        lost: bool = False,
    ) -> None:
        super().__init__(f"{status.name}: {details}")
        self.status = status
        self.details = details
        self.trailers = trailers
        self.lost = lost
