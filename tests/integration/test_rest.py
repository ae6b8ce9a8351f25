"""REST of a running instance, with plain HTTP: what curl would see."""

from __future__ import annotations

import gzip
import http.client
import json
import re
import subprocess
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from openapi_spec_validator import validate

from mmcore.server.rest.routes import ROUTES
from tests.serving import ADD_SUB, IDENTITY, WAITING, Instance, Serve, command, environment, write_model

pytestmark = pytest.mark.slow

LIMIT = 2**20

TWO_OUTPUTS = """
class Model:
    inputs = [("a", "FP32", [-1]), ("b", "BYTES", [-1])]
    outputs = [("double", "FP32", [-1]), ("text", "BYTES", [-1])]

    def predict(self, inputs):
        return {"double": inputs["a"] * 2, "text": inputs["b"]}
"""


@pytest.fixture(scope="module")
def instance(serve_for_session: Serve, tmp_path_factory: pytest.TempPathFactory) -> Instance:
    models = tmp_path_factory.mktemp("models")
    write_model(models, "simple", ADD_SUB)
    write_model(models, "two", TWO_OUTPUTS)
    write_model(models, "waiting", WAITING, settings="execution: thread\n")
    for datatype in ("FP16", "FP32", "FP64", "BF16", "BYTES", "INT64"):
        write_model(models, datatype.lower(), IDENTITY.replace("DATATYPE", datatype))
    write_model(models, "one", IDENTITY.replace("DATATYPE", "FP32").replace("[-1, -1]", "[-1, 3]"))
    write_model(models, "text", IDENTITY.replace("DATATYPE", "BYTES").replace("[-1, -1]", "[-1]"))
    return serve_for_session(models, "--max-message", str(LIMIT))


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    def __init__(self, address: str) -> None:
        self.connection = http.client.HTTPConnection(address, timeout=20)

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        self.connection.request(method, path, data, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = self.connection.getresponse()
        return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())


@pytest.fixture
def ask(instance: Instance) -> Iterator[Client]:
    client = Client(instance.rest)
    yield client
    client.connection.close()


def tensor(datatype: str, shape: list[int], data: Any, **parameters: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"name": "INPUT0", "datatype": datatype, "shape": shape, "data": data}
    return made | ({"parameters": parameters} if parameters else {})


# Paths


def test_every_path_of_the_description_is_served_and_every_path_served_is_described(ask: Client) -> None:
    answer = ask("GET", "/openapi.json")
    assert answer.json["openapi"].startswith("3.")
    described = {re.sub(r"\{\w+\}", "*", path).strip("/"): set(verbs) for path, verbs in answer.json["paths"].items()}
    assert described == {path: {verb.lower() for verb in verbs} for path, verbs in ROUTES}
    operations = [one["operationId"] for verbs in answer.json["paths"].values() for one in verbs.values()]
    assert len(operations) == len(set(operations))
    for path in answer.json["paths"]:
        assert "no such path" not in ask("POST", path.replace("{", "").replace("}", ""), b"").body.decode()


def test_the_description_is_one_and_tells_of_binary_tensors(ask: Client) -> None:
    document = ask("GET", "/openapi.json").json
    validate(document)
    infer = document["paths"]["/v2/models/{model}/infer"]["post"]
    headers = {one["name"] for one in infer["parameters"] if one["in"] == "header"}
    assert headers == {"Inference-Header-Content-Length", "Content-Encoding", "Accept-Encoding"}
    assert set(infer["requestBody"]["content"]) == {"application/json", "application/octet-stream"}
    told = infer["responses"]["200"]
    assert set(told["content"]) == {"application/json", "application/octet-stream"}
    assert "Inference-Header-Content-Length" in told["headers"]
    schemas = document["components"]["schemas"]
    assert "binary_data_size" in schemas["TensorParameters"]["properties"]
    assert "binary_data" in schemas["OutputParameters"]["properties"]
    assert "binary_data_output" in schemas["RequestParameters"]["properties"]


