"""Streams of tritonclient's synchronous client: one stream, many requests, answers on a callback."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton

from tests.serving import Instance

pytestmark = pytest.mark.slow

WITHIN_S = 20


class Stream:
    """A client with an open stream; what comes back is put in a queue."""

    def __init__(self, client: triton.InferenceServerClient, **options: Any) -> None:
        self.client = client
        self.answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        client.start_stream(lambda result, error: self.answers.put((result, error)), **options)

    def next(self) -> tuple[Any, Any]:
        return self.answers.get(timeout=WITHIN_S)


@pytest.fixture
def stream(instance: Instance) -> Iterator[Stream]:
    with triton.InferenceServerClient(instance.grpc) as client:
        yield Stream(client)


def simple(value: int) -> list[triton.InferInput]:
    made = []
    for name in ("INPUT0", "INPUT1"):
        made.append(triton.InferInput(name, [1, 16], "INT32"))
        made[-1].set_data_from_numpy(np.full((1, 16), value, np.int32))
    return made


def waiting(file: Path) -> list[triton.InferInput]:
    made = triton.InferInput("FILE", [1], "BYTES")
    made.set_data_from_numpy(np.array([str(file).encode()], dtype=np.object_))
    return [made]


def test_answers_come_in_the_order_of_the_requests(stream: Stream) -> None:
    for number in range(200):
        stream.client.async_stream_infer("simple", simple(number), request_id=str(number))
    for number in range(200):
        result, error = stream.next()
        assert error is None
        response = result.get_response()
        assert response.id == str(number)
        assert result.as_numpy("OUTPUT0")[0, 0] == 2 * number
        assert response.parameters["triton_final_response"].bool_param
    stream.client.stop_stream()
    assert stream.answers.empty()


def test_a_failed_request_is_told_and_the_stream_goes_on(stream: Stream) -> None:
    stream.client.async_stream_infer("nope", simple(1), request_id="first")
    stream.client.async_stream_infer("simple", simple(1)[:1], request_id="second")
    stream.client.async_stream_infer("simple", simple(4), request_id="third")
    assert "Request for unknown model: 'nope' is not found" in stream.next()[1].message()
    assert "INPUT1" in stream.next()[1].message()
    result, error = stream.next()
    assert error is None
    assert result.as_numpy("OUTPUT0")[0, 0] == 8
    stream.client.stop_stream()


def test_a_slow_request_holds_the_later_ones_answers_but_not_their_work(stream: Stream, tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        stream.client.async_stream_infer("waiting", waiting(file), request_id=file.name)
    stream.client.async_stream_infer("simple", simple(1), request_id="last")
    files[1].touch()
    with pytest.raises(queue.Empty):
        stream.answers.get(timeout=0.3)
    files[0].touch()
    assert [stream.next()[0].get_response().id for _ in range(3)] == ["a", "b", "last"]
    stream.client.stop_stream()


def test_a_stream_can_be_cancelled_with_a_request_under_way(stream: Stream, tmp_path: Path) -> None:
    file = tmp_path / "release"
    stream.client.async_stream_infer("waiting", waiting(file))
    stream.client.stop_stream(cancel_requests=True)
    file.touch()
    again = Stream(stream.client)
    again.client.async_stream_infer("simple", simple(1))
    assert again.next()[1] is None
    again.client.stop_stream()


def test_an_error_ends_the_stream_with_its_status_where_the_client_asks_for_it(instance: Instance) -> None:
    with triton.InferenceServerClient(instance.grpc) as client:
        stream = Stream(client, headers={"triton_grpc_error": "true"})
        client.async_stream_infer("nope", simple(1))
        _, error = stream.next()
        assert error.status() == "StatusCode.NOT_FOUND"
        client.stop_stream()
