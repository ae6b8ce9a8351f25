"""ModelInferRequest and ModelInferResponse between wire bytes and numpy, without the protobuf runtime.

A message is checked once as a whole (wire format, UTF-8, nesting) and noted down as places in its bytes; Python
objects are made when they are asked for. Arrays are views over the body and keep it alive. The protobuf rules
hold: the last occurrence of a singular field wins, submessages are merged, unknown fields are skipped.
Objects here may move between threads under the GIL; none is changed after it was made.
"""

cimport cython
cimport numpy as cnp
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_SetItem
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from cpython.tuple cimport PyTuple_New, PyTuple_SET_ITEM
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from mmcore._ext.pbwire cimport (
    FIXED64, LENGTH, VARINT, Cursor, Span, read_length, read_tag, read_varint, skip_value, valid_utf8,
)
from mmcore._ext.tensor cimport (
    MAX_RANK, UNKNOWN, array_from_contents, array_over, checked_array, datatype_code, datatype_name, scan_contents,
    shape_text,
)

from mmcore._ext.v2encode import Param, encode_infer_request, encode_infer_response
from mmcore.errors import InvalidRequest

cdef extern from "Python.h":
    const char* PyUnicode_AsUTF8AndSize(object text, Py_ssize_t* size) except NULL
    object PyUnicode_DecodeUTF8(const char* text, Py_ssize_t size, const char* errors)
    bint PyUnicode_IS_ASCII(object text)
    void* PyUnicode_DATA(object text)
    Py_ssize_t PyUnicode_GET_LENGTH(object text)

cnp.import_array()

# Fields of ModelInferRequest and ModelInferResponse; `tensors` are a request's inputs and a response's outputs.
cdef enum:
    MODEL_NAME = 1
    MODEL_VERSION = 2
    MESSAGE_ID = 3
    PARAMETERS = 4
    TENSORS = 5
    REQUESTED = 6           # of a request
    REQUEST_RAW = 7
    RESPONSE_RAW = 6
# Fields of InferInputTensor and InferOutputTensor, of InferRequestedOutputTensor, of a map entry, of InferParameter.
cdef enum:
    TENSOR_NAME = 1
    TENSOR_DATATYPE = 2
    TENSOR_SHAPE = 3
    TENSOR_PARAMETERS = 4
    TENSOR_CONTENTS = 5
    REQUESTED_PARAMETERS = 2
    ENTRY_KEY = 1
    ENTRY_VALUE = 2
    BOOL_PARAM = 1
    INT64_PARAM = 2
    STRING_PARAM = 3
    DOUBLE_PARAM = 4
    UINT64_PARAM = 5

cdef enum:
    INLINE_TENSORS = 3      # kept in the object itself; messages with more use the heap
    INLINE_DIMS = 12
    MAX_TENSORS = 16384     # a message of empty ones would otherwise take thirty times its size
    MAX_BYTES = 0x7FFFFFFF  # protobuf's limit
    CACHED_NAMES = 1024
    CACHED_NAME_BYTES = 64
    MAX_NAMES_TOLD = 32     # in an error's text

# What is wrong with a message that decodes; told when a tensor is asked for.
cdef enum:
    SOUND = 0
    MIXED_CONTENTS = 1
    RAW_COUNT = 2

cdef enum:
    HAS_PARAMETERS = 1
    HAS_CONTENTS = 2
    IN_SHARED_MEMORY = 4
    HAS_RAW = 8

cdef struct TensorPlace:
    Span message
    Span name
    Span datatype
    Span raw
    Py_ssize_t count        # elements in the typed contents
    uint32_t kinds          # a bit for each contents field with elements
    uint32_t dims           # index of the first dimension
    int rank
    int code
    int flags

cdef struct Layout:
    Span model_name
    Span model_version
    Span id
    int tensor_count
    int tensor_room
    int requested_count
    int raw_count
    int raw_room
    int dim_count
    int dim_room
    int problem             # SOUND, MIXED_CONTENTS of tensor `culprit`, RAW_COUNT
    int culprit
    bint has_parameters
    bint plain
    bint shared_memory
    bint typed
    const char* wrong       # of a message that does not decode
    TensorPlace* tensors
    Span* raws
    int64_t* dims
    TensorPlace[INLINE_TENSORS] inline_tensors
    Span[INLINE_TENSORS] inline_raws
    int64_t[INLINE_DIMS] inline_dims


