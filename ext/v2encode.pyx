"""ModelInferRequest and ModelInferResponse from numpy arrays to wire bytes, written once at their final size.

Fields are written in ascending order with proto3's rules for what is left out. Large arrays are not copied: the
message then is a list of buffers, to be sent one after the other, in which a memoryview keeps its array alive; the
owner of such an array must not change it until it was sent. Imported from mmcore._ext.v2codec.
"""

cimport numpy as cnp
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.string cimport memcpy

from mmcore._ext.pbwire cimport FIXED64, LENGTH, VARINT, field_size, varint_size, write_bytes, write_varint
from mmcore._ext.tensor cimport (
    BF16, BYTES, MAX_RANK, UNKNOWN, bytes_view, checked_array, contents_size, datatype_code, has_contents_field,
    raw_size, write_contents, write_raw,
)

from mmcore.errors import InferenceFailed

cdef extern from "Python.h":
    const char* PyUnicode_AsUTF8AndSize(object text, Py_ssize_t* size) except NULL

cnp.import_array()

Param = bool | int | float | str    # what an InferParameter holds; an int above 2**63 - 1 is a uint64

# Fields, as in ext/v2codec.pyx.
cdef enum:
    MODEL_NAME = 1
    MODEL_VERSION = 2
    MESSAGE_ID = 3
    PARAMETERS = 4
    TENSORS = 5
    REQUESTED = 6
    REQUEST_RAW = 7
    RESPONSE_RAW = 6
    TENSOR_NAME = 1
    TENSOR_DATATYPE = 2
    TENSOR_SHAPE = 3
    TENSOR_PARAMETERS = 4
    TENSOR_CONTENTS = 5
    REQUESTED_PARAMETERS = 2
    BOOL_PARAM = 1
    INT64_PARAM = 2
    STRING_PARAM = 3
    DOUBLE_PARAM = 4
    UINT64_PARAM = 5

cdef enum:
    LARGE_BYTES = 16384     # from here on an array is sent from where it lies
    INLINE_PLANS = 4
    MAX_BYTES = 0x7FFFFFFF  # protobuf's limit

cdef struct Text:
    const char* at
    Py_ssize_t size

# One tensor to be written. References are borrowed from the caller's arguments or from the list `kept`.
cdef struct Plan:
    Text name
    Text datatype
    int code
    int rank
    const int64_t* shape
    int64_t[MAX_RANK] own_shape
    Py_ssize_t shape_size       # packed
    Py_ssize_t contents_size
    Py_ssize_t message_size
    Py_ssize_t raw_size
    PyObject* array             # NULL: the data is elsewhere, in shared memory
    PyObject* parameters        # the encoded map, or NULL

# What stands around the tensors.
cdef struct Head:
    Text model_name
    Text model_version
    Text id
    PyObject* parameters        # the encoded map, or NULL
    PyObject* requested         # the encoded requested outputs, or NULL
    int raw_field


cdef inline int read_text(Text* target, object value) except -1:
    target.at = PyUnicode_AsUTF8AndSize(value, &target.size)
    return 0


cdef inline Py_ssize_t text_size(Text* value) noexcept:
    return field_size(value.size) if value.size else 0


cdef inline uint8_t* write_text(uint8_t* at, int field, Text* value) noexcept:
    return write_bytes(at, field, value.at, value.size) if value.size else at


cdef inline Py_ssize_t chunk_size(PyObject* chunk) noexcept:
    return PyBytes_GET_SIZE(<object>chunk) if chunk != NULL else 0


cdef inline uint8_t* write_chunk(uint8_t* at, PyObject* chunk) noexcept:
    if chunk == NULL:
        return at
    memcpy(at, PyBytes_AS_STRING(<object>chunk), <size_t>PyBytes_GET_SIZE(<object>chunk))
    return at + PyBytes_GET_SIZE(<object>chunk)


