"""ModelInferRequest and ModelInferResponse from wire bytes to numpy, and a model's inputs to bind them to.

Python objects are made when they are asked for, from the places that ext/v2layout noted. Arrays are views over the
body and keep it alive. Objects here may move between threads under the GIL; none is changed after it was made.
"""

cimport cython
cimport numpy as cnp
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_SetItem
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.ref cimport Py_INCREF
from cpython.tuple cimport PyTuple_New, PyTuple_SET_ITEM
from libc.stdint cimport int64_t, uint8_t, uint32_t
from libc.string cimport memcmp

from mmcore._ext.pbwire cimport LENGTH, Cursor, Span, read_length, read_tag, skip_value
from mmcore._ext.tensor cimport (
    MAX_RANK, UNKNOWN, array_from_contents, array_over, checked_array, datatype_code, datatype_name, shape_text,
)
from mmcore._ext.v2layout cimport (
    HAS_PARAMETERS, HAS_RAW, IN_SHARED_MEMORY, MIXED_CONTENTS, PARAMETERS, REQUESTED, REQUESTED_PARAMETERS, SOUND,
    TENSOR_NAME, TENSOR_PARAMETERS, Layout, TensorPlace, cached_text, clear, read_message, read_parameters, release,
    span_of, text, value_span,
)

from mmcore._ext.v2encode import Param, encode_infer_request, encode_infer_response  # no-cython-lint
from mmcore.errors import InvalidRequest

cdef extern from "Python.h":
    const char* PyUnicode_AsUTF8AndSize(object text, Py_ssize_t* size) except NULL

cnp.import_array()

cdef enum:
    MAX_BYTES = 0x7FFFFFFF  # protobuf's limit
    MAX_NAMES_TOLD = 32     # in an error's text


@cython.freelist(64)    # requests being decoded and run at once, about
cdef class InferMessage:
    """What a request and a response share: the body, and where everything in it lies."""

    def __cinit__(self):
        clear(&self.layout)

    def __init__(self):
        raise TypeError("made by decode_infer_request and decode_infer_response")

    def __dealloc__(self):
        release(&self.layout)

    @property
    def model_name(self):
        return model_name_of(self)

    @property
    def model_version(self):
        return model_version_of(self)

    @property
    def id(self):
        return id_of(self)

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


cdef object model_name_of(InferMessage message):
    return message.place_text(message.layout.model_name)


cdef object model_version_of(InferMessage message):
    return message.place_text(message.layout.model_version)


cdef object id_of(InferMessage message):
    """Never cached: each request has its own."""
    return text(message.base() + message.layout.id.at, message.layout.id.size)


cdef tuple output_names_of(InferRequest request):
    return read_requested(request, True) if request.layout.requested_count else ()


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
        return output_names_of(self)


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


cdef InferRequest read_request(bytes body):
    cdef InferRequest request = InferRequest.__new__(InferRequest)
    take(request, body, False)
    return request


def decode_infer_request(bytes body not None):
    """Decode a ModelInferRequest; InvalidRequest when it is malformed.

    What its tensors hold is checked when it is asked for or bound.
    """
    return read_request(body)


def decode_infer_response(bytes body not None):
    """Decode a ModelInferResponse; InvalidRequest when it is malformed."""
    cdef InferResponse response = InferResponse.__new__(InferResponse)
    take(response, body, True)
    return response


# ---- binding to a model's inputs


@cython.final
cdef class Signature:
    """A model's inputs, ready to be compared with a request's.

    ``accepts`` maps an input's name to datatypes that are taken beside its own; arrays come in the one they were sent
    in. With ``any_name``, of models of one input, that may have any name, and one of shape [-1] may come as [-1,1].
    """

    def __cinit__(self, inputs, *, bint any_name=False, accepts=None):
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
            spec.codes = <uint32_t>1 << spec.code
            for other in (accepts or {}).get(self.names[i], ()):
                datatype = PyUnicode_AsUTF8AndSize(other, &size)
                if datatype_code(datatype, size) == UNKNOWN:
                    raise ValueError(f"input '{self.names[i]}' accepts the unknown datatype {other!r}")
                spec.codes |= <uint32_t>1 << datatype_code(datatype, size)
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
        if code == UNKNOWN or not spec.codes >> code & 1:
            return False
        if spec.rank == 0:
            return True  # no shape stated: any will do
        if self.any_name and spec.rank == 1 and rank == 2 and shape[1] == 1:
            rank = 1  # a row of one value, as such models' clients write it too
        if spec.rank != rank:
            return False
        for i in range(rank):
            if spec.shape[i] != shape[i] and spec.shape[i] != -1:
                return False
        return True

    cdef object refusal(self, int index, where, int code, datatype, int rank, const int64_t* shape):
        """The error for an input that ``takes`` refused."""
        cdef Spec* spec = &self.specs[index]
        if code == UNKNOWN or not spec.codes >> code & 1:
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
        return self.bound(request)

    cdef dict bound(self, InferRequest request):
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
