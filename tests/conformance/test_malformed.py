"""Bytes that are no message, sent to every method: each is the caller's fault and harms nobody else."""

from __future__ import annotations

import grpc
import pytest

from mmcore.pb import inference_pb2
from tests.serving import Instance

pytestmark = pytest.mark.slow

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
UNARY = [method.name for method in SERVICE.methods if not method.client_streaming]


@pytest.mark.parametrize("method", UNARY)
def test_every_unary_method_refuses_what_is_no_message(instance: Instance, method: str) -> None:
    with grpc.insecure_channel(instance.grpc) as channel:
        call = channel.unary_unary(f"/{SERVICE.full_name}/{method}")
        with pytest.raises(grpc.RpcError) as error:
            call(b"\xff\xff\xff", timeout=10)
        wanted = {grpc.StatusCode.INVALID_ARGUMENT}
        if method.startswith("CudaSharedMemory"):
            wanted.add(grpc.StatusCode.UNIMPLEMENTED)
        assert error.value.code() in wanted
        assert "Traceback" not in error.value.details()


def test_every_method_of_the_service_is_served(instance: Instance) -> None:
    with grpc.insecure_channel(instance.grpc) as channel:
        for method in UNARY:
            try:
                channel.unary_unary(f"/{SERVICE.full_name}/{method}")(b"", timeout=10)
            except grpc.RpcError as error:
                assert "not served" not in error.details(), method


def test_a_stream_tells_of_what_is_no_message_and_goes_on(instance: Instance) -> None:
    wrong, right = b"\xff\xff\xff", inference_pb2.ModelInferRequest(model_name="nope").SerializeToString()
    with grpc.insecure_channel(instance.grpc) as channel:
        call = channel.stream_stream(f"/{SERVICE.full_name}/ModelStreamInfer")
        answers = [
            inference_pb2.ModelStreamInferResponse.FromString(answer)
            for answer in call(iter([wrong, right, wrong]), timeout=10)
        ]
    assert "malformed" in answers[0].error_message
    assert "unknown model" in answers[1].error_message
    assert "malformed" in answers[2].error_message