cdef object prepare(Plan* plan, object tensor):
    """Take over a (name, datatype, array or shape); a contiguous array made for it is returned, to be held."""
    cdef int i
    made = None
    name, datatype, array = tensor
    read_text(&plan.name, name)
    read_text(&plan.datatype, datatype)
    plan.code = datatype_code(plan.datatype.at, plan.datatype.size)
    plan.contents_size = plan.raw_size = plan.shape_size = 0
    plan.parameters = plan.array = NULL
    if plan.code == UNKNOWN:
        raise ValueError(f"unknown datatype '{datatype}'")
    if isinstance(array, tuple):
        if len(array) > MAX_RANK:
            raise ValueError(f"more than {MAX_RANK} dimensions")
        plan.rank = <int>len(array)
        plan.shape = plan.own_shape
        for i in range(plan.rank):
            plan.own_shape[i] = array[i]
    else:
        contiguous = checked_array(plan.code, array)
        if contiguous is not array:
            made = contiguous
        plan.array = <PyObject*>contiguous
        plan.rank = cnp.PyArray_NDIM(contiguous)
        plan.shape = <const int64_t*>cnp.PyArray_DIMS(contiguous)
    for i in range(plan.rank):
        plan.shape_size += varint_size(<uint64_t>plan.shape[i])
    return made


cdef int measure(Plan* plan, bint raw) except -1:
    """Compute the sizes."""
    if plan.array != NULL:
        if raw:
            plan.raw_size = raw_size(plan.code, <object>plan.array)
        else:
            plan.contents_size = contents_size(plan.code, <object>plan.array)
    plan.message_size = text_size(&plan.name) + text_size(&plan.datatype) + chunk_size(plan.parameters)
    if plan.shape_size:
        plan.message_size += field_size(plan.shape_size)
    if plan.contents_size:
        plan.message_size += field_size(plan.contents_size)
    return 0


cdef uint8_t* write_tensor(uint8_t* at, Plan* plan) except NULL:
    """The tensor's field with its message."""
    cdef int i
    at[0] = TENSORS << 3 | LENGTH
    at = write_varint(at + 1, <uint64_t>plan.message_size)
    at = write_text(at, TENSOR_NAME, &plan.name)
    at = write_text(at, TENSOR_DATATYPE, &plan.datatype)
    if plan.shape_size:
        at[0] = TENSOR_SHAPE << 3 | LENGTH
        at = write_varint(at + 1, <uint64_t>plan.shape_size)
        for i in range(plan.rank):
            at = write_varint(at, <uint64_t>plan.shape[i])
    at = write_chunk(at, plan.parameters)
    if plan.contents_size:
        at[0] = TENSOR_CONTENTS << 3 | LENGTH
        at = write_varint(at + 1, <uint64_t>plan.contents_size)
        at = write_contents(at, plan.code, <object>plan.array)
    return at


cdef Py_ssize_t head_size(Head* head, Plan* plans, int count) noexcept:
    """Of everything before the raw contents."""
    cdef Py_ssize_t size = text_size(&head.model_name) + text_size(&head.model_version) + text_size(&head.id)
    cdef int i
    for i in range(count):
        size += field_size(plans[i].message_size)
    return size + chunk_size(head.parameters) + chunk_size(head.requested)


cdef uint8_t* write_head(uint8_t* at, Head* head, Plan* plans, int count) except NULL:
    cdef int i
    at = write_text(at, MODEL_NAME, &head.model_name)
    at = write_text(at, MODEL_VERSION, &head.model_version)
    at = write_text(at, MESSAGE_ID, &head.id)
    at = write_chunk(at, head.parameters)
    for i in range(count):
        at = write_tensor(at, &plans[i])
    return write_chunk(at, head.requested)


cdef inline bint is_large(Plan* plan) noexcept:
    """Whether the array goes out from where it lies; BF16 and BYTES have to be made first."""
    return plan.raw_size >= LARGE_BYTES and plan.code != BF16 and plan.code != BYTES