# ---- names


ctypedef PyObject* Borrowed
cdef Borrowed[CACHED_NAMES] names_seen


cdef object text(const uint8_t* at, Py_ssize_t size):
    """A str of bytes known to be UTF-8."""
    if size == 0:
        return ""
    return PyUnicode_DecodeUTF8(<const char*>at, size, NULL)


cdef object cached_text(const uint8_t* at, Py_ssize_t size):
    """As text, for names that come again: the same object each time, its hash already computed."""
    cdef uint64_t head = 0, tail = 0
    cdef uint32_t slot
    cdef PyObject* seen
    if not 0 < size <= CACHED_NAME_BYTES:
        return text(at, size)
    memcpy(&head, at, <size_t>(size if size < 8 else 8))
    if size > 8:
        memcpy(&tail, at + size - 8, 8)
    slot = <uint32_t>((head * 0x9E3779B97F4A7C15ULL + tail * 0xC2B2AE3D27D4EB4FULL + <uint64_t>size) >> 54)
    seen = names_seen[slot]
    if (
        seen != NULL and PyUnicode_GET_LENGTH(<object>seen) == size
        and memcmp(PyUnicode_DATA(<object>seen), at, <size_t>size) == 0
    ):
        return <object>seen
    name = text(at, size)
    if PyUnicode_IS_ASCII(name):
        hash(name)
        Py_INCREF(name)
        names_seen[slot] = <PyObject*>name
        if seen != NULL:
            Py_DECREF(<object>seen)
    return name


# ---- reading


cdef int grow(void** items, void* inlined, int* room, size_t size) except -1:
    """Double an array that starts inside its object."""
    cdef void* grown
    if items[0] == inlined:
        grown = PyMem_Malloc(<size_t>room[0] * 2 * size)
        if grown != NULL:
            memcpy(grown, inlined, <size_t>room[0] * size)
    else:
        grown = PyMem_Realloc(items[0], <size_t>room[0] * 2 * size)
    if grown == NULL:
        raise MemoryError
    items[0] = grown
    room[0] *= 2
    return 0


cdef inline Span span_of(const uint8_t* base, Cursor* inner) noexcept:
    return Span(<uint32_t>(inner.at - base), <uint32_t>(inner.end - inner.at))


cdef bint scan_parameter(Cursor cursor, const char** wrong) noexcept:
    """Check an InferParameter."""
    cdef uint32_t field, wire
    cdef Cursor inner
    while cursor.at < cursor.end:
        if not read_tag(&cursor, &field, &wire):
            return False
        if field == STRING_PARAM and wire == LENGTH:
            if not read_length(&cursor, &inner):
                return False
            if not valid_utf8(inner.at, inner.end - inner.at):
                wrong[0] = "a string parameter is not valid UTF-8"
                return False
        elif not skip_value(&cursor, field, wire):
            return False
    return True


cdef bint scan_entry(Cursor cursor, bint* in_shared_memory, const char** wrong) noexcept:
    """Check an entry of a parameters map; note the one which says that a tensor's data lies in shared memory."""
    cdef uint32_t field, wire
    cdef Cursor inner
    cdef bint region = False
    while cursor.at < cursor.end:
        if not read_tag(&cursor, &field, &wire):
            return False
        if field > ENTRY_VALUE or wire != LENGTH:
            if not skip_value(&cursor, field, wire):
                return False
            continue
        if not read_length(&cursor, &inner):
            return False
        if field == ENTRY_VALUE:
            if not scan_parameter(inner, wrong):
                return False
            continue
        if not valid_utf8(inner.at, inner.end - inner.at):
            wrong[0] = "a parameter's name is not valid UTF-8"
            return False
        region = inner.end - inner.at == 20 and memcmp(inner.at, b"shared_memory_region", 20) == 0
    if region:
        in_shared_memory[0] = True
    return True