def test_the_page_to_try_it_needs_nothing_from_elsewhere(ask: Client) -> None:
    answer = ask("GET", "/docs")
    assert answer.headers["content-type"].startswith("text/html")
    assert not re.search(rb"(src|href)=\"(?!/)|https?:|@import|url\(", answer.body)


def test_an_unknown_path_is_404_and_a_wrong_method_405(ask: Client) -> None:
    for path in ("/", "/nope", "/v2/models/simple/nope", "/v2/models/simple/versions/1/infer/x"):
        assert (ask("GET", path).status, "/docs" in ask("GET", path).json["error"]) == (404, True)
    answer = ask("DELETE", "/v2/models/simple")
    assert (answer.status, answer.headers["allow"]) == (405, "GET")
    assert ask("GET", "/v2/models/simple/infer").headers["allow"] == "POST"


def test_names_in_paths_may_be_escaped(ask: Client) -> None:
    assert ask("GET", "/v2/models/s%69mple").json["name"] == "simple"
    assert "'a/b č' is not found" in ask("GET", "/v2/models/a%2Fb%20%C4%8D").json["error"]


def test_health_is_told_in_words_and_status(ask: Client) -> None:
    assert (ask("GET", "/v2/health/live").json, ask("GET", "/v2/health/ready").json) == (
        {"live": True},
        {"ready": True},
    )
    assert ask("GET", "/v2/models/simple/ready").json == {"name": "simple", "ready": True}
    answer = ask("GET", "/v2/models/nope/ready")
    assert (answer.status, answer.json) == (503, {"name": "nope", "ready": False})
    assert "simple" in ask("GET", "/v2/models").json["models"]
    assert ask("HEAD", "/v2/health/live").body == b""


# Inference


def infer(ask: Client, model: str, entry: dict[str, Any], **more: Any) -> Answer:
    return ask("POST", f"/v2/models/{model}/infer", {"inputs": [entry], **more})


def test_numbers_of_half_precision_are_taken_and_told(ask: Client) -> None:
    [output] = infer(ask, "bf16", tensor("BF16", [1, 3], [1, 0.5, "NaN"])).json["outputs"]
    assert output == {"name": "OUTPUT0", "datatype": "BF16", "shape": [1, 3], "data": [1, 0.5, "NaN"]}


@pytest.mark.parametrize("datatype", ["FP16", "BF16", "FP32", "FP64"])
def test_what_is_not_finite_goes_both_ways(ask: Client, datatype: str) -> None:
    words = ["NaN", "Infinity", "-Infinity", 1.5]
    [output] = infer(ask, datatype.lower(), tensor(datatype, [1, 4], words)).json["outputs"]
    assert output == {"name": "OUTPUT0", "datatype": datatype, "shape": [1, 4], "data": words}
    # null, and the bare words of Python's json.
    [output] = infer(ask, datatype.lower(), tensor(datatype, [1, 3], [None, 2, float("inf")])).json["outputs"]
    assert output["data"] == ["NaN", 2, "Infinity"]
    # So does what is long enough to be read and written piece by piece.
    many = [*([0.5] * 40_000), *words]
    answer = infer(ask, datatype.lower(), tensor(datatype, [2, 20_002], many))
    assert answer.json["outputs"][0]["data"] == many


def test_numbers_beyond_half_precision_are_infinite(ask: Client) -> None:
    [output] = infer(ask, "fp16", tensor("FP16", [1, 4], [65504, 65520, -1e9, 0.1])).json["outputs"]
    assert output["data"][:3] == [65504, "Infinity", "-Infinity"]
    assert output["data"][3] == pytest.approx(0.1, rel=1e-3)


def test_whole_numbers_have_no_words(ask: Client) -> None:
    for wrong in ("NaN", None, float("inf")):
        answer = infer(ask, "int64", tensor("INT64", [1, 1], [wrong]))
        assert (answer.status, "INPUT0" in answer.json["error"]) == (400, True)