cdef object write_message(Head* head, Plan* plans, int count, bint raw, bint joined):
    """The message as bytes, or as buffers when there are large arrays and ``joined`` is not asked for."""
    cdef Py_ssize_t size = head_size(head, plans, count)
    cdef Py_ssize_t total = size
    cdef int start = 0, stop, i
    cdef uint8_t* at
    cdef bytes piece
    cdef list pieces = None
    # Clients find an answer's raw contents by the output's position, so what went to shared memory has empty ones.
    cdef bint placeholders = head.raw_field == RESPONSE_RAW
    for i in range(count):
        if raw and (plans[i].array != NULL or placeholders):
            total += field_size(plans[i].raw_size)
    if total > MAX_BYTES:
        raise ValueError(f"a message has at most {MAX_BYTES} bytes, this one would have {total}")
    while True:
        stop = start
        while raw and stop < count:     # the piece goes up to the next large array, its tag and length included
            if plans[stop].array != NULL:
                if is_large(&plans[stop]) and not joined:
                    size += 1 + varint_size(<uint64_t>plans[stop].raw_size)
                    break
                size += field_size(plans[stop].raw_size)
            elif placeholders:
                size += field_size(0)
            stop += 1
        piece = PyBytes_FromStringAndSize(NULL, size)
        at = <uint8_t*>PyBytes_AS_STRING(piece)
        if start == 0:
            at = write_head(at, head, plans, count)
        for i in range(start, stop + 1 if raw and stop < count else stop):
            if not raw or (plans[i].array == NULL and not placeholders):
                continue
            at[0] = <uint8_t>(head.raw_field << 3 | LENGTH)
            at = write_varint(at + 1, <uint64_t>plans[i].raw_size)
            if i < stop and plans[i].array != NULL:
                at = write_raw(at, plans[i].code, <object>plans[i].array)
        if not raw or stop == count:
            if pieces is None:
                return piece
            if size:
                pieces.append(piece)
            return pieces
        if pieces is None:
            pieces = []
        pieces.append(piece)
        pieces.append(bytes_view(<object>plans[stop].array))
        start, size = stop + 1, 0


cdef bytes encode_value(object value, name):
    """An InferParameter as its Python type says; bool before int, which it is too."""
    cdef uint8_t[16] buffer
    cdef uint8_t* at = buffer
    cdef double real
    if isinstance(value, bool):
        at[0] = BOOL_PARAM << 3 | VARINT
        at = write_varint(at + 1, <uint64_t>bool(value))
    elif isinstance(value, int):
        if -0x8000000000000000 <= value <= 0x7FFFFFFFFFFFFFFF:
            at[0] = INT64_PARAM << 3 | VARINT
            at = write_varint(at + 1, <uint64_t><int64_t>value)
        elif 0 <= value <= 0xFFFFFFFFFFFFFFFF:
            at[0] = UINT64_PARAM << 3 | VARINT
            at = write_varint(at + 1, <uint64_t>value)
        else:
            raise ValueError(f"parameter '{name}' needs more than 64 bits")
    elif isinstance(value, float):
        at[0] = DOUBLE_PARAM << 3 | FIXED64
        real = value
        memcpy(at + 1, &real, 8)
        at += 9
    elif isinstance(value, str):
        return length_field(STRING_PARAM, (<str>value).encode("utf-8"))
    else:
        raise TypeError(f"parameter '{name}' is bool, int, float or str, got {type(value).__name__}")
    return (<const char*>buffer)[:at - buffer]


cdef bytes length_field(int field, bytes value):
    """A field numbered below 16."""
    cdef bytes result = PyBytes_FromStringAndSize(NULL, field_size(PyBytes_GET_SIZE(value)))
    write_bytes(<uint8_t*>PyBytes_AS_STRING(result), field, PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value))
    return result


cdef bytes encode_parameters(int field, object parameters):
    """A map<string, InferParameter> in ``field``."""
    return b"".join([
        length_field(field, length_field(1, name.encode("utf-8")) + length_field(2, encode_value(value, name)))
        for name, value in parameters.items()
    ])


cdef inline list held(list kept, object made):
    """A list that holds it too; most messages need none."""
    if kept is None:
        return [made]
    kept.append(made)
    return kept