cdef int read_shape(Layout* layout, TensorPlace* place, Cursor* cursor, uint32_t wire) except -1:
    """Dimensions, packed or one at a time; 0 when malformed."""
    cdef Cursor inner
    cdef uint64_t value
    if wire == LENGTH:
        if not read_length(cursor, &inner):
            return 0
    while wire == VARINT or inner.at < inner.end:
        if not read_varint(cursor if wire == VARINT else &inner, &value):
            return 0
        if place.rank == MAX_RANK:
            layout.wrong = "a tensor has more than 32 dimensions"
            return 0
        if layout.dim_count == layout.dim_room:
            grow(<void**>&layout.dims, layout.inline_dims, &layout.dim_room, sizeof(int64_t))
        layout.dims[layout.dim_count] = <int64_t>value
        layout.dim_count += 1
        place.rank += 1
        if wire == VARINT:
            break
    return 1


cdef int read_tensor(Layout* layout, const uint8_t* base, Cursor cursor) except -1:
    """Note one input or output; 0 when malformed."""
    cdef TensorPlace* place
    cdef uint32_t field, wire
    cdef Cursor inner
    cdef bint in_shared_memory = False
    if layout.tensor_count == MAX_TENSORS:
        layout.wrong = "more than 16384 tensors"
        return 0
    if layout.tensor_count == layout.tensor_room:
        grow(<void**>&layout.tensors, layout.inline_tensors, &layout.tensor_room, sizeof(TensorPlace))
    place = &layout.tensors[layout.tensor_count]
    memset(place, 0, sizeof(TensorPlace))
    layout.tensor_count += 1
    place.message = span_of(base, &cursor)
    place.dims = <uint32_t>layout.dim_count
    while cursor.at < cursor.end:
        if not read_tag(&cursor, &field, &wire):
            return 0
        if field == TENSOR_SHAPE and (wire == LENGTH or wire == VARINT):
            if not read_shape(layout, place, &cursor, wire):
                return 0
            continue
        if field > TENSOR_CONTENTS or wire != LENGTH:
            if not skip_value(&cursor, field, wire):
                return 0
            continue
        if not read_length(&cursor, &inner):
            return 0
        if field == TENSOR_CONTENTS:
            place.flags |= HAS_CONTENTS
            if not scan_contents(inner.at, inner.end - inner.at, &place.kinds, &place.count):
                return 0
        elif field == TENSOR_PARAMETERS:
            place.flags |= HAS_PARAMETERS
            if not scan_entry(inner, &in_shared_memory, &layout.wrong):
                return 0
        elif not valid_utf8(inner.at, inner.end - inner.at):
            layout.wrong = "a tensor's name or datatype is not valid UTF-8"
            return 0
        elif field == TENSOR_NAME:
            place.name = span_of(base, &inner)
        else:
            place.datatype = span_of(base, &inner)
    place.code = datatype_code(<const char*>base + place.datatype.at, place.datatype.size)
    if in_shared_memory:
        place.flags |= IN_SHARED_MEMORY
        layout.shared_memory = True
    if place.flags & HAS_PARAMETERS:
        layout.plain = False
    if place.flags & HAS_CONTENTS:
        layout.typed = True
    return 1


cdef bint scan_requested(Layout* layout, Cursor cursor) noexcept:
    """Check an InferRequestedOutputTensor."""
    cdef uint32_t field, wire
    cdef Cursor inner
    cdef bint ignored = False
    layout.requested_count += 1
    while cursor.at < cursor.end:
        if not read_tag(&cursor, &field, &wire):
            return False
        if field > REQUESTED_PARAMETERS or wire != LENGTH:
            if not skip_value(&cursor, field, wire):
                return False
            continue
        if not read_length(&cursor, &inner):
            return False
        if field == REQUESTED_PARAMETERS:
            layout.plain = False
            if not scan_entry(inner, &ignored, &layout.wrong):
                return False
        elif not valid_utf8(inner.at, inner.end - inner.at):
            layout.wrong = "a requested output's name is not valid UTF-8"
            return False
    return True


