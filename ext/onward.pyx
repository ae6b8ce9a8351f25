"""What a request passed on to another instance and one passed through to a runtime have in common: the way back.

An answer goes back as it came, compressed or not, with its metadata. Memory: its message is sent from where it lies.
Threads: that of one event loop.
"""

from mmcore._ext.h2 cimport Method
from mmcore._ext.h2client cimport ClientCall, ClientSession
from mmcore._ext.h2server cimport ServerCall


cdef list encodings(list encoded, ServerCall asked, ClientCall sent, bint packed):
    """``encoded`` with what the one who asked says of compression, to whom the answer goes as it comes.

    ``packed``: the message is sent compressed as it was received.
    """
    if asked.accept_encoding is not None:
        sent.as_came = True
        encoded = encoded + [(b"grpc-accept-encoding", asked.accept_encoding.encode("latin-1", "replace"))]
    if packed:
        encoded = encoded + [(b"grpc-encoding", asked.encoding.encode("ascii"))]
    return encoded


cdef int pass_answer(object call, ServerCall asked, ClientCall answer) except -1:
    """Pass back an answer with OK; ``asked`` is ``call`` where the transport itself has it, or None."""
    if asked is None:
        call.reply(answer.body)
        return 0
    if answer.metadata_bytes:
        take_metadata(asked, answer)
    if answer.packed is None:
        return asked.answer(answer.body)
    asked.send_encoding = answer.encoding
    return asked.answer_as(answer.packed, 1)


cdef int pass_refusal(object call, ServerCall asked, ClientCall answer) except -1:
    """Pass back an answer that is an error."""
    if asked is not None and answer.metadata_bytes:
        take_metadata(asked, answer)
    call.fail(answer.grpc_status, answer.grpc_message or "")
    return 0


cdef int take_metadata(ServerCall asked, ClientCall answer) except -1:
    asked.extra_headers = answer.pairs_between(0, answer.initial_bytes) or None
    asked.extra_trailers = answer.pairs_between(answer.initial_bytes, answer.metadata_bytes) or None
    return 0


cdef ClientCall open_stream(
    ServerCall asked, ClientSession session, Method method, list encoded, object sink,
):
    """Start a streaming call for the one that was asked, with this metadata: same deadline and compression.

    Raises:
        ConnectionError: the session takes no new call, or the call that asked is over.
        ValueError: it has more metadata than can be sent.
    """
    cdef ClientCall call = ClientCall.__new__(ClientCall)
    if not session.takes_calls():
        raise ConnectionError("the connection takes no new calls")
    if asked.closed or asked.finished or asked.target is None:
        raise ConnectionError("the call is over")
    call.sink = sink
    call.inbox = []
    if asked.encoding is not None and asked.encoding != "identity":
        call.send_encoding = asked.encoding
        encoded = encoded + [(b"grpc-encoding", asked.encoding.encode("ascii"))]
    if asked.accept_encoding is not None:
        encoded = encoded + [(b"grpc-accept-encoding", asked.accept_encoding.encode("latin-1", "replace"))]
    session.submit(call, method, None, 0, encoded, asked.deadline)
    return call


def pass_head(ServerCall asked not None, ClientCall call not None):
    """Answer a streaming call with the metadata and the compression of another's answer; before the first message."""
    if asked.headers_sent:
        return
    asked.extra_headers = call.pairs_between(0, call.initial_bytes) or None
    if call.encoding is not None and call.encoding != "identity":
        asked.send_encoding = call.encoding


def pass_trailers(ServerCall asked not None, ClientCall call not None):
    """End a streaming call, when it ends, with the trailers of another's answer."""
    asked.extra_trailers = call.pairs_between(call.initial_bytes, call.metadata_bytes) or None