def test_bytes_are_text_if_they_can_be(ask: Client) -> None:
    [output] = infer(ask, "bytes", tensor("BYTES", [1, 2], ["čaj", ""])).json["outputs"]
    assert (output["data"], "parameters" in output) == (["čaj", ""], False)
    [output] = infer(ask, "bytes", tensor("BYTES", [1, 2], ["/w==", "YQ=="], content_type="base64")).json["outputs"]
    assert (output["data"], output["parameters"]) == (["/w==", "YQ=="], {"content_type": "base64"})


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (b"{", "malformed JSON"),
        ([], "expected the request to be a JSON object"),
        ({}, "at least one input"),
        ({"inputs": {}}, "inputs: expected an array"),
        ({"inputs": [{"name": 1}]}, "inputs[0].name: expected a string, got 1"),
        ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1]}]}, "inputs[0].shape"),
        ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1]}]}, "input 'x': expected data"),
        ({"inputs": [tensor("FP32", [1, 2], [1])]}, "expected 2 elements for shape [1, 2], got 1"),
        ({"inputs": [tensor("INT64", [1, 1], [1])]}, "expected datatype FP32, got INT64"),
        ({"inputs": [tensor("FP32", [2], [1, 2])]}, "expected shape [-1,-1], got [2]"),
        ({"inputs": [tensor("FP32", [1, 1], [1], binary_data_size=4)]}, "expected data or binary_data_size, got both"),
        ({"inputs": [tensor("FP32", [1, 1], [1])], "parameters": {"x": []}}, "parameter 'x'"),
        ({"inputs": [tensor("FP32", [1, 1], [1])], "outputs": [{}]}, "outputs[0].name"),
        ({"inputs": [tensor("FP32", [1, 1], [1])], "id": 7}, "id: expected a string"),
        ({"inputs": [tensor("FP32", [2**62, 2**62], [])]}, "got 0"),
    ],
)  # fmt: skip
def test_a_wrong_request_says_which_field_is_wrong(ask: Client, request_: Any, words: str) -> None:
    answer = ask("POST", "/v2/models/fp32/infer", request_)
    assert answer.status == 400
    assert words in answer.json["error"]


def binary(size: int, shape: list[int]) -> bytes:
    entry = {"name": "INPUT0", "datatype": "FP32", "shape": shape, "parameters": {"binary_data_size": size}}
    return json.dumps({"inputs": [entry]}).encode()


@pytest.mark.parametrize(
    ("document", "data", "length", "words"),
    [
        (binary(8, [1, 1]), bytes(8), None, "expected 4 bytes"),
        (binary(8, [1, 2]), bytes(4), None, "expected 8 bytes of binary data, got 4"),
        (binary(4, [1, 1]), bytes(8), None, "4 bytes of binary data are left"),
        (binary(-1, [1, 1]), bytes(8), None, "expected a number of bytes, got -1"),
        (binary(4, [1, 1]), bytes(4), "100000", "Inference-Header-Content-Length"),
        (binary(4, [1, 1]), bytes(4), "-3", "Inference-Header-Content-Length"),
        (binary(4, [1, 1]), bytes(4), "7", "malformed JSON"),
    ],
)
def test_binary_data_that_disagrees_is_refused(
    ask: Client, document: bytes, data: bytes, length: str | None, words: str
) -> None:
    answer = ask(
        "POST",
        "/v2/models/fp32/infer",
        document + data,
        Inference_Header_Content_Length=length or str(len(document)),
    )
    assert answer.status == 400
    assert words in answer.json["error"]