cdef int read_message(Layout* layout, const uint8_t* base, Py_ssize_t size, bint response) except -1:
    """Note where everything lies; 0 when malformed, ``layout.wrong`` telling what when it is known."""
    cdef Cursor cursor = Cursor(base, base + size)
    cdef Cursor inner
    cdef uint32_t field, wire
    cdef bint ignored = False
    while cursor.at < cursor.end:
        if not read_tag(&cursor, &field, &wire):
            return 0
        if field > <uint32_t>(RESPONSE_RAW if response else REQUEST_RAW) or wire != LENGTH:
            if not skip_value(&cursor, field, wire):
                return 0
            continue
        if not read_length(&cursor, &inner):
            return 0
        if field == TENSORS:
            if not read_tensor(layout, base, inner):
                return 0
        elif field == PARAMETERS:
            layout.has_parameters = True
            if not scan_entry(inner, &ignored, &layout.wrong):
                return 0
        elif field <= MESSAGE_ID:
            if not valid_utf8(inner.at, inner.end - inner.at):
                layout.wrong = "model_name, model_version or id is not valid UTF-8"
                return 0
            if field == MODEL_NAME:
                layout.model_name = span_of(base, &inner)
            elif field == MODEL_VERSION:
                layout.model_version = span_of(base, &inner)
            else:
                layout.id = span_of(base, &inner)
        elif field == REQUESTED and not response:
            if not scan_requested(layout, inner):
                return 0
        else:
            if layout.raw_count == MAX_TENSORS:
                layout.wrong = "more than 16384 raw contents"
                return 0
            if layout.raw_count == layout.raw_room:
                grow(<void**>&layout.raws, layout.inline_raws, &layout.raw_room, sizeof(Span))
            layout.raws[layout.raw_count] = span_of(base, &inner)
            layout.raw_count += 1
    return 1


cdef void align_raw(Layout* layout, bint response) noexcept:
    """Give each tensor that carries its data in the message its raw contents, in order.

    In a response a tensor in shared memory has raw contents too, empty ones.
    """
    cdef TensorPlace* place
    cdef int i, used = 0
    cdef bint placeholders = response and layout.raw_count == layout.tensor_count
    if layout.raw_count == 0:
        return
    for i in range(layout.tensor_count):
        place = &layout.tensors[i]
        if place.flags & IN_SHARED_MEMORY:
            used += placeholders
            continue
        if place.flags & HAS_CONTENTS:
            layout.problem = MIXED_CONTENTS
            layout.culprit = i
            return
        if used < layout.raw_count:
            place.raw = layout.raws[used]
            place.flags |= HAS_RAW
        used += 1
    if used != layout.raw_count:
        layout.problem = RAW_COUNT
        layout.culprit = used


