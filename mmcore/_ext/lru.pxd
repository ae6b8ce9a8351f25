cimport cython
from libc.stdint cimport uint32_t


cdef class Lru


# A place in the chain. Plain C, so that relinking neither counts references nor reads the neighbours.
cdef struct Link:
    Link* newer
    Link* older


# What a touch reads and writes comes first, beside the reference count: mostly one line of the processor's cache.
# There is no virtual table for the same reason.
cdef class Entry:
    # Borrowed, NULL outside a list; the list's dictionary keeps its entries alive.
    cdef void* owner
    cdef Link link
    cdef readonly uint32_t uses
    cdef readonly uint32_t used_at
    cdef readonly Py_ssize_t weight
    cdef readonly Py_ssize_t pins
    cdef readonly object key


@cython.final
cdef class Lru:
    cdef readonly Py_ssize_t total
    cdef readonly Py_ssize_t pinned
    cdef public uint32_t now
    # The chain is a ring through this link: its older side is the newest entry, its newer side the oldest.
    cdef Link ends
    cdef dict entries

    cdef int check_member(self, Entry entry) except -1
    cdef void put_newest(self, Link* link) noexcept
    cdef void put_at_its_time(self, Entry entry) noexcept
    cdef void move_newest(self, Entry entry) noexcept