def test_a_request_may_be_nothing_but_a_tensors_bytes(ask: Client) -> None:
    array = np.arange(6, dtype=np.float32)
    answer = ask("POST", "/v2/models/one/infer", array.tobytes(), Inference_Header_Content_Length="0")
    length = int(answer.headers["inference-header-content-length"])
    [output] = json.loads(answer.body[:length])["outputs"]
    assert (output["shape"], output["parameters"]) == ([2, 3], {"binary_data_size": 24})
    assert answer.body[length:] == array.tobytes()
    answer = ask("POST", "/v2/models/text/infer", b"hello", Inference_Header_Content_Length="0")
    assert answer.body.endswith(b"\x05\0\0\0hello")
    answer = ask("POST", "/v2/models/simple/infer", b"hello", Inference_Header_Content_Length="0")
    assert (answer.status, "2 inputs" in answer.json["error"]) == (400, True)


def test_the_model_may_be_named_in_a_header_as_over_grpc(ask: Client) -> None:
    # The path's name goes first; a client of the archived stack sends both.
    answer = ask("POST", "/v2/models/fp32/infer", {"inputs": [tensor("FP32", [1, 1], [2])]}, mm_model_id="simple")
    assert answer.json["outputs"][0]["data"] == [2]


# Compression and limits


@pytest.mark.parametrize("compress", [gzip.compress, zlib.compress, lambda data: zlib.compress(data, wbits=-15)])
def test_compressed_requests_are_taken(ask: Client, compress: Any) -> None:
    coding = "gzip" if compress is gzip.compress else "deflate"
    body = compress(json.dumps({"inputs": [tensor("FP32", [1, 1], [2])]}).encode())
    answer = ask("POST", "/v2/models/fp32/infer", body, Content_Encoding=coding)
    assert answer.json["outputs"][0]["data"] == [2]
    assert "content-encoding" not in answer.headers
    index = ask("POST", "/v2/repository/index", compress(b'{"ready": true}'), Content_Encoding=coding)
    assert {row["state"] for row in index.json} == {"READY"}


def test_a_list_of_codings_leaves_the_answer_as_it_is(ask: Client) -> None:
    answer = ask("POST", "/v2/models/fp32/infer", {"inputs": [tensor("FP32", [1, 1], [2])]}, Accept_Encoding="gzip, br")
    assert "content-encoding" not in answer.headers
    answer = ask("POST", "/v2/models/fp32/infer", {"inputs": [tensor("FP32", [1, 1], [2])]}, Accept_Encoding="gzip")
    assert json.loads(gzip.decompress(answer.body))["outputs"][0]["data"] == [2]


@pytest.mark.parametrize(
    ("coding", "expand"), [("gzip", gzip.decompress), ("deflate", zlib.decompress), (" GZIP ", gzip.decompress)]
)
def test_answers_are_compressed_for_who_asks_for_one_coding(ask: Client, coding: str, expand: Any) -> None:
    body = {"inputs": [tensor("FP32", [1, 2], [2, "NaN"])]}
    answer = ask("POST", "/v2/models/fp32/infer", body, Accept_Encoding=coding)
    assert answer.headers["content-encoding"] == coding.strip().lower()
    assert json.loads(expand(answer.body))["outputs"][0]["data"] == [2, "NaN"]
    # Behind a document of the length that is stated, decompressed, lie the tensors.
    answer = ask(
        "POST", "/v2/models/fp32/infer", {**body, "parameters": {"binary_data_output": True}}, Accept_Encoding=coding
    )
    whole, length = expand(answer.body), int(answer.headers["inference-header-content-length"])
    assert json.loads(whole[:length])["outputs"][0]["parameters"] == {"binary_data_size": 8}
    assert whole[length:] == np.array([2, np.nan], np.float32).tobytes()
    # And both ways at once.
    sent = gzip.compress(json.dumps(body).encode())
    answer = ask("POST", "/v2/models/fp32/infer", sent, Content_Encoding="gzip", Accept_Encoding=coding)
    assert json.loads(expand(answer.body))["outputs"][0]["data"] == [2, "NaN"]


def test_what_is_not_compressed_as_it_says_is_refused(ask: Client) -> None:
    whole = gzip.compress(b"{}" * 100)
    for body, coding in ((b"{}", "gzip"), (whole[:-9], "gzip"), (b"{}", "deflate"), (b"{}", "br")):
        answer = ask("POST", "/v2/models/fp32/infer", body, Content_Encoding=coding)
        assert answer.status == 400, coding


