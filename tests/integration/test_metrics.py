"""The metrics port of a running instance, and that the dashboard and the rules ask for what it tells."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from mmcore.pb.inference_pb2 import ModelInferRequest
from mmcore.pb.model_mesh_pb2 import ModelInfo, RegisterModelRequest
from tests.etcds import Etcd
from tests.serving import ADD_SUB, IDENTITY, Instance, Serve, write_model

pytestmark = pytest.mark.slow

MONITORING = Path(__file__).parents[2] / "deploy/monitoring"
DASHBOARD = json.loads((MONITORING / "grafana.json").read_text())
RULES = [rule for group in yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"] for rule in group["rules"]]

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def get(address: str, path: str, method: str = "GET", body: Any = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address, timeout=20)
    connection.request(method, path, json.dumps(body) if body is not None else None)
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


def scrape(instance: Instance) -> Samples:
    status, text = get(instance.metrics, "/metrics")
    assert status == 200
    families = list(text_string_to_metric_families(text.decode()))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    assert all(family.documentation for family in families)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def until(holds: Callable[[], bool]) -> None:
    ends_at = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < ends_at
        time.sleep(0.02)


@pytest.fixture(scope="module")
def instance(serve_for_session: Serve, tmp_path_factory: pytest.TempPathFactory) -> Instance:
    models = tmp_path_factory.mktemp("models")
    write_model(models, "simple", ADD_SUB)
    write_model(models, "fp32", IDENTITY.replace("DATATYPE", "FP32"))
    write_model(models, "broken", "class Model:\n    def predict(self\n")
    return serve_for_session(models, "--metrics-per-model", "1")


def infer(instance: Instance, model: str, shape: list[int]) -> int:
    entry = {"name": "INPUT0", "datatype": "FP32", "shape": shape, "data": [0.5] * (shape[0] * shape[1])}
    return get(instance.rest, f"/v2/models/{model}/infer", "POST", {"inputs": [entry]})[0]


def change(instance: Instance, model: str, what: str) -> int:
    return get(instance.rest, f"/v2/repository/models/{model}/{what}", "POST", {})[0]


def test_a_scrape_tells_what_has_happened(instance: Instance) -> None:
    for model in ("fp32", "simple", "broken"):
        change(instance, model, "unload")
    before = scrape(instance)
    assert [change(instance, model, "load") for model in ("fp32", "simple", "broken")] == [200, 200, 400]
    assert [infer(instance, "fp32", [3, 2]) for _ in range(4)] == [200] * 4
    assert infer(instance, "fp32", [3, 0]) == 200
    assert infer(instance, "simple", [1, 1]) == 400
    assert infer(instance, "broken", [1, 1]) == 400
    after = scrape(instance)

    def added(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return after[key] - before.get(key, 0)

    assert added("mmcore_inference_requests_total", outcome="success") == 5
    assert added("mmcore_inference_requests_total", outcome="failure") == 1
    assert added("mmcore_inference_duration_seconds_count") == 5
    assert 0 < added("mmcore_inference_compute_seconds_sum") < added("mmcore_inference_duration_seconds_sum")
    assert added("mmcore_inference_batch_size_sum") == added("mmcore_inference_rows_total") == 15
    assert added("mmcore_model_load_seconds_count") == 2
    assert added("mmcore_model_load_failures_total") == 1
    assert added("modelmesh_loadmodel_milliseconds_sum") == pytest.approx(
        1e3 * added("mmcore_model_load_seconds_sum"), rel=1e-6
    )
    states = {dict(labels)["state"]: value for (name, labels), value in after.items() if name == "mmcore_models"}
    assert states == {"registered": 3, "resident": 2, "loading": 0, "failed": 1}
    assert after["mmcore_used_bytes", ()] > 0
    assert after["process_resident_memory_bytes", ()] > 10e6


def test_requests_are_told_by_protocol_method_and_code_with_their_sizes(instance: Instance) -> None:
    before = scrape(instance)
    body = ModelInferRequest(model_name="fp32", raw_input_contents=[np.zeros(1000, np.float32).tobytes()])
    body.inputs.add(name="INPUT0", datatype="FP32", shape=[1, 1000])
    with grpc.insecure_channel(instance.grpc) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        answer = call(body.SerializeToString(), timeout=20)
        with pytest.raises(grpc.RpcError):
            call(ModelInferRequest(model_name="unknown").SerializeToString(), timeout=20)
    assert infer(instance, "fp32", [1, 1]) == 200
    assert infer(instance, "unknown", [1, 1]) == 404
    after = scrape(instance)

    def added(name: str, protocol: str, code: str) -> float:
        labels = {"protocol": protocol, "method": "ModelInfer", "code": code}
        key = (name, tuple(sorted(labels.items())))
        return after[key] - before.get(key, 0)

    for protocol in ("grpc", "http"):
        for code in ("OK", "NOT_FOUND"):
            assert added("mmcore_request_duration_seconds_count", protocol, code) == 1
            assert 0 < added("mmcore_request_duration_seconds_sum", protocol, code) < 20
    assert added("mmcore_request_size_bytes_sum", "grpc", "OK") == body.ByteSize()
    assert added("mmcore_response_size_bytes_sum", "grpc", "OK") == len(answer)
    assert 0 < added("mmcore_response_size_bytes_sum", "http", "OK") < 400
    both = (("code", "OK"), ("method", "ModelInfer"))
    name = "modelmesh_api_request_milliseconds_count"
    assert after[name, both] - before.get((name, both), 0) == 2


def test_connections_that_break_the_protocol_are_counted(instance: Instance) -> None:
    before = scrape(instance)
    for address, text in ((instance.grpc, b"GET / HTTP/1.1\r\n\r\n" * 9), (instance.rest, b"\x01\x02\r\n\r\n")):
        host, port = address.rsplit(":", 1)
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(text)
            while connection.recv(4096):
                pass
    after = scrape(instance)
    for protocol in ("grpc", "http"):
        errors = ("mmcore_connection_errors_total", (("protocol", protocol), ("reason", "protocol")))
        accepted = ("mmcore_accepted_connections_total", (("protocol", protocol),))
        assert after[errors] - before[errors] == 1
        assert after[accepted] - before[accepted] >= 1
    assert after["mmcore_received_bytes_total", ()] > before["mmcore_received_bytes_total", ()]


def test_worker_processes_are_told_of_together(serve: Serve, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    write_model(models, "alone", IDENTITY.replace("DATATYPE", "FP32"))
    instance = serve(models, "--isolate", "all", "--preload", "all")
    told = {name: value for (name, _), value in scrape(instance).items()}
    assert told["mmcore_worker_processes"] == told["mmcore_worker_starts_total"] == 1
    assert told["mmcore_worker_resident_bytes"] > 5e6
    before = told["mmcore_worker_cpu_seconds_total"]
    assert before > 0
    assert change(instance, "alone", "unload") == 200
    until(lambda: scrape(instance)["mmcore_worker_processes", ()] == 0)
    after = scrape(instance)
    assert after["mmcore_worker_cpu_seconds_total", ()] >= before
    assert after["mmcore_model_unload_seconds_count", ()] == 1


def test_what_is_passed_on_is_told(serve: Serve, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    write_model(files, "fp32", IDENTITY.replace("DATATYPE", "FP32"))
    key = json.dumps({"storage_params": {"type": "local"}})
    flags = ("--registry", f"sqlite:{tmp_path / 'registry.db'}", "--peer-port", "0")
    one, other = (serve(None, *flags) for _ in range(2))
    with grpc.insecure_channel(one.grpc) as channel:
        register = channel.unary_unary("/mmesh.ModelMesh/registerModel")
        info = ModelInfo(type="python", path=str(files / "fp32"), key=key)
        register(RegisterModelRequest(modelId="fp32", modelInfo=info).SerializeToString(), timeout=20)
    until(lambda: all(scrape(each)["mmcore_peers", (("state", "usable"),)] == 1 for each in (one, other)))
    assert [infer(each, "fp32", [1, 1]) for each in (one, other, one, other)] == [200] * 4  # over REST
    told = scrape(one), scrape(other)
    forwards = sorted(each["mmcore_forwards_total", ()] for each in told)
    [holder] = [each for each in told if each["mmcore_models", (("state", "resident"),)]]
    labels = (("code", "OK"), ("method", "ModelInfer"), ("protocol", "peer"))
    assert forwards[0] == 0
    assert forwards[1] == holder["mmcore_request_duration_seconds_count", labels] == 2
    for each in told:
        assert each["mmcore_forward_retries_total", ()] == each["mmcore_forwards_unanswered_total", ()] == 0
        assert 0 <= each["mmcore_registry_lag_seconds", ()] < 2


def test_the_lag_of_a_registry_that_is_away_grows_and_ends(serve: Serve, tmp_path: Path) -> None:
    etcd = Etcd(tmp_path / "etcd").start()
    try:
        instance = serve(None, "--registry", f"etcd://{etcd.endpoint}/test", "--peer-port", "0")

        def told() -> tuple[float, float]:
            found = scrape(instance)
            return found["mmcore_registry_connected", ()], found["mmcore_registry_lag_seconds", ()]

        until(lambda: told()[0] == 1 and told()[1] < 2)
        etcd.kill()
        until(lambda: told()[0] == 0)
        _, before = told()
        began = time.monotonic()
        until(lambda: told()[1] > before + 1)
        # It grows as time does, no quicker.
        assert time.monotonic() - began > 0.9
        etcd.start()
        until(lambda: told()[0] == 1 and told()[1] < 2)
    finally:
        etcd.stop()


def test_a_registry_in_memory_does_not_lag(instance: Instance) -> None:
    found = scrape(instance)
    assert (found["mmcore_registry_connected", ()], found["mmcore_registry_lag_seconds", ()]) == (1, 0)


def test_a_scrape_costs_the_same_with_many_models(serve: Serve, tmp_path: Path) -> None:
    """By its length: what is written for each model would show, and costs what it is long."""
    models = tmp_path / "models"
    models.mkdir()
    one = serve(models, "--registry", f"sqlite:{tmp_path / 'one.db'}")
    static = tmp_path / "static.json"
    static.write_text(json.dumps([{"modelId": f"m-{n}", "modelInfo": {"type": "x"}} for n in range(3000)]))
    many = serve(models, "--registry", f"sqlite:{tmp_path / 'many.db'}", "--static-models", static)
    assert scrape(many)["mmcore_models", (("state", "registered"),)] == 3000
    assert len(scrape(many)) == len(scrape(one))


def test_only_so_many_models_as_asked_for_have_labels(instance: Instance) -> None:
    assert infer(instance, "fp32", [1, 1]) == 200
    labelled = {dict(labels).get("model") for _, labels in scrape(instance)} - {None}
    assert labelled == {"fp32"}


def test_probes_and_the_state_are_told(instance: Instance) -> None:
    assert infer(instance, "fp32", [1, 1]) == 200
    infer(instance, "broken", [1, 1])
    assert get(instance.metrics, "/live") == (200, b'{"live":true}')
    assert get(instance.metrics, "/ready") == (200, b'{"ready": true}')
    state = json.loads(get(instance.metrics, "/debug/state")[1])
    assert (state["instance"], state["ready"]) == (instance.ready["instance"], True)
    assert state["loaded"][0]["model"] == "fp32"
    assert [one["model"] for one in state["failures"]] == ["broken"]
    assert get(instance.metrics, "/")[0] == 404
    assert get(instance.metrics, "/metrics", "POST")[0] == 405


def queries() -> list[str]:
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return [*panels, *(rule["expr"] for rule in RULES)]


def asked_for(query: str) -> set[str]:
    """The metrics of a query that parses; Grafana's interval stands for a range of time."""
    text = query.replace("$__rate_interval", "5m")
    promql_parser.parse(text)
    return set(re.findall(r"\b(?:mmcore|modelmesh|process)[_:][\w:]*", text))


def test_the_dashboard_and_the_rules_ask_for_what_is_told(instance: Instance) -> None:
    assert infer(instance, "fp32", [1, 1]) == 200
    told = {name for name, _ in scrape(instance)} | {rule["record"] for rule in RULES if "record" in rule}
    for query in queries():
        assert asked_for(query)
        assert asked_for(query) <= told, query


def test_the_dashboard_is_whole() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(places) == len(set(places))
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(DASHBOARD))) - {"__rate_interval"}
    assert used <= variables


def test_every_alert_says_what_to_do() -> None:
    for rule in RULES:
        if "alert" in rule:
            assert rule["labels"]["severity"] in {"warning", "critical"}
            assert rule["annotations"]["summary"] and rule["annotations"]["description"]
