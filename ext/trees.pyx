"""Ensembles of trees over FP32 features, evaluated as XGBoost does, for each row a sum of leaves in FP32, or as
scikit-learn's forests do, the mean of leaves in FP64.

A tree of XGBoost's is an array of nodes of 16 bytes; a model of a hundred small trees stays in the second cache. What
the library does around its own trees (an interface of text, threads, a matrix of its own) takes a hundred times as long
as the walk down the trees of one row. scikit-learn's trees are walked where they lie: a call of numpy's for each of
them takes a hundred times as long as well.
"""

cimport cython
cimport numpy as cnp
from libc.math cimport expf, isnan
from libc.stdint cimport int32_t, int64_t, uint8_t
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

cdef enum:
    # Trees of so many rows take as long as letting another thread run and waiting for one's turn again.
    FEW_WALKS = 512

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


cdef struct Grown:
    const char* nodes
    const char* leaves
    Py_ssize_t leaf_stride


@cython.final
cdef class MeanForest:
    """A forest for rows of ``width`` features, answering the mean of its trees' leaves in ``columns`` columns.

    ``trees`` are pairs of arrays as scikit-learn's trees hold them, which are used where they lie: nodes with the
    fields ``left_child``, ``right_child``, ``feature`` (int64; a leaf's left child is -1) and ``threshold`` (float64; a
    row goes left up to it), and FP64 [nodes, columns], of which the rows of leaves are answered.

    Raises:
        ValueError: a child or a feature is outside the bounds, or arrays are of other lengths or dtypes.
    """

    cdef Grown* trees
    cdef list kept
    cdef readonly Py_ssize_t width
    cdef readonly Py_ssize_t columns
    cdef Py_ssize_t count
    cdef Py_ssize_t stride
    cdef Py_ssize_t left_at
    cdef Py_ssize_t right_at
    cdef Py_ssize_t feature_at
    cdef Py_ssize_t threshold_at

    def __cinit__(self):
        self.trees = NULL

    def __init__(self, Py_ssize_t width, Py_ssize_t columns, trees):
        self.kept = list(trees)
        self.width = width
        self.columns = columns
        self.count = len(self.kept)
        if self.count == 0:
            raise ValueError("a forest without trees has no mean")
        dtype = self.kept[0][0].dtype
        fields = dtype.fields or {}
        for name, kind in (("left_child", "i8"), ("right_child", "i8"), ("feature", "i8"), ("threshold", "f8")):
            if name not in fields or fields[name][0] != np.dtype(kind):
                raise ValueError(f"nodes have no field {name} of {kind}")
        self.stride = dtype.itemsize
        self.left_at, self.right_at, self.feature_at, self.threshold_at = [
            fields[name][1] for name in ("left_child", "right_child", "feature", "threshold")
        ]
        self.trees = <Grown*> PyMem_Malloc(self.count * sizeof(Grown))
        if self.trees == NULL:
            raise MemoryError
        for index, (nodes, leaves) in enumerate(self.kept):
            if nodes.dtype != dtype or nodes.ndim != 1 or not nodes.flags.c_contiguous or not len(nodes):
                raise ValueError(f"the nodes of tree {index} are no list of those of the first")
            if leaves.dtype != np.float64 or leaves.shape != (len(nodes), columns) or leaves.strides[1] != 8:
                raise ValueError(f"the leaves of tree {index} are no FP64 [{len(nodes)}, {columns}]")
            self.trees[index].nodes = cnp.PyArray_BYTES(nodes)
            self.trees[index].leaves = cnp.PyArray_BYTES(leaves)
            self.trees[index].leaf_stride = leaves.strides[0]
            self.check(index, len(nodes))

    def __dealloc__(self):
        PyMem_Free(self.trees)

    cdef int check(self, Py_ssize_t index, Py_ssize_t length) except -1:
        """See that no node leads out of its tree or back."""
        cdef Py_ssize_t here
        cdef const char* node
        cdef int64_t left, right, feature
        for here in range(length):
            node = self.trees[index].nodes + here * self.stride
            left = (<const int64_t*> (node + self.left_at))[0]
            if left == -1:
                continue
            right = (<const int64_t*> (node + self.right_at))[0]
            feature = (<const int64_t*> (node + self.feature_at))[0]
            # A child behind its parent: every walk ends.
            if not (here < left < length and here < right < length):
                raise ValueError(f"node {here} of tree {index} has a child that is not behind it")
            if not 0 <= feature < self.width:
                raise ValueError(f"node {here} of tree {index} looks at feature {feature} of {self.width}")
        return 0

    def means(self, features not None):
        """FP64 [rows, columns] for ``features`` [rows, width], which are taken in FP32 and have no NaN.

        Raises:
            ValueError: the features are no matrix of that width.
        """
        cdef const float[:, ::1] rows = np.ascontiguousarray(features, np.float32)
        if rows.shape[1] != self.width:
            raise ValueError(f"rows have {rows.shape[1]} features, the forest takes {self.width}")
        found = np.zeros((rows.shape[0], self.columns))
        cdef double[:, ::1] sums = found
        if rows.shape[0] * self.count < FEW_WALKS:
            self.walk(rows, sums)
        else:
            with nogil:
                self.walk(rows, sums)
        return found

    cdef void walk(self, const float[:, ::1] rows, double[:, ::1] sums) noexcept nogil:
        cdef Py_ssize_t tree, row, column
        cdef int64_t at, left
        cdef const char* node
        cdef const double* leaf
        cdef const Grown* grown
        for tree in range(self.count):
            grown = &self.trees[tree]
            for row in range(rows.shape[0]):
                at = 0
                while True:
                    node = grown.nodes + at * self.stride
                    left = (<const int64_t*> (node + self.left_at))[0]
                    if left == -1:
                        break
                    if rows[row, (<const int64_t*> (node + self.feature_at))[0]] <= (
                        <const double*> (node + self.threshold_at)
                    )[0]:
                        at = left
                    else:
                        at = (<const int64_t*> (node + self.right_at))[0]
                leaf = <const double*> (grown.leaves + at * grown.leaf_stride)
                for column in range(self.columns):
                    sums[row, column] += leaf[column]
        for row in range(rows.shape[0]):
            for column in range(self.columns):
                sums[row, column] /= <double> self.count
