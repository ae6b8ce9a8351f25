"""System shared memory with tritonclient: regions, and tensors in them as inputs and outputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException, serialize_byte_tensor
from tritonclient.utils import shared_memory as shm

from tests.serving import Instance

pytestmark = pytest.mark.slow

A = np.arange(16, dtype=np.int32).reshape(1, 16)
B = np.full((1, 16), 5, np.int32)


@pytest.fixture
def client(instance: Instance) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(instance.grpc) as client:
        yield client
        client.unregister_system_shared_memory()


Region = Callable[..., Any]


@pytest.fixture
def region(client: triton.InferenceServerClient) -> Iterator[Region]:
    """Creates a shared memory object and registers it, or a window into it."""
    made = []

    def create(name: str, object_size: int, *, byte_size: int | None = None, offset: int = 0) -> Any:
        key = f"/mmcore-test-{os.getpid()}-{name}"
        handle = shm.create_shared_memory_region(name, key, object_size, create_only=True)
        made.append(handle)
        client.register_system_shared_memory(name, key, byte_size or object_size, offset)
        return handle

    yield create
    for handle in made:
        shm.destroy_shared_memory_region(handle)


def shared_input(name: str, region: str, array: np.ndarray[Any, Any], offset: int = 0) -> triton.InferInput:
    made = triton.InferInput(name, list(array.shape), "INT32")
    made.set_shared_memory(region, array.nbytes, offset)
    return made


def shared_output(name: str, region: str, byte_size: int, offset: int = 0) -> triton.InferRequestedOutput:
    made = triton.InferRequestedOutput(name)
    made.set_shared_memory(region, byte_size, offset)
    return made


def test_tensors_go_in_and_out_through_shared_memory(client: triton.InferenceServerClient, region: Region) -> None:
    inputs, outputs = region("in", 128), region("out", 128)
    shm.set_shared_memory_region(inputs, [A, B])
    result = client.infer(
        "simple",
        [shared_input("INPUT0", "in", A), shared_input("INPUT1", "in", B, offset=64)],
        outputs=[shared_output("OUTPUT0", "out", 64), shared_output("OUTPUT1", "out", 64, offset=64)],
    )
    np.testing.assert_array_equal(shm.get_contents_as_numpy(outputs, np.int32, [1, 16]), A + B)
    np.testing.assert_array_equal(shm.get_contents_as_numpy(outputs, np.int32, [1, 16], offset=64), A - B)
    output = result.get_output("OUTPUT1")
    assert list(output.shape) == [1, 16]
    assert output.parameters["shared_memory_region"].string_param == "out"
    assert output.parameters["shared_memory_byte_size"].int64_param == 64


def test_shared_and_sent_tensors_may_be_mixed(client: triton.InferenceServerClient, region: Region) -> None:
    shm.set_shared_memory_region(region("in", 64), [A])
    outputs = region("out", 64)
    sent = triton.InferInput("INPUT1", [1, 16], "INT32")
    sent.set_data_from_numpy(B)
    result = client.infer(
        "simple",
        [shared_input("INPUT0", "in", A), sent],
        outputs=[shared_output("OUTPUT0", "out", 64), triton.InferRequestedOutput("OUTPUT1")],
    )
    np.testing.assert_array_equal(shm.get_contents_as_numpy(outputs, np.int32, [1, 16]), A + B)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), A - B)


def test_outputs_are_raw_when_all_inputs_are_shared(client: triton.InferenceServerClient, region: Region) -> None:
    shm.set_shared_memory_region(region("in", 128), [A, B])
    result = client.infer("simple", [shared_input("INPUT0", "in", A), shared_input("INPUT1", "in", B, offset=64)])
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), A + B)


def test_text_goes_through_shared_memory(client: triton.InferenceServerClient, region: Region) -> None:
    text = np.array([[b"one", b"", b"three"]], dtype=np.object_)
    serialized = serialize_byte_tensor(text)
    size = len(serialized.item())
    shm.set_shared_memory_region(region("in", size), [serialized])
    outputs = region("out", size)
    made = triton.InferInput("INPUT0", [1, 3], "BYTES")
    made.set_shared_memory("in", size)
    client.infer("identity_bytes", [made], outputs=[shared_output("OUTPUT0", "out", size)])
    assert shm.get_contents_as_numpy(outputs, np.object_, [1, 3]).tolist() == text.tolist()


def test_the_status_tells_what_is_registered(client: triton.InferenceServerClient, region: Region) -> None:
    region("one", 256, byte_size=64, offset=128)
    region("two", 64)
    regions = client.get_system_shared_memory_status().regions
    assert set(regions) == {"one", "two"}
    one = client.get_system_shared_memory_status("one").regions["one"]
    assert (one.offset, one.byte_size) == (128, 64)
    assert one.key.endswith("-one")
    client.unregister_system_shared_memory("one")
    assert set(client.get_system_shared_memory_status().regions) == {"two"}
    with pytest.raises(InferenceServerException, match="Unable to find system shared memory region: 'one'"):
        client.get_system_shared_memory_status("one")


def test_a_region_is_a_window_into_its_object(client: triton.InferenceServerClient, region: Region) -> None:
    handle = region("window", 192, byte_size=64, offset=128)
    shm.set_shared_memory_region(handle, [np.zeros(32, np.int32), A])
    result = client.infer("simple", [shared_input("INPUT0", "window", A), shared_input("INPUT1", "window", A)])
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), A * 2)


@pytest.mark.parametrize(
    ("inputs", "outputs", "words"),
    [
        ([shared_input("INPUT0", "nope", A)], [], "Unable to find shared memory region: 'nope'"),
        ([shared_input("INPUT0", "in", A, offset=100)], [], "leave shared memory region 'in' of 128 bytes"),
        ([shared_input("INPUT0", "in", A[:, :4])], [], "INPUT0"),
        ([], [shared_output("OUTPUT0", "in", 32)], "should be at least 64 bytes to hold the results"),
        ([], [shared_output("OUTPUT0", "in", 64, offset=65)], "leave shared memory region 'in' of 128 bytes"),
        ([], [shared_output("OUTPUT0", "gone", 64)], "Unable to find shared memory region: 'gone'"),
    ],
)
def test_what_does_not_fit_is_an_invalid_argument(
    client: triton.InferenceServerClient,
    region: Region,
    inputs: list[triton.InferInput],
    outputs: list[triton.InferRequestedOutput],
    words: str,
) -> None:
    region("in", 128)
    given = inputs or [shared_input("INPUT0", "in", A)]
    with pytest.raises(InferenceServerException) as error:
        client.infer("simple", [*given, shared_input("INPUT1", "in", B, offset=64)], outputs=outputs or None)
    assert error.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert words in error.value.message()


@pytest.mark.parametrize("key", ["../etc/passwd", "/../etc/passwd", "/etc/passwd", "/", "/."])
def test_keys_that_leave_the_shared_memory_folder_are_refused(client: triton.InferenceServerClient, key: str) -> None:
    with pytest.raises(InferenceServerException) as error:
        client.register_system_shared_memory("evil", key, 8)
    assert error.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_an_object_truncated_later_is_an_error_and_the_server_lives(
    client: triton.InferenceServerClient, region: Region
) -> None:
    region("in", 8192)
    os.truncate(Path("/dev/shm") / f"mmcore-test-{os.getpid()}-in", 16)
    with pytest.raises(InferenceServerException, match="truncated"):
        client.infer("simple", [shared_input("INPUT0", "in", A), shared_input("INPUT1", "in", B, offset=4096)])
    assert client.is_server_live()