def test_a_body_above_the_limit_is_413_compressed_or_not(ask: Client) -> None:
    bomb = gzip.compress(bytes(200 * LIMIT))
    for path in ("/v2/models/fp32/infer", "/v2/repository/index"):
        answer = ask("POST", path, bomb, Content_Encoding="gzip")
        assert (answer.status, "limit" in answer.json["error"]) == (413, True)
    assert ask("POST", "/v2/models/fp32/infer", bytes(LIMIT + 1)).status == 413


def test_large_json_is_read_and_written_while_others_are_served(instance: Instance, ask: Client) -> None:
    values = (np.arange(90_000, dtype=np.float32) / 8).reshape(3, -1)
    body = json.dumps({"inputs": [tensor("FP32", list(values.shape), values.tolist())]}, separators=(",", ":"))
    ask("POST", "/v2/models/fp32/infer", {"inputs": [tensor("FP32", [1, 1], [2])]})
    waits: list[float] = []
    done = threading.Event()

    def probe() -> None:
        other = Client(instance.rest)
        while not done.is_set():
            began = time.perf_counter()
            assert other("GET", "/v2/health/live").status == 200
            waits.append(time.perf_counter() - began)
        other.connection.close()

    prober = threading.Thread(target=probe)
    prober.start()
    try:
        for _ in range(5):
            answer = ask("POST", "/v2/models/fp32/infer", body.encode())
            assert answer.status == 200
    finally:
        done.set()
        prober.join()
    np.testing.assert_array_equal(np.array(answer.json["outputs"][0]["data"], np.float32), values.reshape(-1))
    # Others had their turns in between; how long each took is for the bench.
    assert len(waits) >= 5


