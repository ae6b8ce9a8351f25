"""The worker's own program: loads one model and answers the serving process until that closes the connection.

Called by ``confined.py`` with the arguments ``SOCKET INPUTS OUTPUTS PARENT``: three open descriptors and the parent's
process id. Requests come and are answered one at a time.
"""

from __future__ import annotations

import ctypes
import logging
import os
import pickle
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Final

from mmcore.errors import InferenceFailed, LoadFailed, MmcoreError, Overloaded
from mmcore.model import ModelSource
from mmcore.runtimes.failures import describe
from mmcore.runtimes.interface import LoadedModel
from mmcore.runtimes.isolation.frames import (
    INLINE_BYTES,
    Described,
    Kind,
    Packed,
    description_frame,
    error_frame,
    output_tensors,
    receive,
    size_frame,
    unpack,
)
from mmcore.runtimes.isolation.segment import Segment
from mmcore.runtimes.loading import load_model

_PR_SET_PDEATHSIG: Final = 1


class Worker:
    """One model and the connection it is asked through."""

    def __init__(self, sock: socket.socket, inputs: Segment, outputs: Segment) -> None:
        self._sock = sock
        self._name = ""
        self._inputs = inputs
        self._outputs = outputs
        self._input_names: tuple[str, ...] = ()
        self._output_names: tuple[str, ...] = ()
        self._places: dict[str, int] = {}

    def run(self) -> None:
        """Load what is ordered and answer until the connection ends."""
        order = receive(self._sock)
        if order is None:
            return
        # From the process that started this one, which is trusted; the other way nothing is pickled.
        source, memory_bytes = pickle.loads(order[1][8:])  # noqa: S301
        self._name = source.name
        _limit(memory_bytes)
        model = self._load(source)
        if model is None:
            return
        while (request := receive(self._sock)) is not None:
            self._sock.sendall(self._answer(model, request[1], memory_bytes))
            del request
        model.close()

    def _load(self, source: ModelSource) -> LoadedModel | None:
        try:
            model = load_model(source)
            described = Described(
                platform=model.platform,
                inputs=model.inputs,
                outputs=model.outputs,
                default_outputs=tuple(model.default_outputs),
                any_input_name=model.any_input_name,
                accepts={name: tuple(taken) for name, taken in model.accepts.items()},
            )
        except (Exception, SystemExit) as error:
            known = error if isinstance(error, MmcoreError) else LoadFailed(f"model '{source.name}': {describe(error)}")
            self._sock.sendall(error_frame(known))
            return None
        self._input_names = tuple(spec.name for spec in model.inputs)
        self._output_names = tuple(spec.name for spec in model.outputs)
        self._places = {name: place for place, name in enumerate(self._output_names)}
        self._sock.sendall(description_frame(described))
        return model

    def _answer(self, model: LoadedModel, request: bytes, memory_bytes: int | None) -> bytes:
        """The frame that answers a request."""
        try:
            return self._infer(model, request)
        except (Exception, SystemExit) as error:
            if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
                limit = f" (its limit is {memory_bytes} bytes)" if memory_bytes else ""
                return error_frame(Overloaded(f"model '{self._name}' ran out of memory{limit}"))
            return error_frame(error if isinstance(error, MmcoreError) else InferenceFailed(describe(error)))

    def _infer(self, model: LoadedModel, request: bytes) -> bytes:
        self._inputs.follow()
        asked = unpack(request, self._inputs)
        inputs = {self._input_names[place]: array for place, _, array in asked.tensors}
        outputs = model.infer(inputs, tuple(self._output_names[place] for place in asked.places))
        packed = Packed(output_tensors(outputs, self._places))
        if packed.total > max(INLINE_BYTES, self._outputs.size):
            self._sock.sendall(size_frame(Kind.NEED, packed.total))
            granted = receive(self._sock)
            if granted is None:
                return b""
            if granted[0] is not Kind.GROWN:
                raise InferenceFailed(f"the answer of {packed.total} bytes is longer than a worker may give")
            self._outputs.follow()
        return packed.frame(Kind.ANSWER, (), self._outputs)


def main(arguments: Sequence[str]) -> int:
    """Run a worker; see the module. The exit code is 0 when the connection was closed."""
    sock_fd, inputs_fd, outputs_fd, parent = map(int, arguments)
    # Whatever becomes of the serving process, this one does not outlive it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return 1
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(message)s", level=logging.INFO)
    with socket.socket(fileno=sock_fd) as sock:
        Worker(sock, Segment(inputs_fd), Segment(outputs_fd)).run()
    return 0


def _limit(memory_bytes: int | None) -> None:
    """Let this process have no more memory than that, for good."""
    if memory_bytes is not None:
        # Private writable memory; of the address space frameworks reserve much more than they use.
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