@cython.freelist(64)    # requests being decoded and run at once, about
cdef class InferMessage:
    """What a request and a response share: the body, and where everything in it lies."""

    cdef bytes body
    cdef Layout layout

    def __cinit__(self):
        self.layout.tensors = self.layout.inline_tensors
        self.layout.raws = self.layout.inline_raws
        self.layout.dims = self.layout.inline_dims
        self.layout.tensor_room = INLINE_TENSORS
        self.layout.raw_room = INLINE_TENSORS
        self.layout.dim_room = INLINE_DIMS
        self.layout.plain = True

    def __init__(self):
        raise TypeError("made by decode_infer_request and decode_infer_response")

    def __dealloc__(self):
        if self.layout.tensors != self.layout.inline_tensors:
            PyMem_Free(self.layout.tensors)
        if self.layout.raws != self.layout.inline_raws:
            PyMem_Free(self.layout.raws)
        if self.layout.dims != self.layout.inline_dims:
            PyMem_Free(self.layout.dims)

    @property
    def model_name(self):
        return cached_text(self.base() + self.layout.model_name.at, self.layout.model_name.size)

    @property
    def model_version(self):
        return cached_text(self.base() + self.layout.model_version.at, self.layout.model_version.size)

    @property
    def id(self):
        return text(self.base() + self.layout.id.at, self.layout.id.size)

    @property
    def parameters(self):
        if not self.layout.has_parameters:
            return {}
        return read_parameters(self.base(), Span(0, <uint32_t>PyBytes_GET_SIZE(self.body)), PARAMETERS)

    @property
    def raw(self):
        return not self.layout.typed

    @property
    def plain(self):
        return self.layout.plain

    @property
    def shared_memory(self):
        return self.layout.shared_memory

    cdef const uint8_t* base(self) noexcept:
        return <const uint8_t*>PyBytes_AS_STRING(self.body)

    cdef object place_text(self, Span place):
        return cached_text(self.base() + place.at, place.size)

    cdef tuple tensors(self):
        """The inputs or outputs; made anew each time, as they hold this message."""
        cdef InferTensor tensor
        cdef int i
        cdef tuple result = PyTuple_New(self.layout.tensor_count)
        for i in range(self.layout.tensor_count):
            tensor = InferTensor.__new__(InferTensor)
            tensor.message = self
            tensor.index = i
            Py_INCREF(tensor)
            PyTuple_SET_ITEM(result, i, tensor)
        return result

    cdef object array(self, TensorPlace* place):
        """A tensor's data; InvalidRequest names it, and what was expected and came."""
        cdef const uint8_t* base = self.base()
        cdef const int64_t* shape = self.layout.dims + place.dims
        if self.layout.problem != SOUND:
            raise self.problem()
        try:
            if place.code == UNKNOWN:
                raise InvalidRequest(f"expected a V2 datatype, got '{self.place_text(place.datatype)}'")
            if place.flags & HAS_RAW:
                return array_over(place.code, shape, place.rank, base + place.raw.at, place.raw.size, self.body)
            if place.flags & IN_SHARED_MEMORY:
                raise InvalidRequest("expected data in the message, got a shared memory region")
            return array_from_contents(
                place.code, shape, place.rank, base + place.message.at, place.message.size, place.kinds, place.count
            )
        except InvalidRequest as error:
            raise InvalidRequest(f"{self.where(self.place_text(place.name))}: {error}") from None

    cdef object where(self, name):
        kind = "output" if isinstance(self, InferResponse) else "input"
        return f"{kind} '{name}' for model '{self.model_name}'"

    cdef object problem(self):
        """The error for a message whose tensors and raw contents disagree."""
        if self.layout.problem == MIXED_CONTENTS:
            name = self.place_text(self.layout.tensors[self.layout.culprit].name)
            kind = "output" if isinstance(self, InferResponse) else "input"
            return InvalidRequest(    # Triton's own words, which its clients' examples look for
                f"contents field must not be specified when using raw_{kind}_contents for '{name}' for model "
                f"'{self.model_name}'"
            )
        return InvalidRequest(
            f"expected {self.layout.culprit} raw contents, one for each tensor with its data in the message, got "
            f"{self.layout.raw_count} for model '{self.model_name}'"
        )


cdef int take(InferMessage message, bytes body, bint response) except -1:
    """Read a body into a new message."""
    cdef Layout* layout = &message.layout
    cdef Py_ssize_t size = PyBytes_GET_SIZE(body)
    message.body = body
    if size > MAX_BYTES:
        raise InvalidRequest(f"expected a message of at most {MAX_BYTES} bytes, got {size}")
    if not read_message(layout, <const uint8_t*>PyBytes_AS_STRING(body), size, response):
        kind = "ModelInferResponse" if response else "ModelInferRequest"
        why = "" if layout.wrong == NULL else f": {layout.wrong.decode()}"
        raise InvalidRequest(f"malformed {kind} of {size} bytes{why}")
    align_raw(layout, response)
    return 0


@cython.final
cdef class InferRequest(InferMessage):
    """A decoded ModelInferRequest."""

    @property
    def inputs(self):
        return self.tensors()

    @property
    def outputs(self):
        return read_requested(self, False)

    @property
    def output_names(self):
        return read_requested(self, True)


@cython.final
cdef class InferResponse(InferMessage):
    """A decoded ModelInferResponse."""

    @property
    def outputs(self):
        return self.tensors()