def test_fifty_megabytes_of_json_stall_nobody(serve: Serve, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    for name in ("large", "small"):
        write_model(models, name, IDENTITY.replace("DATATYPE", "FP32"))
    instance = serve(models, "--max-message", "64MiB")
    ask = Client(instance.rest)
    for name in ("large", "small"):
        assert infer(ask, name, tensor("FP32", [1, 1], [1])).status == 200
    count = 2_600_000
    numbers = ",".join(map(repr, np.random.default_rng(1).random(1000, np.float32).tolist())).split(",")
    data = ",".join(numbers * (count // 1000))
    document = json.dumps({"inputs": [tensor("FP32", [1, count], ["HERE"])]})
    (tmp_path / "body").write_text(document.replace('"HERE"', data))
    assert (tmp_path / "body").stat().st_size > 50_000_000
    # A process of its own: whatever takes long in this one is no stall of the instance.
    flags = ("-w", "%{http_code}", "--data-binary", f"@{tmp_path / 'body'}")
    curl = ["curl", "-s", "-o", tmp_path / "answer", *flags, f"{instance.rest}/v2/models/large/infer"]
    began = time.perf_counter()
    large = subprocess.Popen(curl, stdout=subprocess.PIPE, text=True)
    waits: list[float] = []
    try:
        while large.poll() is None:
            sent = time.perf_counter()
            assert infer(ask, "small", tensor("FP32", [1, 1], [1])).status == 200
            waits.append(time.perf_counter() - sent)
            assert waits[-1] < 60
        took_s = time.perf_counter() - began
        assert large.communicate(timeout=10)[0] == "200"
    finally:
        large.kill()
        large.wait(10)
        ask.connection.close()
    answered = json.loads((tmp_path / "answer").read_bytes())["outputs"][0]
    assert answered["shape"] == [1, count]
    for part in (answered["data"][:1000], answered["data"][-1000:]):
        np.testing.assert_array_equal(np.array(part, np.float32), np.array(numbers, np.float32))
    # One that is read, or written, in one go keeps the others waiting for half of it.
    assert max(waits) < took_s / 4
    assert len(waits) > 50


# KServe V1


def test_rows_are_predicted(ask: Client) -> None:
    assert ask("GET", "/v1/models/fp32").json == {"name": "fp32", "ready": True}
    assert "fp32" in ask("GET", "/v1/models").json["models"]
    answer = ask("POST", "/v1/models/fp32:predict", {"instances": [[1, 2.5], [3, 0.1]]})
    assert answer.json == {"predictions": [[1.0, 2.5], [3.0, 0.1]]}


def test_many_rows_are_predicted(ask: Client) -> None:
    rows = (np.arange(90_000, dtype=np.float32).reshape(-1, 3) / 8).tolist()
    assert ask("POST", "/v1/models/fp32:predict", {"instances": rows}).json == {"predictions": rows}


def test_rows_of_named_values_are_predicted(ask: Client) -> None:
    rows = [{"a": 1, "b": "x"}, {"a": 2.5, "b": "y"}]
    answer = ask("POST", "/v1/models/two:predict", {"instances": rows})
    assert answer.json == {"predictions": [{"double": 2.0, "text": "x"}, {"double": 5.0, "text": "y"}]}
    answer = ask("POST", "/v1/models/two:predict", {"inputs": {"a": [1, 2], "b": ["x", "y"]}})
    assert answer.json == {"predictions": {"double": [2.0, 4.0], "text": ["x", "y"]}}


@pytest.mark.parametrize(
    ("model", "request_", "status", "words"),
    [
        ("nope", {"instances": [1]}, 404, "'nope' is not found"),
        ("fp32", {}, 400, "either 'instances' or 'inputs'"),
        ("fp32", {"instances": 1}, 400, "instances: expected an array"),
        ("fp32", {"instances": [[1, 2], [3]]}, 400, "expected 4 elements"),
        ("fp32", {"instances": [["x"]]}, 400, "expected numbers for FP32, got 'x'"),
        ("two", {"instances": [[1, 2]]}, 400, "inputs ['a', 'b'], got arrays"),
        ("two", {"instances": [{"a": 1, "b": "x"}, {"a": 1}]}, 400, "instances[1]"),
        ("two", {"inputs": {"a": [1]}}, 400, "the input 'b'"),
    ],
)
def test_a_wrong_prediction_request_says_what_is_wrong(
    ask: Client, model: str, request_: Any, status: int, words: str
) -> None:
    answer = ask("POST", f"/v1/models/{model}:predict", request_)
    assert answer.status == status
    assert words in answer.json["error"]


# Life


def test_an_instance_that_ends_answers_what_is_under_way(serve: Serve, tmp_path: Any) -> None:
    models = tmp_path / "models"
    write_model(models, "waiting", WAITING, settings="execution: thread\n")
    instance = serve(models, "--grace", "20s")
    file = tmp_path / "release"
    entry = {"name": "FILE", "datatype": "BYTES", "shape": [1], "data": [str(file)]}
    answers: list[Answer] = []

    def wait() -> None:
        client = Client(instance.rest)
        answers.append(client("POST", "/v2/models/waiting/infer", {"inputs": [entry]}))
        client.connection.close()

    caller = threading.Thread(target=wait)
    caller.start()
    started = file.with_name("release.started")
    while not started.exists():
        time.sleep(0.005)
    instance.signal()
    with pytest.raises(OSError):
        while True:
            other = Client(instance.rest)
            try:
                other("GET", "/v2/health/live")
            finally:
                other.connection.close()
    file.touch()
    caller.join(20)
    assert instance.wait() == 0
    assert answers[0].json["outputs"][0]["data"] == [True]
    assert answers[0].headers["connection"] == "close"


def test_a_port_that_is_taken_is_told(instance: Instance) -> None:
    call = command("serve", "--grpc-port", "0", "--rest-port", instance.rest.split(":")[1])
    ended = subprocess.run(call, capture_output=True, text=True, check=False, env=environment(), timeout=30)
    assert ended.returncode == 1
    assert "choose another --host or --rest-port (0 picks a free port)" in ended.stderr
