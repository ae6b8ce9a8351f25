cimport cython


cdef class Lru


cdef class Entry:
    cdef readonly object key
    cdef readonly Py_ssize_t weight
    cdef readonly Py_ssize_t pins
    # Borrowed; the list's dictionary keeps the neighbours alive.
    cdef void* newer
    cdef void* older
    cdef void* owner

    cdef void unlink(self) noexcept


@cython.final
cdef class Lru:
    cdef readonly Py_ssize_t total
    cdef void* newest_link
    cdef void* oldest_link
    cdef dict entries

    cdef int check_member(self, Entry entry) except -1
    cdef void put_newest(self, Entry entry) noexcept
    cdef void move_newest(self, Entry entry) noexcept