cdef object encode(Head* head, object tensors, bint raw, object tensor_parameters, bint joined, str kind):
    """Plan every tensor, then write; errors name the tensor."""
    cdef Plan[INLINE_PLANS] inline_plans
    cdef Plan* plans = inline_plans
    cdef int i = 0, count = <int>len(tensors)
    cdef list kept = None
    if count > INLINE_PLANS:
        plans = <Plan*>PyMem_Malloc(sizeof(Plan) * <size_t>count)
        if plans == NULL:
            raise MemoryError
    try:
        try:
            for tensor in tensors:
                if i == count:
                    raise RuntimeError(f"the {kind}s changed while they were encoded")
                made = prepare(&plans[i], tensor)
                if made is not None:
                    kept = held(kept, made)
                raw = raw or not has_contents_field(plans[i].code)
                i += 1
            for i in range(count):
                if tensor_parameters:
                    chunk = encode_parameters(TENSOR_PARAMETERS, tensor_parameters.get(tensors[i][0]) or {})
                    kept = held(kept, chunk)
                    plans[i].parameters = <PyObject*>chunk
                measure(&plans[i], raw)
        except (TypeError, ValueError, UnicodeEncodeError) as error:
            name = tensors[i][0] if len(tensors[i]) else i
            raise ValueError(f"{kind} '{name}': {error}") from error
        return write_message(head, plans, count, raw, joined)
    finally:
        if plans != inline_plans:
            PyMem_Free(plans)


def encode_infer_response(str model_name not None, str model_version not None, str request_id not None,
                          outputs not None, *, bint raw, parameters=None, output_parameters=None):
    """A ModelInferResponse.

    ``outputs`` is a sequence of (name, datatype, array); in place of the array stands the shape, a tuple, where the
    data went to shared memory. With ``raw`` the data is in raw_output_contents, else in typed contents; a datatype
    that has no typed form (FP16, BF16) makes the whole answer raw. ``output_parameters`` maps output names to theirs.

    Returns bytes, or a list of buffers when an array of 16 KiB or more is sent from where it lies.
    Raises InferenceFailed naming the output when an array is not what its datatype says.
    """
    chunk = None
    try:
        if parameters:
            chunk = encode_parameters(PARAMETERS, parameters)
        return write_answer(model_name, model_version, request_id, outputs, raw, chunk, output_parameters)
    except (TypeError, ValueError) as error:
        raise unsendable(model_name, error) from error


cdef object unsendable(model_name, error):
    return InferenceFailed(f"model '{model_name}' gave an answer that cannot be sent: {error}")


cdef object write_answer(str model_name, str model_version, str request_id, object outputs, bint raw, bytes chunk,
                         object output_parameters):
    cdef Head head
    read_text(&head.model_name, model_name)
    read_text(&head.model_version, model_version)
    read_text(&head.id, request_id)
    head.parameters = <PyObject*>chunk if chunk is not None else NULL
    head.requested = NULL
    head.raw_field = RESPONSE_RAW
    return encode(&head, outputs, raw, output_parameters, False, "output")


cdef object write_response(str model_name, str model_version, str request_id, object outputs, bint raw):
    try:
        return write_answer(model_name, model_version, request_id, outputs, raw, None, None)
    except (TypeError, ValueError) as error:
        raise unsendable(model_name, error) from error


def encode_infer_request(str model_name not None, inputs not None, *, str model_version="", str request_id="",
                         outputs=(), bint raw=True, parameters=None, input_parameters=None, output_parameters=None):
    """A ModelInferRequest as bytes.

    ``inputs`` as the outputs of encode_infer_response, ``outputs`` the names asked for; ``input_parameters`` and
    ``output_parameters`` map tensor names to their parameters. Raises ValueError naming the input when an array is
    not what its datatype says.
    """
    cdef Head head
    read_text(&head.model_name, model_name)
    read_text(&head.model_version, model_version)
    read_text(&head.id, request_id)
    head.parameters = head.requested = NULL
    head.raw_field = REQUEST_RAW
    if parameters:
        chunk = encode_parameters(PARAMETERS, parameters)
        head.parameters = <PyObject*>chunk
    if outputs:
        requested = b"".join([
            length_field(REQUESTED, requested_output(name, (output_parameters or {}).get(name) or {}))
            for name in outputs
        ])
        head.requested = <PyObject*>requested
    return encode(&head, inputs, raw, input_parameters, True, "input")


cdef bytes requested_output(str name, parameters):
    cdef bytes head = length_field(TENSOR_NAME, name.encode("utf-8")) if name else b""
    return head + encode_parameters(REQUESTED_PARAMETERS, parameters)
