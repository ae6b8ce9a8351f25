cimport cython


cdef class Lru


# A place in the chain. Plain C, so that relinking neither counts references nor reads the neighbours.
cdef struct Link:
    Link* newer
    Link* older
    void* entry


cdef class Entry:
    cdef Link link
    # Borrowed, NULL outside a list; the list's dictionary keeps its entries alive.
    cdef void* owner
    cdef readonly Py_ssize_t weight
    cdef readonly Py_ssize_t pins
    cdef readonly object key

    cdef void unlink(self) noexcept


@cython.final
cdef class Lru:
    cdef readonly Py_ssize_t total
    # The chain is a ring through this link: its older side is the newest entry, its newer side the oldest.
    cdef Link ends
    cdef dict entries

    cdef int check_member(self, Entry entry) except -1
    cdef void put_newest(self, Link* link) noexcept
    cdef void move_newest(self, Entry entry) noexcept
