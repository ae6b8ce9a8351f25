"""Take the pictures of the dashboard that README.md shows: ``python -m deploy.dashboard.pictures``.

An instance with a few models under traffic and 20,000 registered ones is started, and looked at with Chromium.
"""

from __future__ import annotations

import http.client
import json
import random
import tempfile
import threading
from pathlib import Path

from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait

from tests.browser import resize, start_browser
from tests.serving import Instances, write_model

HERE = Path(__file__).parent
#: How long the models are called before they are looked at.
TRAFFIC_S = 45.0

MODEL = """
import time

class Model:
    inputs = [("features", "FP32", [-1, 4])]
    outputs = [("score", "FP32", [-1, 1])]

    def predict(self, inputs):
        time.sleep(SECONDS)
        return {"score": inputs["features"].sum(axis=1, keepdims=True)}
"""
#: Seconds of an inference, and calls per second, by model.
CALLED = {
    "fraud-score": (0.001, 60),
    "churn-weekly": (0.004, 25),
    "ranker-home-v3": (0.008, 20),
    "eta-courier": (0.002, 12),
    "price-elasticity-de": (0.015, 4),
}
TENSOR = {"name": "features", "datatype": "FP32", "shape": [1, 4], "data": [5.1, 3.5, 1.4, 0.2]}
SEARCHED = "tenant-07"


def _call(address: str, model: str, per_s: float, ended: threading.Event) -> None:
    chance = random.Random(model)
    connection = http.client.HTTPConnection(address)
    while not ended.wait(chance.expovariate(per_s)):
        try:
            connection.request("POST", f"/v2/models/{model}/infer", json.dumps({"inputs": [TENSOR]}))
            connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            return


def _show(browser: WebDriver, address: str, page: str, awaited: str) -> None:
    browser.get("about:blank")
    browser.get(f"http://{address}/dashboard{page}")
    WebDriverWait(browser, 20).until(lambda one: one.find_elements(By.CSS_SELECTOR, awaited))


def _take(browser: WebDriver, name: str) -> None:
    (HERE / f"{name}.png").write_bytes(browser.get_screenshot_as_png())
    print(HERE / f"{name}.png")


def main() -> None:
    """Take them."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        models = root / "models"
        models.mkdir()
        for name, (seconds, _) in CALLED.items():
            write_model(models, name, MODEL.replace("SECONDS", str(seconds)), settings="execution: thread\n")
        write_model(models, "demand-forecast", "import prophet_internal\n")
        static = root / "static.json"
        static.write_text(
            json.dumps(
                [
                    {
                        "modelId": f"tenant-{number // 200:02d}-recommender-{number % 200:03d}",
                        "modelInfo": {"type": "sklearn", "path": f"models/{number}", "key": '{"storage_key": "main"}'},
                    }
                    for number in range(20_000)
                ]
            )
        )
        instances = Instances(root)
        ended = threading.Event()
        try:
            address = instances(models, "--static-models", static, "--capacity", "2GiB").rest
            connection = http.client.HTTPConnection(address)
            for failing in ("demand-forecast", f"{SEARCHED}-recommender-012"):
                connection.request("POST", f"/v2/models/{failing}/infer", json.dumps({"inputs": [TENSOR]}))
                connection.getresponse().read()
            for name, (_, per_s) in CALLED.items():
                threading.Thread(target=_call, args=(address, name, per_s, ended), daemon=True).start()
            connection.request("GET", "/dashboard/api/summary")
            connection.getresponse().read()
            ended.wait(TRAFFIC_S)
            _take_all(root, address)
        finally:
            ended.set()
            instances.end()


def _take_all(root: Path, address: str) -> None:
    for dark in (False, True):
        scheme = "dark" if dark else "light"
        browser = start_browser(root / f"profile-{scheme}", height=720, dark=dark)
        try:
            _show(browser, address, "#/models", "tbody tr")
            WebDriverWait(browser, 20).until(lambda one: "ranker" in one.find_element(By.TAG_NAME, "tbody").text)
            _take(browser, f"models-{scheme}")
            if dark:
                continue
            browser.find_element(By.ID, "search").send_keys(SEARCHED)
            WebDriverWait(browser, 20).until(lambda one: "of 200" in one.find_element(By.ID, "where").text)
            _take(browser, "search-20000")
            resize(browser, 1280, 1000)
            _show(browser, address, "#/models/fraud-score", "ol.life time")
            browser.find_element(By.ID, "describe").click()
            WebDriverWait(browser, 20).until(lambda one: one.find_elements(By.ID, "input-0"))
            browser.find_element(By.ID, "send").click()
            WebDriverWait(browser, 20).until(
                lambda one: "Answered" in one.find_element(By.CSS_SELECTOR, ".outcome").text
            )
            # Two looks make a line.
            WebDriverWait(browser, 20).until(lambda one: one.find_elements(By.CSS_SELECTOR, "main svg.spark"))
            _take(browser, "model")
        finally:
            browser.quit()
    browser = start_browser(root / "profile-phone", width=390, height=844, dark=True)
    try:
        _show(browser, address, "#/models", "tbody tr")
        WebDriverWait(browser, 20).until(lambda one: "ranker" in one.find_element(By.TAG_NAME, "tbody").text)
        _take(browser, "phone")
    finally:
        browser.quit()


if __name__ == "__main__":
    main()
