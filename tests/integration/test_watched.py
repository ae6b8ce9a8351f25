"""What is seen of requests from outside: traces at a collector, payloads written out, lines in the log."""

from __future__ import annotations

import base64
import http.client
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from mmcore.pb.inference_pb2 import ModelInferRequest, ModelInferResponse, ModelStreamInferResponse
from mmcore.pb.model_mesh_pb2 import ModelInfo, RegisterModelRequest, UnregisterModelRequest
from tests.posts import Posts
from tests.serving import FAILING, IDENTITY, Instance, Serve, write_model
from tests.toy_processes import Front, Runtime

pytestmark = pytest.mark.slow

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
DOCUMENT = {"inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}


@pytest.fixture
def posts() -> Iterator[Posts]:
    made = Posts()
    yield made
    made.close()


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("one", "two"):
        write_model(folder, name, IDENTITY.replace("DATATYPE", "FP32"))
    write_model(folder, "failing", FAILING)
    return folder


def until(holds: Callable[[], bool]) -> None:
    ends_at = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < ends_at
        time.sleep(0.02)


def over_rest(instance: Instance, model: str, body: Any = DOCUMENT, **headers: str) -> int:
    return post(instance.rest, f"/v2/models/{model}/infer", body, **headers)


def post(address: str, path: str, body: Any, **headers: str) -> int:
    connection = http.client.HTTPConnection(address, timeout=20)
    connection.request("POST", path, json.dumps(body), headers)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


def question(model: str, shape: tuple[int, ...] = (1, 2)) -> ModelInferRequest:
    body = ModelInferRequest(model_name=model, raw_input_contents=[np.ones(shape, np.float32).tobytes()])
    body.inputs.add(name="INPUT0", datatype="FP32", shape=shape)
    return body


def over_grpc(instance: Instance, model: str, **metadata: str) -> ModelInferResponse:
    with grpc.insecure_channel(instance.grpc) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        return ModelInferResponse.FromString(
            call(question(model).SerializeToString(), timeout=20, metadata=list(metadata.items()))
        )


def in_a_stream(instance: Instance, *models: str, **metadata: str) -> list[ModelStreamInferResponse]:
    with grpc.insecure_channel(instance.grpc) as channel:
        call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        bodies = [question(model).SerializeToString() for model in models]
        answers = call(iter(bodies), timeout=20, metadata=list(metadata.items()))
        return [ModelStreamInferResponse.FromString(answer) for answer in answers]


def spans(posts: Posts) -> list[dict[str, Any]]:
    found = []
    for one in posts.taken:
        for resource in ExportTraceServiceRequest.FromString(one.body).resource_spans:
            of = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    found.append({
                        "name": span.name, "trace": span.trace_id.hex(), "id": span.span_id.hex(),
                        "parent": span.parent_span_id.hex(), "instance": of["service.instance.id"],
                        "state": span.trace_state, "began": span.start_time_unix_nano, "ended": span.end_time_unix_nano,
                        "status": span.status.code,
                    })  # fmt: skip
    return found


def ended(*instances: Instance) -> None:
    """What they have is sent when they end."""
    for instance in instances:
        instance.signal(signal.SIGTERM)
    for instance in instances:
        assert instance.wait() == 0


def test_a_trace_goes_on_through_the_instances_and_tells_the_stages(
    serve: Serve, posts: Posts, tmp_path: Path, models: Path
) -> None:
    flags = ("--registry", f"sqlite:{tmp_path / 'registry.db'}", "--peer-port", "0")
    traced = ("--otlp-endpoint", posts.url, "--trace-ratio", "0")
    one, other = (serve(None, *flags, *traced) for _ in range(2))
    key = json.dumps({"storage_params": {"type": "local"}})
    with grpc.insecure_channel(one.grpc) as channel:
        register = channel.unary_unary("/mmesh.ModelMesh/registerModel")
        info = ModelInfo(type="python", path=str(models / "one"), key=key)
        register(RegisterModelRequest(modelId="m", modelInfo=info).SerializeToString(), timeout=20)
    parent = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=b"}
    over_grpc(one, "m", **parent)
    assert over_rest(other, "m", **parent) == 200
    over_grpc(other, "m", **parent)
    # Not sampled by the parent, and without one.
    over_grpc(one, "m", traceparent=f"00-{TRACE}-{PARENT}-00")
    assert over_rest(other, "m") == 200
    ended(one, other)

    found = spans(posts)
    assert {span["trace"] for span in found} == {TRACE}
    assert all(post.path == "/v1/traces" for post in posts.taken)
    by_id = {span["id"]: span for span in found}
    requests = [span for span in found if span["name"] == "inference.GRPCInferenceService/ModelInfer"]
    entered = [span for span in requests if span["parent"] == PARENT]
    passed_on = [span for span in requests if span["parent"] != PARENT]
    assert len(entered) == 3
    assert all(span["state"] == "a=b" for span in requests)
    assert passed_on
    for span in passed_on:
        forward = by_id[span["parent"]]
        asked = by_id[forward["parent"]]
        assert forward["name"] == "forward"
        assert forward["instance"] == asked["instance"] != span["instance"]
        assert asked["began"] <= forward["began"] <= span["began"] <= span["ended"] <= asked["ended"]
    for name, number in (("load", 1), ("pull", 1), ("open", 1), ("queue", 3), ("compute", 3)):
        assert sum(span["name"] == name for span in found) == number, name
    for span in found:
        if span["parent"] != PARENT and span["name"] != "inference.GRPCInferenceService/ModelInfer":
            within = by_id[span["parent"]]
            assert within["began"] <= span["began"] <= span["ended"]
            assert span["name"] == "forward" or span["ended"] <= within["ended"] + 1_000_000


def test_a_share_is_traced_unasked_and_errors_are_told(serve: Serve, posts: Posts, models: Path) -> None:
    instance = serve(models, "--otlp-endpoint", posts.url, "--trace-ratio", "1")
    assert over_rest(instance, "unknown") == 404
    assert over_rest(instance, "one", traceparent="00-nonsense") == 200
    ended(instance)
    requests = [span for span in spans(posts) if not span["parent"]]
    assert [span["status"] for span in requests] == [2, 0]
    assert len({span["trace"] for span in requests}) == 2


def test_each_request_of_a_stream_is_traced(serve: Serve, posts: Posts, models: Path) -> None:
    instance = serve(models, "--otlp-endpoint", posts.url, "--trace-ratio", "0")
    assert len(in_a_stream(instance, "one", "two")) == 2
    answers = in_a_stream(instance, "one", "unknown", "one", traceparent=f"00-{TRACE}-{PARENT}-01")
    assert [bool(answer.error_message) for answer in answers] == [False, True, False]
    ended(instance)
    found = spans(posts)
    assert {span["trace"] for span in found} == {TRACE}
    requests = [span for span in found if span["parent"] == PARENT]
    assert {span["name"] for span in requests} == {"inference.GRPCInferenceService/ModelStreamInfer"}
    assert sorted(span["status"] for span in requests) == [0, 0, 2]
    answered = {span["id"] for span in requests if span["status"] == 0}
    for stage in ("queue", "compute"):
        assert {span["parent"] for span in found if span["name"] == stage} == answered
    # They end when they are answered, not with the stream.
    assert all(span["began"] <= span["ended"] for span in requests)


def test_a_trace_goes_on_from_a_stream_to_another_instance(
    serve: Serve, posts: Posts, tmp_path: Path, models: Path
) -> None:
    flags = ("--registry", f"sqlite:{tmp_path / 'registry.db'}", "--peer-port", "0")
    one, other = (serve(None, *flags, "--otlp-endpoint", posts.url, "--trace-ratio", "0") for _ in range(2))
    key = json.dumps({"storage_params": {"type": "local"}})
    with grpc.insecure_channel(one.grpc) as channel:
        register = channel.unary_unary("/mmesh.ModelMesh/registerModel")
        info = ModelInfo(type="python", path=str(models / "one"), key=key)
        register(RegisterModelRequest(modelId="m", modelInfo=info).SerializeToString(), timeout=20)
    for instance in (one, other):
        [answer] = in_a_stream(instance, "m", traceparent=f"00-{TRACE}-{PARENT}-01")
        assert not answer.error_message
    ended(one, other)
    found = spans(posts)
    by_id = {span["id"]: span for span in found}
    [forward] = [span for span in found if span["name"] == "forward"]
    assert by_id[forward["parent"]]["name"].endswith("/ModelStreamInfer")
    [passed_on] = [span for span in found if span["parent"] == forward["id"]]
    assert passed_on["instance"] != forward["instance"]


def test_what_a_runtime_answers_is_traced_on_to_it_streams_too(serve: Serve, posts: Posts, tmp_path: Path) -> None:
    runtime = Runtime(f"unix:{tmp_path}/runtime.sock")
    runtime.start()
    parent = f"00-{TRACE}-{PARENT}-01"
    try:
        front = Front(
            serve(None, "--runtime", runtime.address, "--otlp-endpoint", posts.url, "--trace-ratio", "0"), tmp_path
        )
        front.register("m", load=True)
        assert len(in_a_stream(front.instance, "m", "m", traceparent=parent)) == 4
        assert len(in_a_stream(front.instance, "m")) == 2
        with pytest.raises(grpc.RpcError):
            in_a_stream(front.instance, "m", "unknown", traceparent=parent)
        over_grpc(front.instance, "m", traceparent=parent)
        front.close()
        told = [line.split(" ")[1] for line in runtime.journal if line.startswith(("stream", "traced"))]
        ended(front.instance)
    finally:
        runtime.kill()
    found = spans(posts)
    assert {(span["trace"], span["parent"]) for span in found} == {(TRACE, PARENT)}
    assert [(span["name"].rpartition("/")[2], span["status"]) for span in found] == [
        ("ModelStreamInfer", 0), ("ModelStreamInfer", 2), ("ModelInfer", 0),
    ]  # fmt: skip
    # What the runtime does is below the instance's span of it, and what is not traced is not.
    whole, failed, unary = (f"00-{TRACE}-{span['id']}-01" for span in found)
    assert told == [whole, "None", failed, unary]


def test_a_traced_request_needs_its_token_too(serve: Serve, posts: Posts, models: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.yaml"
    tokens.write_text("- {name: some, token: some, scopes: [infer], models: [one]}\n")
    instance = serve(models, "--auth-tokens", tokens, "--otlp-endpoint", posts.url, "--trace-ratio", "1")
    assert over_rest(instance, "one") == 401
    assert over_rest(instance, "two", authorization="Bearer some") == 403
    assert over_rest(instance, "one", authorization="Bearer some") == 200
    with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
        over_grpc(instance, "one")
    first, second = in_a_stream(instance, "one", "two", authorization="Bearer some")
    assert (first.error_message, "may not use" in second.error_message) == ("", True)
    ended(instance)


def test_a_collector_that_is_away_harms_no_request(serve: Serve, models: Path) -> None:
    instance = serve(models, "--otlp-endpoint", "http://127.0.0.1:9", "--trace-ratio", "1", "--grace", "5s")
    assert [over_rest(instance, "one") for _ in range(20)] == [200] * 20


def test_payloads_are_written_to_a_file(serve: Serve, tmp_path: Path, models: Path) -> None:
    file = tmp_path / "payloads.jsonl"
    instance = serve(models, "--payload-log", file, "--payload-model", "one", "--payload-model", "failing")
    answer = over_grpc(instance, "one")
    assert over_rest(instance, "one") == 200
    assert over_rest(instance, "two") == 200
    failing = {"inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [1], "data": [1]}]}
    assert over_rest(instance, "failing", failing) == 500
    ended(instance)
    events = [json.loads(line) for line in file.read_text().splitlines()]
    assert [event["type"].rpartition(".")[2] for event in events] == ["request", "response"] * 3
    assert [event["subject"] for event in events] == ["one"] * 4 + ["failing"] * 2
    assert [event["status"] for event in events[1::2]] == ["OK", "OK", "INTERNAL"]
    assert events[0]["requestid"] == events[1]["requestid"] != events[2]["requestid"]
    assert all(event["specversion"] == "1.0" and event["source"].startswith("mmcore/") for event in events)
    payloads = [base64.b64decode(event["data_base64"]) for event in events]
    assert ModelInferRequest.FromString(payloads[0]) == question("one")
    assert ModelInferResponse.FromString(payloads[1]) == answer
    assert ModelInferRequest.FromString(payloads[2]).model_name == "one"
    assert "seven" in events[5]["details"]


def test_payloads_within_streams_are_written_one_by_one(serve: Serve, tmp_path: Path, models: Path) -> None:
    file = tmp_path / "payloads.jsonl"
    instance = serve(models, "--payload-log", file, "--payload-model", "one", "--payload-model", "failing")
    first, _, third, _ = in_a_stream(instance, "one", "two", "failing", "one")
    assert "shape" in third.error_message
    ended(instance)
    events = [json.loads(line) for line in file.read_text().splitlines()]
    assert {event["method"] for event in events} == {"ModelStreamInfer"}
    requests = {event["requestid"]: event for event in events if event["type"].endswith(".request")}
    responses = {event["requestid"]: event for event in events if event["type"].endswith(".response")}
    assert requests.keys() == responses.keys()
    told = sorted((event["subject"], responses[name]["status"]) for name, event in requests.items())
    assert told == [("failing", "INVALID_ARGUMENT"), ("one", "OK"), ("one", "OK")]
    for name, event in requests.items():
        body = ModelInferRequest.FromString(base64.b64decode(event["data_base64"]))
        assert body == question(event["subject"])
        if event["subject"] == "one":
            answer = ModelInferResponse.FromString(base64.b64decode(responses[name]["data_base64"]))
            assert answer.raw_output_contents == first.infer_response.raw_output_contents


def test_payloads_are_posted_and_dropped_where_the_endpoint_is_slow(serve: Serve, posts: Posts, models: Path) -> None:
    instance = serve(models, "--payload-log", f"{posts.url}/events?a=b")
    assert over_rest(instance, "one") == 200
    taken = posts.wait_for(2)
    assert {(one.path, one.content_type.partition(";")[0]) for one in taken} == {
        ("/events?a=b", "application/cloudevents+json")
    }
    assert json.loads(taken[0].body)["type"] == "mmcore.inference.request"
    posts.free.clear()
    with grpc.insecure_channel(instance.grpc) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        body = question("one").SerializeToString()
        for under_way in [call.future(body, timeout=20) for _ in range(700)]:
            under_way.result()
    connection = http.client.HTTPConnection(instance.metrics, timeout=20)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    dropped = next(
        line for line in text.splitlines() if line.startswith('mmcore_payload_events_total{outcome="dropped"')
    )
    # 1024 wait; one is on its way.
    assert 1400 - 1024 - 1 <= int(dropped.split()[1]) <= 1400 - 1024


def test_requests_are_logged_on_demand(serve: Serve, models: Path) -> None:
    instance = serve(models)
    assert over_rest(instance, "one") == 200
    assert post(instance.rest, "/v2/logging", {"log_requests": True}) == 200
    assert over_rest(instance, "two") == 200
    assert over_rest(instance, "no%0Athing") == 404
    over_grpc(instance, "one")
    assert post(instance.rest, "/v2/logging", {"log_requests": False}) == 200
    assert over_rest(instance, "one") == 200
    ended(instance)
    lines = [line for line in instance.log_text().splitlines() if "server.request_log" in line]
    assert [line.split("model=")[1].split()[0] for line in lines if " ModelInfer " in line] == [
        "two",
        "'no\\nthing'",
        "one",
    ]
    assert "status=OK" in lines[0] and "status=NOT_FOUND" in "".join(lines)


def test_requests_of_a_stream_are_logged_on_demand(serve: Serve, models: Path) -> None:
    instance = serve(models, "--log-format", "json")
    in_a_stream(instance, "one")
    assert post(instance.rest, "/v2/logging", {"log_requests": True}) == 200
    in_a_stream(instance, "one", "unknown")
    ended(instance)
    lines = [json.loads(line) for line in instance.log_text().splitlines()]
    told = [(one["method"], one["model"], one["status"]) for one in lines if one.get("event") == "request"]
    streamed = sorted(one for one in told if one[0] == "ModelStreamInfer")
    assert streamed == [("ModelStreamInfer", "one", "OK"), ("ModelStreamInfer", "unknown", "NOT_FOUND")]


def test_the_turns_of_a_life_have_names_and_fields_as_json(serve: Serve, tmp_path: Path, models: Path) -> None:
    flags = ("--registry", f"sqlite:{tmp_path / 'registry.db'}", "--peer-port", "0", "--log-format", "json")
    one = serve(None, *flags)
    with grpc.insecure_channel(one.grpc) as channel:
        register = channel.unary_unary("/mmesh.ModelMesh/registerModel")
        unregister = channel.unary_unary("/mmesh.ModelMesh/unregisterModel")
        key = json.dumps({"storage_params": {"type": "local"}})
        for name, path in (("good", models / "one"), ("bad", tmp_path / "nothing")):
            info = ModelInfo(type="python", path=str(path), key=key)
            register(RegisterModelRequest(modelId=name, modelInfo=info).SerializeToString(), timeout=20)
        assert over_rest(one, "good") == 200
        assert over_rest(one, "bad") == 400
        unregister(UnregisterModelRequest(modelId="good").SerializeToString(), timeout=20)

    def events() -> list[dict[str, Any]]:
        return [line for text in one.log_text().splitlines() if "event" in (line := json.loads(text))]

    def told(event: str, **fields: str) -> bool:
        return any(one["event"] == event and fields.items() <= one.items() for one in events())

    until(lambda: told("unloaded", model="good"))
    other = serve(None, *flags)
    until(lambda: told("joined", instance=other.ready["instance"]))
    ended(other)
    until(lambda: told("left", instance=other.ready["instance"]))
    for event in ("registered", "loading", "loaded", "unregistered", "unloaded"):
        assert told(event, model="good"), event
    [failed] = [one for one in events() if one["event"] == "load_failed"]
    assert failed["model"] == "bad"
    assert "nothing" in failed["reason"]
    [loaded] = [one for one in events() if one["event"] == "loaded"]
    assert loaded["bytes"] > 0 and {"level", "logger", "message", "time"} <= loaded.keys()
    ended(one)
    assert told("draining")


def test_each_turn_in_a_life_is_a_line_in_the_log(serve: Serve, tmp_path: Path, models: Path) -> None:
    flags = ("--registry", f"sqlite:{tmp_path / 'registry.db'}", "--peer-port", "0")
    one = serve(None, *flags)
    with grpc.insecure_channel(one.grpc) as channel:
        register = channel.unary_unary("/mmesh.ModelMesh/registerModel")
        unregister = channel.unary_unary("/mmesh.ModelMesh/unregisterModel")
        key = json.dumps({"storage_params": {"type": "local"}})
        for name, path in (("good", models / "one"), ("bad", tmp_path / "nothing")):
            info = ModelInfo(type="python", path=str(path), key=key)
            for _ in range(2):
                register(RegisterModelRequest(modelId=name, modelInfo=info).SerializeToString(), timeout=20)
        assert over_rest(one, "good") == 200
        assert over_rest(one, "bad") == 400
        unregister(UnregisterModelRequest(modelId="good").SerializeToString(), timeout=20)
    other = serve(None, *flags)
    until(lambda: f"instance {other.ready['instance']} has joined" in one.log_text())
    ended(other)
    until(lambda: f"instance {other.ready['instance']} has left" in one.log_text())
    until(lambda: "unloaded model good" in one.log_text())
    text = one.log_text()
    for line in (
        "registered model good,", "registered model bad,", "loading model good ", "loaded model good ",
        "model bad version 1 was not loaded", "unloaded model good ",
        f"instance {other.ready['instance']} has joined",
    ):  # fmt: skip
        assert text.count(line) - text.count(f"un{line}") == 1, line
