"""The way back of requests that others answer; see ext/onward.pyx."""

from mmcore._ext.h2 cimport Method
from mmcore._ext.h2client cimport ClientCall, ClientSession
from mmcore._ext.h2server cimport ServerCall

cdef list encodings(list encoded, ServerCall asked, ClientCall sent, bint packed)
cdef int pass_answer(object call, ServerCall asked, ClientCall answer) except -1
cdef int pass_refusal(object call, ServerCall asked, ClientCall answer) except -1
cdef ClientCall open_stream(
    ServerCall asked, ClientSession session, Method method, list encoded, object sink,
)
