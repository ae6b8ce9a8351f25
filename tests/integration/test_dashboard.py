"""The dashboard of a running instance, in a real browser and as plain HTTP."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.browser import CHROMIUM, DRIVER, MISSING, resize, start_browser
from tests.serving import ADD_SUB, IDENTITY, Instance, Serve, write_model

pytestmark = pytest.mark.slow

needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=MISSING)

REGISTERED = 20_000
#: A name that would be markup, were it written as such.
MARKUP = "<img src=x onerror=\"document.title='owned'\">"
BROKEN = "class Model:\n    def predict(self\n"


def get(address: str, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(address, timeout=20)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    connection.close()
    return found


def api(instance: Instance, path: str) -> Any:
    status, _, body = get(instance.rest, f"/dashboard/api/{path}")
    assert status == 200, body
    return json.loads(body)


def infer(instance: Instance, model: str, shape: tuple[int, int] = (1, 3)) -> int:
    tensor = {"name": "INPUT0", "datatype": "FP32", "shape": shape, "data": [0.5] * (shape[0] * shape[1])}
    connection = http.client.HTTPConnection(instance.rest, timeout=20)
    connection.request("POST", f"/v2/models/{quote(model, safe='')}/infer", json.dumps({"inputs": [tensor]}))
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


@pytest.fixture(scope="module")
def instance(serve_for_session: Serve, tmp_path_factory: pytest.TempPathFactory) -> Instance:
    """With 20,000 registered models beside those of its folder, one of which cannot be loaded."""
    root = tmp_path_factory.mktemp("dashboard")
    models = root / "models"
    models.mkdir()
    write_model(models, "echo", IDENTITY.replace("DATATYPE", "FP32"))
    write_model(models, "adder", ADD_SUB)
    write_model(models, "broken", BROKEN)
    names = [MARKUP, *(f"tenant-{number:05d}" for number in range(REGISTERED - 1))]
    static = root / "static.json"
    static.write_text(
        json.dumps([{"modelId": name, "modelInfo": {"type": "sklearn", "path": f"/nowhere/{name}"}} for name in names])
    )
    return serve_for_session(models, "--static-models", static, "--capacity", "64MiB")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    driver = start_browser(tmp_path_factory.mktemp("browser") / "profile")
    yield driver
    driver.quit()


@pytest.fixture
def opened(instance: Instance, browser: Chrome) -> Callable[[str], Chrome]:
    """Opens a page of the dashboard afresh."""

    def open_page(page: str = "") -> Chrome:
        resize(browser, 1280, 900)
        browser.get("about:blank")
        browser.get_log("browser")  # what it tells is told once
        browser.get(f"http://{instance.rest}/dashboard{page}")
        return browser

    return open_page


def awaited(browser: Chrome, condition: Callable[[Chrome], Any]) -> Any:
    return WebDriverWait(browser, 20, poll_frequency=0.05).until(condition)


def rows(browser: Chrome) -> list[str]:
    """The names in the table, read in one step: rows are made anew while one looks."""
    found: list[str] = browser.execute_script(
        "return [...document.querySelectorAll('td.name a')].map((link) => link.textContent)"
    )
    return found


def text(browser: Chrome, selector: str) -> str:
    found: str = browser.execute_script(f"return document.querySelector({json.dumps(selector)})?.textContent ?? ''")
    return found


# As plain HTTP.


def test_models_are_paged_searched_filtered_and_sorted_by_the_instance(instance: Instance) -> None:
    assert infer(instance, "echo") == 200
    page = api(instance, "models?sort=name&limit=50&offset=100")
    assert page["total"] == page["matched"] == REGISTERED + 3
    assert page["offset"] == 100
    names = [model["name"] for model in page["models"]]
    assert names == sorted(names)
    assert len(names) == 50
    found = api(instance, "models?search=TENANT-0123&sort=-name")
    assert [model["name"] for model in found["models"]] == [f"tenant-0123{digit}" for digit in range(9, -1, -1)]
    assert found["matched"] == 10
    loaded = api(instance, "models?state=loaded&search=echo")
    assert [(model["name"], model["state"], model["copies"]) for model in loaded["models"]] == [("echo", "loaded", 1)]
    assert api(instance, "models?sort=-rate&limit=1")["models"][0]["here"]
    last = api(instance, f"models?offset={REGISTERED}&limit=50")
    assert len(last["models"]) == 3


def test_an_answer_about_twenty_thousand_models_is_small(instance: Instance) -> None:
    for path in ("models", "models?limit=50&search=tenant", "summary", "instances", "events"):
        _, _, body = get(instance.rest, f"/dashboard/api/{path}")
        assert len(body) < 64 * 1024, path


@pytest.mark.parametrize(
    ("query", "named"),
    [("limit=0", "limit"), ("limit=201", "limit"), ("limit=x", "limit"), ("offset=-1", "offset"),
     ("sort=color", "sort"), ("state=happy", "state"), ("offset=99999999", "offset")],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_with_its_name(instance: Instance, query: str, named: str) -> None:
    status, _, body = get(instance.rest, f"/dashboard/api/models?{query}")
    assert status == 400
    assert json.loads(body)["error"].startswith(named)


def test_unknown_paths_models_and_methods(instance: Instance) -> None:
    assert get(instance.rest, "/dashboard/api/nothing")[0] == 404
    assert get(instance.rest, "/dashboard/../etc/passwd")[0] == 404
    assert get(instance.rest, "/dashboard/api/models/nobody")[0] == 404
    status, headers, _ = get(instance.rest, "/dashboard", "POST")
    assert (status, headers["allow"]) == (405, "GET")


def test_what_has_not_changed_is_not_sent_again(instance: Instance) -> None:
    path = "/dashboard/api/models?search=tenant-0123"
    status, headers, body = get(instance.rest, path)
    assert status == 200
    assert body
    assert get(instance.rest, path, if_none_match=headers["etag"])[::2] == (304, b"")
    assert get(instance.rest, path, if_none_match='"other"')[0] == 200


def test_the_page_may_run_nothing_but_its_own_files(instance: Instance) -> None:
    status, headers, body = get(instance.rest, "/dashboard")
    assert status == 200
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert b"http://" not in body
    assert b"https://" not in body


def test_the_life_of_a_model_is_told(instance: Instance) -> None:
    assert infer(instance, "echo") == 200
    told = api(instance, "models/echo")
    assert [event["what"] for event in reversed(told["events"])][:4] == ["queued", "pulling", "loading", "loaded"]
    assert "bytes in" in told["events"][-4]["detail"]
    assert infer(instance, "broken") == 400
    told = api(instance, "models/broken")
    assert told["model"]["state"] == "failed"
    assert "SyntaxError" in told["model"]["reason"]
    assert any(event["what"] == "failed" and "SyntaxError" in event["detail"] for event in told["events"])
    assert any(one["model"] == "broken" for one in api(instance, "summary")["failures"])


def test_a_failed_load_of_a_registered_model_is_told(instance: Instance) -> None:
    infer(instance, "tenant-00042")
    model = api(instance, "models/tenant-00042")["model"]
    assert model["state"] == "failed"
    assert model["reason"]
    assert model["registered"] == {"type": "sklearn", "path": "/nowhere/tenant-00042"}
    assert "tenant-00042" in [one["name"] for one in api(instance, "models?state=failed")["models"]]


def test_it_can_be_left_out(serve: Serve, tmp_path: Path) -> None:
    instance = serve(None, "--no-dashboard")
    assert get(instance.rest, "/dashboard")[0] == 404
    assert get(instance.rest, "/dashboard/api/summary")[0] == 404
    assert get(instance.rest, "/v2/health/ready")[0] == 200
    empty = serve(None, MMCORE_DASHBOARD="false")
    assert get(empty.rest, "/dashboard")[0] == 404


# In a browser.


@needs_browser
def test_twenty_thousand_models_are_shown_a_page_at_a_time(opened: Callable[[str], Chrome]) -> None:
    browser = opened("")
    awaited(browser, lambda one: len(rows(one)) == 50)
    assert browser.execute_script("return document.querySelectorAll('*').length") < 1500
    assert f"of {REGISTERED + 3:,}" in text(browser, "#where")
    first = rows(browser)
    browser.find_element(By.XPATH, "//button[text()='Next']").click()
    awaited(browser, lambda one: text(one, "#where").startswith("51–100"))
    assert not set(first) & set(rows(browser))
    search = browser.find_element(By.ID, "search")
    search.send_keys("tenant-0123")
    awaited(browser, lambda one: len(rows(one)) == 10)
    assert text(browser, "#where") == "1–10 of 10"
    search.send_keys("nobody")
    awaited(browser, lambda one: "No model matches" in text(one, "main"))
    problems = [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    assert problems == []


@needs_browser
def test_a_name_is_text_and_never_markup(opened: Callable[[str], Chrome]) -> None:
    browser = opened("")
    awaited(browser, rows)
    browser.find_element(By.ID, "search").send_keys("onerror")
    awaited(browser, lambda one: rows(one) == [MARKUP])
    browser.find_element(By.LINK_TEXT, MARKUP).click()
    awaited(browser, lambda one: MARKUP in text(one, "h1"))
    assert browser.find_elements(By.CSS_SELECTOR, "main img") == []
    assert "owned" not in browser.title


@needs_browser
def test_columns_sort_and_states_filter(instance: Instance, opened: Callable[[str], Chrome]) -> None:
    infer(instance, "broken")
    browser = opened("")
    awaited(browser, rows)
    browser.find_element(By.XPATH, "//th/button[text()='Model']").click()
    awaited(browser, lambda one: rows(one)[:1] == [MARKUP])
    browser.find_element(By.XPATH, "//th/button[text()='Model']").click()
    awaited(browser, lambda one: rows(one)[:1] == [f"tenant-{REGISTERED - 2:05d}"])
    assert browser.find_element(By.CSS_SELECTOR, "th[aria-sort]").get_attribute("aria-sort") == "descending"
    browser.find_element(By.XPATH, "//button[starts-with(., 'Failed')][contains(@class, 'chip')]").click()
    awaited(browser, lambda one: "broken" in rows(one))
    browser.find_element(By.ID, "search").send_keys("broken")
    awaited(browser, lambda one: rows(one) == ["broken"])
    assert "SyntaxError" in text(browser, "td .reason")


@needs_browser
def test_a_request_is_sent_from_a_form_made_of_the_models_metadata(opened: Callable[[str], Chrome]) -> None:
    browser = opened("#/models/adder")
    awaited(browser, lambda one: one.find_elements(By.ID, "describe")).pop().click()
    awaited(browser, lambda one: one.find_elements(By.ID, "input-1"))
    first, second = (browser.find_element(By.ID, f"input-{at}") for at in (0, 1))
    for field, values in ((first, range(16)), (second, [1] * 16)):
        field.clear()
        field.send_keys(", ".join(map(str, values)))
    written = json.loads(browser.find_element(By.ID, "body").get_property("value"))
    assert written["inputs"][0]["data"] == list(range(16))
    browser.find_element(By.ID, "send").click()
    awaited(browser, lambda one: "Answered in" in text(one, ".outcome"))
    answer = json.loads(text(browser, "pre"))
    assert answer["outputs"][0]["data"] == list(range(1, 17))
    awaited(browser, lambda one: "loaded" in text(one, "ol.life"))
    body = browser.find_element(By.ID, "body")
    body.clear()
    body.send_keys('{"inputs": []}')
    browser.find_element(By.ID, "send").click()
    awaited(browser, lambda one: "Status 400" in text(one, ".outcome"))
    assert "expected" in text(browser, "pre")


@needs_browser
def test_an_unknown_model_is_told_of_as_such(opened: Callable[[str], Chrome]) -> None:
    browser = opened("#/models/nobody")
    awaited(browser, lambda one: "There is no such model" in text(one, "main"))


@needs_browser
def test_instances_and_activity(instance: Instance, opened: Callable[[str], Chrome]) -> None:
    infer(instance, "echo")
    browser = opened("#/instances")
    awaited(browser, lambda one: instance.ready["instance"] in text(one, "tbody"))
    assert "64.0 MiB" in text(browser, "tbody")
    browser.find_element(By.LINK_TEXT, "Activity").click()
    awaited(browser, lambda one: "echo" in text(one, "main"))
    assert browser.find_element(By.CSS_SELECTOR, "nav a[aria-current]").text == "Activity"


@needs_browser
def test_it_is_live_and_can_be_paused(instance: Instance, opened: Callable[[str], Chrome]) -> None:
    browser = opened("#/models/tenant-00777")
    awaited(browser, lambda one: "not loaded" in text(one, "h1"))
    infer(instance, "tenant-00777")
    awaited(browser, lambda one: "failed" in text(one, "h1"))
    browser.find_element(By.ID, "live").click()
    assert text(browser, "#live-text") == "Paused"
    assert browser.find_element(By.ID, "live").get_attribute("aria-pressed") == "false"


@needs_browser
def test_an_instance_that_is_gone_is_told_of(serve: Serve, browser: Chrome) -> None:
    own = serve(None, "--grace", "1s")
    resize(browser, 1280, 900)
    browser.get(f"http://{own.rest}/dashboard")
    awaited(browser, lambda one: "No models yet" in text(one, "main"))
    own.signal()
    assert own.wait() == 0
    awaited(browser, lambda one: "does not answer" in text(one, "#alert"))


@needs_browser
def test_where_tokens_are_needed_it_asks_for_one_and_tells_nothing_before(
    serve: Serve, browser: Chrome, tmp_path: Path
) -> None:
    tokens, models = tmp_path / "tokens.yaml", tmp_path / "models"
    tokens.write_text(
        "- {name: boss, token: the-boss, scopes: [infer, manage]}\n- {name: a, token: a, scopes: [infer]}\n"
    )
    models.mkdir()
    write_model(models, "guarded", IDENTITY.replace("DATATYPE", "FP32"))
    own = serve(models, "--auth-tokens", tokens)
    assert get(own.rest, "/dashboard/api/summary")[0] == 401
    assert get(own.rest, "/dashboard/api/models", authorization="Bearer a")[0] == 403
    assert get(own.rest, "/dashboard/api/models", authorization="Bearer the-boss")[0] == 200
    browser.get(f"http://{own.rest}/dashboard")
    for token, refusal in (("nobody", "not known here"), ("a", "lacks the scope 'manage'"), ("the-boss", "")):
        field = awaited(browser, lambda one: one.find_elements(By.ID, "token"))[0]
        assert rows(browser) == []
        field.send_keys(token, Keys.ENTER)
        if refusal:
            awaited(browser, lambda one, words=refusal: words in text(one, "main"))
    awaited(browser, lambda one: rows(one) == ["guarded"])
    browser.get(f"http://{own.rest}/dashboard#/models/guarded")
    awaited(browser, lambda one: one.find_elements(By.ID, "describe"))[0].click()
    awaited(browser, lambda one: one.find_elements(By.ID, "input-0"))
    browser.find_element(By.ID, "send").click()
    awaited(browser, lambda one: "Answered in" in text(one, "main"))


@needs_browser
def test_the_page_to_try_rest_sends_a_request_and_the_token(serve: Serve, browser: Chrome, tmp_path: Path) -> None:
    tokens, models = tmp_path / "tokens.yaml", tmp_path / "models"
    tokens.write_text("- {name: a, token: let-me, scopes: [infer]}\n")
    models.mkdir()
    write_model(models, "guarded", IDENTITY.replace("DATATYPE", "FP32"))
    browser.get(f"http://{serve(models, '--auth-tokens', tokens).rest}/docs")
    awaited(browser, lambda one: "carries no bearer token" in text(one, "#answer"))
    assert "/v2/models/{model}/infer" in text(browser, "#paths")
    browser.find_element(By.ID, "token").send_keys("let-me", Keys.TAB)
    awaited(browser, lambda one: not one.find_element(By.ID, "answer").is_displayed())
    browser.find_element(By.ID, "model").send_keys("guarded")
    browser.find_element(By.ID, "describe").click()
    awaited(browser, lambda one: one.find_element(By.ID, "body").get_property("value"))
    browser.find_element(By.ID, "body").submit()
    awaited(browser, lambda one: '"model_name": "guarded"' in text(one, "#answer"))


@needs_browser
def test_themes_follow_the_system_and_the_switch(opened: Callable[[str], Chrome]) -> None:
    browser = opened("")
    awaited(browser, rows)
    brightness = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
    assert browser.execute_script(brightness) > 200
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": dark})
    awaited(browser, lambda one: one.execute_script(brightness) < 60)
    switch = browser.find_element(By.ID, "theme")
    switch.click()
    assert switch.text == "Theme: light"
    assert browser.execute_script(brightness) > 200
    browser.refresh()
    awaited(browser, lambda one: text(one, "#theme") == "Theme: light")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{**dark[0], "value": "light"}]})


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(opened: Callable[[str], Chrome], instance: Instance, scheme: str) -> None:
    infer(instance, "broken")
    browser = opened("#/activity")
    awaited(browser, lambda one: "failed" in text(one, "ol.life"))
    browser.execute_script(f"document.documentElement.dataset.theme = '{scheme}'")
    # WCAG 2.1 AA: 4.5 to 1 between a text and what is behind it.
    poor = browser.execute_script(
        """
        const channels = (color) => (color.match(/[\\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
        const shade = (color) => channels(color).slice(0, 3).map((one) => one / 255)
          .map((one) => one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4)
          .reduce((sum, one, at) => sum + one * [0.2126, 0.7152, 0.0722][at], 0);
        const behind = (one) => {
          while (one && channels(getComputedStyle(one).backgroundColor)[3] === 0) one = one.parentElement;
          return getComputedStyle(one ?? document.documentElement).backgroundColor;
        };
        return [...document.querySelectorAll("body *")].filter((one) => one.checkVisibility()
          && [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())).map((one) => {
            const [a, b] = [shade(getComputedStyle(one).color), shade(behind(one))];
            return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), one.outerHTML.slice(0, 100)];
          }).filter(([ratio]) => ratio < 4.5);
        """
    )
    assert poor == []


@needs_browser
def test_the_keyboard_is_enough(opened: Callable[[str], Chrome]) -> None:
    browser = opened("")
    awaited(browser, rows)
    ActionChains(browser).send_keys("/").perform()
    assert browser.switch_to.active_element.get_attribute("id") == "search"
    browser.switch_to.active_element.send_keys("tenant-00005")
    awaited(browser, lambda one: rows(one) == ["tenant-00005"])
    for _ in range(40):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        if browser.switch_to.active_element.text == "tenant-00005":
            break
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    awaited(browser, lambda one: "tenant-00005" in text(one, "h1"))
    nameless = browser.execute_script(
        "return [...document.querySelectorAll('button, input, textarea, a')].filter((one) => one.checkVisibility() &&"
        " !(one.textContent.trim() || one.ariaLabel || one.labels?.length)).map((one) => one.outerHTML)"
    )
    assert nameless == []


@needs_browser
def test_a_phone_shows_it_without_scrolling_sideways(instance: Instance, opened: Callable[[str], Chrome]) -> None:
    infer(instance, "echo")
    browser = opened("")
    resize(browser, 390, 844)
    for page, place, words in (
        ("#/models", "#where", f"of {REGISTERED + 3:,}"),
        ("#/models/echo", "h1", "loaded"),
        ("#/instances", "tbody", instance.ready["instance"]),
        ("#/activity", "main", "echo"),
    ):
        browser.execute_script(f"location.hash = '{page}'")
        awaited(browser, lambda one, place=place, words=words: words in text(one, place))
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390, page
        inner = "return [...document.querySelectorAll('.scroll')].map((box) => box.scrollWidth - box.clientWidth)"
        assert max(browser.execute_script(inner), default=0) <= 0, page