@cython.final
cdef class InferTensor:
    """An input of a request or an output of a response."""

    cdef InferMessage message
    cdef int index

    def __init__(self):
        raise TypeError("made by decode_infer_request and decode_infer_response")

    cdef TensorPlace* place(self) noexcept:
        return &self.message.layout.tensors[self.index]

    @property
    def name(self):
        return self.message.place_text(self.place().name)

    @property
    def datatype(self):
        return self.message.place_text(self.place().datatype)

    @property
    def shape(self):
        cdef TensorPlace* place = self.place()
        cdef int i
        return tuple([self.message.layout.dims[<int>place.dims + i] for i in range(place.rank)])

    @property
    def parameters(self):
        if not self.place().flags & HAS_PARAMETERS:
            return {}
        return read_parameters(self.message.base(), self.place().message, TENSOR_PARAMETERS)

    def array(self):
        return self.message.array(self.place())

    def __repr__(self):
        return f"InferTensor(name={self.name!r}, datatype={self.datatype!r}, shape={self.shape!r})"


@cython.final
cdef class RequestedOutput:
    """An output the request asks for."""

    cdef readonly str name
    cdef readonly dict parameters

    def __init__(self):
        raise TypeError("made by decode_infer_request")

    def __repr__(self):
        return f"RequestedOutput(name={self.name!r}, parameters={self.parameters!r})"


cdef tuple read_requested(InferRequest request, bint names_only):
    """The requested outputs in order, or their names alone."""
    cdef const uint8_t* base = request.base()
    cdef Cursor cursor = Cursor(base, base + PyBytes_GET_SIZE(request.body))
    cdef Cursor message, inner
    cdef uint32_t field, wire
    cdef Span name
    cdef RequestedOutput output
    cdef list found
    if request.layout.requested_count == 0:
        return ()
    found = []
    while cursor.at < cursor.end and read_tag(&cursor, &field, &wire):
        if field != REQUESTED or wire != LENGTH:
            skip_value(&cursor, field, wire)
            continue
        read_length(&cursor, &message)
        inner = message
        name = Span(0, 0)
        while inner.at < inner.end and read_tag(&inner, &field, &wire):
            if field == TENSOR_NAME and wire == LENGTH:
                name = value_span(base, &inner)
            else:
                skip_value(&inner, field, wire)
        if names_only:
            found.append(request.place_text(name))
            continue
        output = RequestedOutput.__new__(RequestedOutput)
        output.name = request.place_text(name)
        output.parameters = read_parameters(base, span_of(base, &message), REQUESTED_PARAMETERS)
        found.append(output)
    return tuple(found)


cdef inline Span value_span(const uint8_t* base, Cursor* cursor) noexcept:
    """The length-delimited value at the cursor of a message already checked."""
    cdef Cursor inner = cursor[0]
    read_length(cursor, &inner)
    return span_of(base, &inner)


cdef dict read_parameters(const uint8_t* base, Span message, uint32_t number):
    """The map<string, InferParameter> in field ``number`` of a message already checked; entries without a value left out."""
    cdef Cursor cursor = Cursor(base + message.at, base + message.at + message.size)
    cdef Cursor entry, value
    cdef uint32_t field, wire
    cdef Span key, string
    cdef int choice
    cdef uint64_t bits
    cdef double real
    cdef dict found = {}
    while cursor.at < cursor.end and read_tag(&cursor, &field, &wire):
        if field != number or wire != LENGTH:
            skip_value(&cursor, field, wire)
            continue
        read_length(&cursor, &entry)
        key, string = Span(0, 0), Span(0, 0)
        choice, bits = 0, 0
        while entry.at < entry.end and read_tag(&entry, &field, &wire):
            if field == ENTRY_KEY and wire == LENGTH:
                key = value_span(base, &entry)
            elif field == ENTRY_VALUE and wire == LENGTH:
                read_length(&entry, &value)
                while value.at < value.end and read_tag(&value, &field, &wire):
                    if wire == VARINT and (field == BOOL_PARAM or field == INT64_PARAM or field == UINT64_PARAM):
                        read_varint(&value, &bits)
                        choice = <int>field
                    elif wire == FIXED64 and field == DOUBLE_PARAM:
                        memcpy(&bits, value.at, 8)
                        value.at += 8
                        choice = DOUBLE_PARAM
                    elif wire == LENGTH and field == STRING_PARAM:
                        string = value_span(base, &value)
                        choice = STRING_PARAM
                    else:
                        skip_value(&value, field, wire)
            else:
                skip_value(&entry, field, wire)
        name = cached_text(base + key.at, key.size)
        if choice == 0:
            found.pop(name, None)
        elif choice == STRING_PARAM:
            found[name] = text(base + string.at, string.size)
        elif choice == BOOL_PARAM:
            found[name] = bits != 0
        elif choice == INT64_PARAM:
            found[name] = <int64_t>bits
        elif choice == UINT64_PARAM:
            found[name] = bits
        else:
            memcpy(&real, &bits, 8)
            found[name] = real
    return found


