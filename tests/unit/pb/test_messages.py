"""The generated message classes: complete, light, and at peace with tritonclient's in one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool, text_format

from mmcore import pb
from mmcore.pb import health_pb2, inference_pb2, model_config_pb2, reflection_pb2, reflection_v1alpha_pb2

ROOT = Path(__file__).parents[3]


def test_every_proto_has_its_module_and_descriptor() -> None:
    sources = {path.name for path in (ROOT / "protos").glob("*.proto")}
    assert set(pb.FILES) == sources
    files = [descriptor_pb2.FileDescriptorProto.FromString(serialized) for serialized in pb.descriptor_protos()]
    assert [file.name for file in files] == list(pb.FILES)
    assert {f"{Path(name).stem}_pb2.py" for name in sources} == {
        path.name for path in Path(pb.__file__).parent.glob("*_pb2.py")
    }
    seen: set[str] = set()
    for file in files:
        assert set(file.dependency) <= seen  # a reflection client adds them in this order
        seen.add(file.name)


def test_messages_make_the_round_trip() -> None:
    message = inference_pb2.ModelInferRequest(model_name="m")
    message.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    message.parameters["k"].double_param = 1.5
    again = inference_pb2.ModelInferRequest.FromString(message.SerializeToString())
    assert again == message
    assert isinstance(again.inputs[0], inference_pb2.ModelInferRequest.InferInputTensor)


def test_enums_are_found_by_name_and_value() -> None:
    assert model_config_pb2.DataType.Value("TYPE_FP32") == model_config_pb2.TYPE_FP32 == 11
    assert health_pb2.HealthCheckResponse.ServingStatus.Name(1) == "SERVING"
    assert health_pb2.HealthCheckResponse(status="NOT_SERVING").status == health_pb2.HealthCheckResponse.NOT_SERVING


def test_a_config_pbtxt_is_read() -> None:
    config = text_format.Parse(
        """
        name: "simple"  platform: "onnxruntime_onnx"  max_batch_size: 8
        input [ { name: "INPUT0" data_type: TYPE_INT32 dims: [ 16 ] } ]
        output [ { name: "OUTPUT0" data_type: TYPE_INT32 dims: [ 16 ] label_filename: "labels.txt" } ]
        instance_group [ { kind: KIND_CPU count: 2 } ]
        parameters { key: "threads" value: { string_value: "4" } }
        dynamic_batching { max_queue_delay_microseconds: 100 }
        version_policy: { latest { num_versions: 2 } }
        """,
        model_config_pb2.ModelConfig(),
    )
    assert config.input[0].dims == [16]
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert config.parameters["threads"].string_value == "4"


def test_the_classes_live_in_a_pool_of_their_own() -> None:
    assert inference_pb2.ModelInferRequest.DESCRIPTOR.file.pool is not descriptor_pool.Default()
    v1, v1alpha = reflection_pb2.ErrorResponse.DESCRIPTOR, reflection_v1alpha_pb2.ErrorResponse.DESCRIPTOR
    assert (v1.file.package, v1alpha.file.package) == ("grpc.reflection.v1", "grpc.reflection.v1alpha")


def test_tritonclient_and_grpcio_share_the_process_in_either_order() -> None:
    ours = "from mmcore.pb import inference_pb2, model_config_pb2, health_pb2, reflection_pb2, reflection_v1alpha_pb2"
    theirs = "from grpc_health.v1 import health_pb2; from grpc_reflection.v1alpha import reflection_pb2; " \
        "from tritonclient.grpc import service_pb2"  # fmt: skip
    use = "service_pb2.ModelInferRequest.FromString(inference_pb2.ModelInferRequest(id='1').SerializeToString())"
    for first, second in ((ours, theirs), (theirs, ours)):
        subprocess.run([sys.executable, "-c", f"{first}\n{second}\n{use}"], check=True, cwd=ROOT, timeout=60)


def test_the_modules_are_light_to_import() -> None:
    """Beside google.protobuf itself: no default pool entries, no grpc, little time."""
    code = (
        "import sys, time\n"
        "from google.protobuf import descriptor_pb2, descriptor_pool, message_factory\n"
        "from google.protobuf.internal import enum_type_wrapper\n"
        "start = time.process_time()\n"
        "from mmcore.pb import inference_pb2, model_config_pb2\n"
        "assert time.process_time() - start < 0.06\n"
        "assert not {'grpc', 'numpy', 'grpc_tools'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
