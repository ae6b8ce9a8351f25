"""Ensembles of regression trees over FP32 features, evaluated as XGBoost does: for each row a sum of leaves, in FP32.

A tree is an array of nodes of 16 bytes; a model of a hundred small trees stays in the second cache. What the
library does around its own trees (an interface of text, threads, a matrix of its own) takes a hundred times as long as
the walk down the trees of one row.
"""

cimport cython
cimport numpy as cnp
from libc.math cimport expf, isnan
from libc.stdint cimport int32_t, uint8_t
from cpython.mem cimport PyMem_Free, PyMem_Malloc

import numpy as np

cnp.import_array()

cdef enum:
    IDENTITY = 0
    SIGMOID = 1
    EXPONENTIAL = 2
    SOFTMAX = 3
    LARGEST = 4

#: What becomes of a row's margins.
TRANSFORMS = {
    "identity": IDENTITY, "sigmoid": SIGMOID, "exponential": EXPONENTIAL, "softmax": SOFTMAX, "largest": LARGEST,
}

cdef struct Node:
    int32_t left        # from here on, in nodes; 0 of a leaf
    int32_t right
    int32_t feature     # which one is compared; its complement where a missing one goes right
    float value         # what it must be below to go left; of a leaf what it adds


@cython.final
cdef class Forest:
    """An ensemble for rows of ``width`` features, answering ``columns`` sums.

    ``trees`` are tuples (column, left, right, feature, value, default_left): the sum a tree adds to, and an entry for
    each node as XGBoost's files hold them (int32, int32, int32, float32, uint8; ``left`` is -1 of a leaf, whose value
    is what it adds; children come behind their parents). ``base`` [columns] FP32 is where the sums begin, or with
    ``base_last`` what they are raised by at the end. ``transform`` names what :meth:`values` makes of them.

    Raises:
        ValueError: a child, a feature or a column is outside the bounds, or arrays differ in length.
    """

    cdef Node* nodes
    cdef int32_t* roots
    cdef int32_t* groups
    cdef Py_ssize_t count
    cdef Py_ssize_t size
    cdef readonly Py_ssize_t width
    cdef readonly Py_ssize_t columns
    cdef float[::1] base
    cdef bint base_last
    cdef int transform

    def __cinit__(self):
        self.nodes = NULL
        self.roots = NULL
        self.groups = NULL

    def __init__(self, Py_ssize_t width, Py_ssize_t columns, trees, base, str transform, bint base_last=False):
        cdef Py_ssize_t at = 0
        cdef Py_ssize_t index
        trees = list(trees)
        self.width = width
        self.columns = columns
        self.base = np.ascontiguousarray(base, np.float32)
        self.base_last = base_last
        self.transform = TRANSFORMS[transform]
        self.count = len(trees)
        self.size = sum([len(tree[1]) for tree in trees])
        if self.base.shape[0] != columns:
            raise ValueError(f"{self.base.shape[0]} base values for {columns} columns")
        self.nodes = <Node*> PyMem_Malloc(max(1, self.size) * sizeof(Node))
        self.roots = <int32_t*> PyMem_Malloc(max(1, self.count) * sizeof(int32_t))
        self.groups = <int32_t*> PyMem_Malloc(max(1, self.count) * sizeof(int32_t))
        if self.nodes == NULL or self.roots == NULL or self.groups == NULL:
            raise MemoryError
        for index, (column, left, right, feature, value, default_left) in enumerate(trees):
            if not 0 <= column < columns:
                raise ValueError(f"tree {index} adds to column {column} of {columns}")
            self.roots[index] = <int32_t> at
            self.groups[index] = column
            at += self.take(index, at, left, right, feature, value, default_left)

    def __dealloc__(self):
        PyMem_Free(self.nodes)
        PyMem_Free(self.roots)
        PyMem_Free(self.groups)

    cdef Py_ssize_t take(
        self, Py_ssize_t tree, Py_ssize_t at, const int32_t[::1] left, const int32_t[::1] right,
        const int32_t[::1] feature, const float[::1] value, const uint8_t[::1] default_left,
    ) except -1:
        """Copy a tree's nodes to ``at`` on, and return how many they are."""
        cdef Py_ssize_t length = left.shape[0]
        cdef Py_ssize_t here
        cdef Node* node
        if length == 0 or {right.shape[0], feature.shape[0], value.shape[0], default_left.shape[0]} != {length}:
            raise ValueError(f"the arrays of tree {tree} differ in length")
        for here in range(length):
            node = &self.nodes[at + here]
            node.value = value[here]
            node.left = node.right = 0
            node.feature = 0
            if left[here] == -1:
                continue
            # A child behind its parent: every walk ends.
            if not (here < left[here] < length and here < right[here] < length):
                raise ValueError(f"node {here} of tree {tree} has a child that is not behind it")
            if not 0 <= feature[here] < self.width:
                raise ValueError(f"node {here} of tree {tree} looks at feature {feature[here]} of {self.width}")
            node.left = <int32_t> (left[here] - here)
            node.right = <int32_t> (right[here] - here)
            node.feature = feature[here] if default_left[here] else ~feature[here]
        return length

    def margins(self, features not None):
        """FP32 [rows, columns]: the sums, of ``features`` [rows, width]; a NaN is a missing value.

        Raises:
            ValueError: the features are no matrix of that width.
        """
        cdef const float[:, ::1] rows = np.ascontiguousarray(features, np.float32)
        if rows.shape[1] != self.width:
            raise ValueError(f"rows have {rows.shape[1]} features, the model takes {self.width}")
        found = np.empty((rows.shape[0], self.columns), np.float32)
        cdef float[:, ::1] sums = found
        with nogil:
            self.walk(rows, sums)
        return found

    def values(self, features not None):
        """FP32 [rows, columns], or [rows, 1] where the largest is chosen: what the transform makes of the margins."""
        found = self.margins(features)
        cdef float[:, ::1] sums = found
        cdef Py_ssize_t row
        if self.transform == LARGEST:
            return found.argmax(axis=1).astype(np.float32).reshape(-1, 1)
        with nogil:
            for row in range(sums.shape[0]):
                self.transformed(&sums[row, 0] if self.columns else NULL)
        return found

    cdef void walk(self, const float[:, ::1] rows, float[:, ::1] sums) noexcept nogil:
        cdef Py_ssize_t tree, row, column
        cdef const Node* root
        cdef const Node* node
        cdef const float* features
        cdef float value
        cdef int32_t feature
        for row in range(rows.shape[0]):
            for column in range(self.columns):
                sums[row, column] = 0 if self.base_last else self.base[column]
        for tree in range(self.count):
            root = &self.nodes[self.roots[tree]]
            column = self.groups[tree]
            for row in range(rows.shape[0]):
                features = &rows[row, 0]
                node = root
                while node.left:
                    feature = node.feature
                    if feature >= 0:
                        value = features[feature]
                        # Not "at least": a missing value compares as neither and goes left.
                        node += node.right if value >= node.value else node.left
                    else:
                        value = features[~feature]
                        node += node.left if value < node.value else node.right
                sums[row, column] += node.value
        if self.base_last:
            for row in range(rows.shape[0]):
                for column in range(self.columns):
                    sums[row, column] += self.base[column]

    cdef void transformed(self, float* sums) noexcept nogil:
        """One row in place, operation for operation as the library (src/common/math.h there)."""
        cdef Py_ssize_t column
        cdef float largest
        cdef double total
        if self.transform == SIGMOID:
            for column in range(self.columns):
                sums[column] = sigmoid(sums[column])
        elif self.transform == EXPONENTIAL:
            for column in range(self.columns):
                sums[column] = expf(sums[column])
        elif self.transform == SOFTMAX:
            largest = sums[0]
            for column in range(1, self.columns):
                largest = max(largest, sums[column])
            total = 0
            for column in range(self.columns):
                sums[column] = expf(sums[column] - largest)
                total += sums[column]
            for column in range(self.columns):
                sums[column] /= <float> total


cdef inline float sigmoid(float margin) noexcept nogil:
    # Beyond, the power leaves the range of FP32.
    cdef float power = -margin if -margin < <float> 88.7 or isnan(margin) else <float> 88.7
    return <float> 1.0 / (expf(power) + <float> 1.0 + <float> 1e-16)