def decode_infer_request(bytes body not None):
    """Decode a ModelInferRequest; InvalidRequest when it is malformed. What a tensor holds is checked when asked for."""
    cdef InferRequest request = InferRequest.__new__(InferRequest)
    take(request, body, False)
    return request


def decode_infer_response(bytes body not None):
    """Decode a ModelInferResponse; InvalidRequest when it is malformed."""
    cdef InferResponse response = InferResponse.__new__(InferResponse)
    take(response, body, True)
    return response


# ---- binding to a model's inputs


cdef struct Spec:
    const char* name
    Py_ssize_t name_size
    int code
    int rank
    int64_t* shape


@cython.final
cdef class Signature:
    """A model's inputs, ready to be compared with a request's."""

    cdef readonly tuple inputs      # TensorSpec; its names are what the C table points into
    cdef readonly bint any_name
    cdef tuple names
    cdef Spec* specs
    cdef int64_t* shapes
    cdef int count

    def __cinit__(self, inputs, *, bint any_name=False):
        cdef Py_ssize_t size
        cdef const char* datatype
        cdef int64_t* shape
        cdef Spec* spec
        cdef int i
        self.inputs = tuple(inputs)
        self.any_name = any_name
        self.names = tuple([wanted.name for wanted in self.inputs])
        if any_name and len(self.names) != 1:
            raise ValueError(f"any_name is for models of one input, got {len(self.names)}")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"the inputs' names must differ, got {list(self.names)}")
        dims = [tuple(wanted.shape) for wanted in self.inputs]
        self.specs = <Spec*>PyMem_Malloc(sizeof(Spec) * <size_t>(len(self.names) + 1))
        self.shapes = <int64_t*>PyMem_Malloc(sizeof(int64_t) * <size_t>(sum(map(len, dims)) + 1))
        if self.specs == NULL or self.shapes == NULL:
            raise MemoryError
        shape = self.shapes
        for i, wanted in enumerate(self.inputs):
            spec = &self.specs[i]
            spec.name = PyUnicode_AsUTF8AndSize(self.names[i], &spec.name_size)
            datatype = PyUnicode_AsUTF8AndSize(wanted.datatype, &size)
            spec.code = datatype_code(datatype, size)
            if spec.code == UNKNOWN:
                raise ValueError(f"input '{self.names[i]}' has the unknown datatype {wanted.datatype!r}")
            spec.rank = <int>len(dims[i])
            if spec.rank > MAX_RANK:
                raise ValueError(f"input '{self.names[i]}' has more than {MAX_RANK} dimensions")
            spec.shape = shape
            for dim in dims[i]:
                shape[0] = dim
                shape += 1
        self.count = <int>len(self.names)

    def __dealloc__(self):
        PyMem_Free(self.specs)
        PyMem_Free(self.shapes)

    cdef int find(self, const void* name, Py_ssize_t size) noexcept:
        """The input of that name, -1 when there is none."""
        cdef int i
        for i in range(self.count):
            if self.specs[i].name_size == size and memcmp(self.specs[i].name, name, <size_t>size) == 0:
                return i
        return -1

    cdef bint takes(self, int index, int code, int rank, const int64_t* shape) noexcept:
        """Whether the input takes that datatype and shape."""
        cdef Spec* spec = &self.specs[index]
        cdef int i
        if spec.code != code or spec.rank != rank:
            return False
        for i in range(rank):
            if spec.shape[i] != shape[i] and spec.shape[i] != -1:
                return False
        return True

    cdef object refusal(self, int index, where, int code, datatype, int rank, const int64_t* shape):
        """The error for an input that ``takes`` refused."""
        cdef Spec* spec = &self.specs[index]
        if spec.code != code:
            return InvalidRequest(f"{where}: expected datatype {datatype_name(spec.code)}, got {datatype}")
        return InvalidRequest(
            f"{where}: expected shape {shape_text(spec.shape, spec.rank)}, got {shape_text(shape, rank)}"
        )

    cdef object wrong_inputs(self, model, list got):
        """The error for inputs that are missing, repeated or unknown."""
        of = f" for model '{model}'" if model else ""
        return InvalidRequest(
            f"expected {self.count} inputs {list(self.names)}{of}, got {len(got)} inputs {got[:MAX_NAMES_TOLD]}"
        )

    cdef object wrong_request(self, InferRequest request):
        return self.wrong_inputs(request.model_name, [tensor.name for tensor in request.tensors()])

    def bind(self, InferRequest request not None):
        """The request's data by input name.

        Checks names, number, datatypes, shapes, and that data and shape agree. With ``any_name`` the one input may
        have any name and is found under the model's. Raises InvalidRequest naming input, expected and got.
        """
        cdef Layout* layout = &request.layout
        cdef TensorPlace* place
        cdef const uint8_t* base = request.base()
        cdef int i, index
        cdef dict bound
        if layout.problem != SOUND:
            raise request.problem()
        if layout.tensor_count != self.count:
            raise self.wrong_request(request)
        bound = {}
        for i in range(self.count):
            place = &layout.tensors[i]
            index = i
            if not self.any_name and (
                self.specs[i].name_size != <Py_ssize_t>place.name.size
                or memcmp(self.specs[i].name, base + place.name.at, place.name.size) != 0
            ):
                index = self.find(base + place.name.at, place.name.size)
                if index < 0:
                    raise self.wrong_request(request)
            if not self.takes(index, place.code, place.rank, layout.dims + place.dims):
                raise self.refusal(
                    index, request.where(request.place_text(place.name)), place.code,
                    request.place_text(place.datatype), place.rank, layout.dims + place.dims,
                )
            PyDict_SetItem(bound, self.names[index], request.array(place))
        if len(bound) != self.count:
            raise self.wrong_request(request)
        return bound

    def bind_arrays(self, dict arrays not None, *, str model_name=""):
        """As bind, for data that came otherwise: input name to (datatype, array).

        Arrays are made contiguous where they are not. Raises InvalidRequest as bind does.
        """
        cdef Py_ssize_t size
        cdef const char* name_bytes
        cdef int index, code
        cdef dict bound = {}
        of = f" for model '{model_name}'" if model_name else ""
        if len(arrays) != self.count:
            raise self.wrong_inputs(model_name, list(arrays))
        for name, (datatype, array) in arrays.items():
            name_bytes = PyUnicode_AsUTF8AndSize(name, &size)
            index = 0 if self.any_name else self.find(name_bytes, size)
            if index < 0:
                raise self.wrong_inputs(model_name, list(arrays))
            name_bytes = PyUnicode_AsUTF8AndSize(datatype, &size)
            code = datatype_code(name_bytes, size)
            if not cnp.PyArray_Check(array):
                raise TypeError(f"input '{name}' must be a numpy array, got {type(array).__name__}")
            if not self.takes(index, code, cnp.PyArray_NDIM(array), <const int64_t*>cnp.PyArray_DIMS(array)):
                raise self.refusal(
                    index, f"input '{name}'{of}", code, datatype, cnp.PyArray_NDIM(array),
                    <const int64_t*>cnp.PyArray_DIMS(array),
                )
            try:
                bound[self.names[index]] = checked_array(code, array)
            except TypeError as error:
                raise InvalidRequest(f"input '{name}'{of}: {error}") from None
        return bound
