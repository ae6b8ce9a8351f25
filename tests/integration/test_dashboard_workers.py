"""The dashboard with several workers, which share a port: whichever answers, it tells of all."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.support.ui import WebDriverWait

from tests.browser import CHROMIUM, DRIVER, MISSING, start_browser
from tests.serving import IDENTITY, Instance, Serve, write_model

pytestmark = pytest.mark.slow

WITHIN_S = 40.0


def get(address: str, path: str, timeout_s: float = 20.0) -> Any:
    """Over a connection of its own, which may lead to either worker."""
    connection = http.client.HTTPConnection(address, timeout=timeout_s)
    try:
        connection.request("GET", f"/dashboard/api/{path}")
        answer = connection.getresponse()
        assert answer.status == 200
        return json.loads(answer.read())
    finally:
        connection.close()


def infer(instance: Instance, model: str) -> None:
    connection = http.client.HTTPConnection(instance.rest, timeout=20)
    tensor = {"name": "INPUT0", "datatype": "FP32", "shape": [1, 1], "data": [1]}
    connection.request("POST", f"/v2/models/{model}/infer", json.dumps({"inputs": [tensor]}))
    assert connection.getresponse().status == 200
    connection.close()


def until(holds: Callable[[], Any]) -> Any:
    ends_at = time.monotonic() + WITHIN_S
    while not (found := holds()):
        assert time.monotonic() < ends_at
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def instance(serve_for_session: Serve, tmp_path_factory: pytest.TempPathFactory) -> Instance:
    """Two workers that have both answered for ``echo``."""
    root = tmp_path_factory.mktemp("workers")
    models = root / "models"
    models.mkdir()
    for name in ("echo", "idle"):
        write_model(models, name, IDENTITY.replace("DATATYPE", "FP32"))
    files = write_model(root, "files", IDENTITY.replace("DATATYPE", "FP32"))
    static = root / "static.json"
    info = {"type": "python", "path": str(files), "key": json.dumps({"storage_params": {"type": "local"}})}
    static.write_text(json.dumps([{"modelId": "registered", "modelInfo": info}]))
    started = serve_for_session(
        models, "--workers", "2", "--capacity", "64MiB", "--static-models", static, "--metrics-port", "0"
    )
    until(lambda: len(get(started.rest, "summary")["workers"]) == 2)

    def both() -> bool:
        infer(started, "echo")
        return bool(get(started.rest, "models?search=echo")["models"][0]["copies"] == 2)

    until(both)
    infer(started, "registered")
    return started


def several(instance: Instance, path: str) -> list[Any]:
    """The same from many connections, some of which lead to each worker."""
    return [get(instance.rest, path) for _ in range(12)]


def test_either_worker_tells_of_both(instance: Instance) -> None:
    told = several(instance, "summary")
    # Both have been asked.
    assert {one["instance"] for one in told} == set(instance.ready["workers"])
    for one in told:
        assert one["workers"] == sorted(instance.ready["workers"])
        assert one["capacity_bytes"] == 64 * 2**20
        assert (one["models"], one["loaded"], one["missing"]) == (3, 2, [])


def test_figures_are_those_of_all_requests(instance: Instance) -> None:
    before = get(instance.rest, "models?search=echo")["models"][0]["requests"]
    for _ in range(20):
        infer(instance, "echo")
    for page in several(instance, "models?sort=-rate"):
        assert [model["name"] for model in page["models"]][-1] == "idle"
        rows = {model["name"]: model for model in page["models"]}
        assert rows["echo"]["requests"] == before + 20
        assert (rows["echo"]["copies"], rows["registered"]["copies"], rows["idle"]["copies"]) == (2, 1, 0)
        assert rows["echo"]["p99_ms"] > 0
        assert page["states"] == {**dict.fromkeys(page["states"], 0), "loaded": 2, "not loaded": 1}
    for page in several(instance, "models?state=loaded&sort=name"):
        assert [model["name"] for model in page["models"]] == ["echo", "registered"]
        assert page["matched"] == 2


def test_the_life_of_a_model_is_that_in_both(instance: Instance) -> None:
    for told in several(instance, "models/echo"):
        loaded = [event["instance"] for event in told["events"] if event["what"] == "loaded"]
        assert sorted(loaded) == sorted(instance.ready["workers"])
        versions = {version["instance"]: version["state"] for version in told["model"]["versions"]}
        assert versions == dict.fromkeys(instance.ready["workers"], "loaded")
    for told in several(instance, "events"):
        assert sum(event["what"] == "registered" for event in told["events"]) == 1


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chrome]:
    driver = start_browser(tmp_path / "profile")
    yield driver
    driver.quit()


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=MISSING)
def test_the_page_says_that_it_shows_several(instance: Instance, browser: Chrome) -> None:
    browser.get(f"http://{instance.rest}/dashboard")
    shown = "return document.querySelector('#identity').textContent + document.querySelector('table').textContent"
    WebDriverWait(browser, 20, poll_frequency=0.05).until(
        lambda one: "2 workers" in (text := one.execute_script(shown)) and "echo" in text
    )
    assert browser.title == "2 workers · mmcore"
    browser.get(f"http://{instance.rest}/dashboard#/models/echo")
    where = "return document.querySelector('#main').textContent"
    WebDriverWait(browser, 20, poll_frequency=0.05).until(
        lambda one: sum(f"{worker}, version" in one.execute_script(where) for worker in instance.ready["workers"]) == 1
    )


def test_a_worker_that_hangs_is_left_out(instance: Instance) -> None:
    hung, *_ = psutil.Process(instance.process.pid).children()

    def answered(path: str) -> Any:
        # The kernel still leads connections to the one that hangs.
        try:
            return get(instance.rest, path, timeout_s=4)
        except TimeoutError:
            return None

    hung.suspend()
    try:
        told = until(lambda: answered("summary"))
        # It is named, until its lease has run out and it is not one of them any more.
        assert len(told["workers"]) == 1
        assert {*told["workers"], *told["missing"]} <= set(instance.ready["workers"])
        [row] = until(lambda: answered("models?search=echo"))["models"]
        assert (row["state"], row["copies"]) == ("loaded", 1)
    finally:
        hung.resume()
    until(lambda: len((answered("summary") or {"workers": []})["workers"]) == 2)
