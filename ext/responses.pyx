"""Answers that are given again to the same request: a store for the whole instance, and a shelf in it for each copy.

A request is the same when its bytes are, but for its id: model, version, outputs asked for and tensors are all in them.
A shelf belongs to one copy of one version, so that a model loaded anew never answers for its predecessor. Calls are
made on the loop's thread.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t

from mmcore._ext.lru cimport Entry, Lru
from mmcore._ext.pbwire cimport LENGTH, field_size, length_field, prefix_start
from mmcore._ext.v2codec cimport InferRequest, id_of
from mmcore._ext.v2layout cimport MESSAGE_ID

from hashlib import sha256

cdef enum:
    # Longer requests are remembered by their digest.
    LONGEST_KEY = 512
    # What an answer takes beside its bytes: three objects and two places in dictionaries.
    OVERHEAD = 400


@cython.final
cdef class Response(Entry):
    """One answer, without an id."""


@cython.final
cdef class ResponseCache:
    """The answers of an instance, the least recently used of which make room for others.

    Attributes:
        capacity_bytes: what they may take together, with the requests that they are found by.
    """

    def __init__(self, Py_ssize_t capacity_bytes):
        self.capacity_bytes = capacity_bytes
        self.responses = Lru()

    @property
    def size_bytes(self) -> int:
        """What the answers take now."""
        return self.responses.total

    def __len__(self) -> int:
        return len(self.responses)

    cdef int add(self, Response response) except -1:
        cdef Response oldest
        while self.responses.total + response.weight > self.capacity_bytes:
            oldest = <Response> self.responses.oldest()
            oldest.shelf.drop(oldest)
        self.responses.add(response)
        return 0


@cython.final
cdef class Shelf:
    """The answers of one copy, whose responses all begin with ``head``: the fields of its name and version."""

    def __init__(self, ResponseCache cache not None, str name not None, str version not None):
        self.cache = cache
        self.found = {}
        self.head_size = field_size(len(name.encode())) + field_size(len(version.encode()))

    cdef bytes find(self, InferRequest request):
        """The answer to a request, or None."""
        cdef Response response = self.found.get(key_of(request))
        if response is None:
            return None
        self.cache.responses.move_newest(response)
        if not request.layout.id.size:
            return response.message
        return (
            response.message[:self.head_size]
            + length_field(MESSAGE_ID, id_of(request).encode())
            + response.message[self.head_size:]
        )

    cdef int keep(self, InferRequest request, message) except -1:
        """Remember the encoded answer to a request, unless it would need the whole store."""
        cdef Response response
        cdef bytes key = key_of(request)
        cdef bytes whole = b"".join(message) if isinstance(message, list) else bytes(message)
        cdef Py_ssize_t weight
        if request.layout.id.size:
            whole = whole[:self.head_size] + whole[self.head_size + field_size(request.layout.id.size):]
        weight = PyBytes_GET_SIZE(key) + PyBytes_GET_SIZE(whole) + OVERHEAD
        if self.closed or weight > self.cache.capacity_bytes or key in self.found:
            return 0
        self.cache.made += 1
        response = Response(self.cache.made, weight)
        response.request = key
        response.message = whole
        response.shelf = self
        self.cache.add(response)
        self.found[key] = response
        return 0

    cdef int drop(self, Response response) except -1:
        self.cache.responses.remove(response)
        del self.found[response.request]
        return 0

    def close(self) -> None:
        """Forget all answers, and take no more."""
        cdef Response response
        self.closed = True
        for response in list(self.found.values()):
            self.drop(response)


cdef bytes key_of(InferRequest request):
    """A request's bytes without the field of its id, or where they are long a digest, which is no message for its zero.

    An id whose tag is written in more bytes than it needs stays.
    """
    cdef bytes body = request.body
    cdef const uint8_t* base = <const uint8_t*> PyBytes_AS_STRING(body)
    cdef Py_ssize_t start
    if request.layout.id.size:
        start = prefix_start(base, request.layout.id) - 1
        if base[start] == (MESSAGE_ID << 3 | LENGTH):
            body = body[:start] + body[request.layout.id.at + request.layout.id.size:]
    if PyBytes_GET_SIZE(body) <= LONGEST_KEY:
        return body
    return b"\0" + sha256(body).digest()
