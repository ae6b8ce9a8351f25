"""Requests of one model put together along their first axis, and the answer to all of them taken apart again.

Whether rows may be put together at all is the caller's to know; here it is only seen that the arrays allow it.
"""

cimport numpy as cnp
from cpython.dict cimport PyDict_GetItem, PyDict_Next
from cpython.object cimport PyObject
from cpython.sequence cimport PySequence_GetSlice
from libc.stdint cimport int64_t

cnp.import_array()


cdef int64_t common_rows(dict inputs, int64_t* size_bytes) noexcept:
    """The first dimension that all arrays have in common, -1 where it is 0, differs or is missing."""
    cdef Py_ssize_t position = 0
    cdef PyObject* key
    cdef PyObject* value
    cdef cnp.ndarray array
    cdef int64_t rows = -1
    size_bytes[0] = 0
    while PyDict_Next(inputs, &position, &key, &value):
        if not cnp.PyArray_Check(<object> value):
            return -1
        array = <cnp.ndarray> value
        if cnp.PyArray_NDIM(array) == 0:
            return -1
        if rows == -1:
            rows = cnp.PyArray_DIM(array, 0)
        if rows == 0 or rows != cnp.PyArray_DIM(array, 0):
            return -1
        size_bytes[0] += cnp.PyArray_NBYTES(array)
    return rows


cdef bint mergeable(dict one, dict other) noexcept:
    """Whether two requests have the same inputs in the same dtypes and dimensions, but for the first one."""
    cdef Py_ssize_t position = 0
    cdef PyObject* key
    cdef PyObject* value
    cdef PyObject* found
    cdef cnp.ndarray left
    cdef cnp.ndarray right
    cdef int axis
    if len(one) != len(other):
        return False
    while PyDict_Next(one, &position, &key, &value):
        found = PyDict_GetItem(other, <object> key)
        if found == NULL:
            return False
        left = <cnp.ndarray> value
        right = <cnp.ndarray> found
        if cnp.PyArray_TYPE(left) != cnp.PyArray_TYPE(right) or cnp.PyArray_NDIM(left) != cnp.PyArray_NDIM(right):
            return False
        for axis in range(1, cnp.PyArray_NDIM(left)):
            if cnp.PyArray_DIM(left, axis) != cnp.PyArray_DIM(right, axis):
                return False
    return True


cdef dict merged(list members):
    """The inputs of all members as those of one request, in their order."""
    cdef dict together = {}
    cdef dict member
    for name in <dict> members[0]:
        together[name] = cnp.PyArray_Concatenate([member[name] for member in members], 0)
    return together


cdef list parted(outputs, list rows):
    """The outputs of each member by its number of rows; None where an output does not have a row for each."""
    cdef int64_t total = sum(rows)
    cdef int64_t count
    cdef int64_t at = 0
    cdef list parts = []
    for _, _, array in outputs:
        if not cnp.PyArray_Check(array) or cnp.PyArray_NDIM(<cnp.ndarray> array) == 0:
            return None
        if cnp.PyArray_DIM(<cnp.ndarray> array, 0) != total:
            return None
    for count in rows:
        parts.append(
            [(name, datatype, PySequence_GetSlice(array, at, at + count)) for name, datatype, array in outputs]
        )
        at += count
    return parts


def rows_together(dict inputs not None) -> int:
    """The number of rows of a request that can be put together with others, -1 for one that cannot."""
    cdef int64_t size_bytes
    return common_rows(inputs, &size_bytes)


def can_merge(dict one not None, dict other not None) -> bool:
    """Whether two requests that both have rows can be put together."""
    return mergeable(one, other)


def merge(list members not None) -> dict:
    """The inputs of several requests, each that of :func:`can_merge` with the first, as those of one."""
    return merged(members)


def part(outputs, list rows not None) -> list | None:
    """The answer to a merged request as one list of outputs for each member, views of the whole.

    ``rows`` are the members' numbers of rows. None where an output is not as long as all of them together.
    """
    return parted(outputs, rows)
