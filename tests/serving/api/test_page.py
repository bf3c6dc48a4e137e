"""The page: what it may do, by its text; and what it does, in a real browser."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from gossamer.serving.api.app import create_app
from gossamer.serving.sequence import Sequence
from tests.serving.api.conftest import KEYS, engine

PAGE = files("gossamer.serving.api").joinpath("page.html").read_text(encoding="utf-8")


def test_it_asks_nobody_but_its_own_server() -> None:
    assert not re.search(r"(https?:)?//[a-z]", PAGE.replace("</", ""), re.IGNORECASE)
    assert not re.search(r"""\s(on\w+|style)\s*=\s*["']""", PAGE)
    assert not re.search(r"\binnerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", PAGE)
    assert not re.search(r"<(link|script|img|iframe)[^>]+(src|href)=(?!\"data:)", PAGE)


def test_its_own_script_and_style_are_all_that_runs(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.text == PAGE
    policy = answer.headers["content-security-policy"]
    for name in ("script", "style"):
        (part,) = re.findall(rf"<{name}>(.*?)</{name}>", PAGE, re.DOTALL)
        assert f"{name}-src 'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_every_field_has_a_name() -> None:
    named = {*re.findall(r'<label[^>]* for="([\w-]+)"', PAGE)}
    fields = {*re.findall(r'<(?:input|select|textarea)[^>]* id="([\w-]+)"', PAGE)}
    assert fields
    assert fields <= named


# In Chromium ---------------------------------------------------------------------------------------------------

FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
FLAGS += "--disable-component-update --disable-sync"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    place = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    assert place, "no Chromium: install one, or say where it is in CHROMIUM"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=place, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any, folder: Path, listening: Callable[[Any], str]) -> Iterator[Any]:
    made = engine(folder)
    made.ends, step = set(), made.step  # random weights would end somewhere, and a toy is too fast to be stopped
    made.step = lambda: (time.sleep(0.02), step())[1]
    yield from opened(chromium, listening(create_app(made, name="toy", folder=folder)))


def opened(chromium: Any, address: str) -> Iterator[Any]:
    """The page, without a fault in its console and without a request to anybody else."""
    context = chromium.new_context(viewport={"width": 1100, "height": 820})
    page, faults, asked = context.new_page(), [], []
    page.on("console", lambda one: faults.append(one.text) if one.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda one: asked.append(one.url))
    page.goto(address)
    page.faults = faults
    yield page
    context.close()
    assert not faults
    assert all(url.startswith((address, "data:")) for url in asked)


def answered(page: Any, prompt: str, **fields: str) -> list[str]:
    """Send a prompt; what each pane says in the end."""
    for name, value in ({"tokens": "12", "temperature": "1", "seed": "3"} | fields).items():
        page.fill(f"#{name}", value)
    page.fill("#prompt", prompt)
    page.keyboard.press("Control+Enter")
    page.wait_for_function("() => document.querySelectorAll('.turn').length && !document.querySelector('.waiting')")
    page.wait_for_selector("#stop[disabled]", state="attached")
    return [pane.inner_text() for pane in page.query_selector_all(".talk .turn:last-child")]


@pytest.mark.browser
def test_two_adapters_side_by_side(page: Any, learned: dict[str, Any]) -> None:
    page.wait_for_selector("#adapters tr")
    assert page.inner_text("#state") == "toy · 2 adapters"
    choices = page.query_selector_all(".pane select")
    choices[0].select_option("sql")
    choices[1].select_option("french")
    said = answered(page, "Hello")
    assert said[0] != said[1]
    assert page.query_selector_all("mark")
    for pane, name in zip(page.query_selector_all(".pane"), ("sql", "french"), strict=True):
        below = pane.query_selector(".below").inner_text()
        assert re.search(r"[\d.]+ tokens/s", below)
        assert f"{name} {learned[name].digest[:12]}" in below
    rows = [row.inner_text() for row in page.query_selector_all("#adapters tr")]
    assert any("sql" in row and learned["sql"].digest[:12] in row for row in rows)
    page.click("#clear")
    choices[1].select_option("sql")
    one, other = answered(page, "Hello")
    assert one == other == said[0]  # the same prompt and seed
    assert not page.query_selector_all("mark")
    if place := os.environ.get("GOSSAMER_SCREENSHOT"):
        choices[1].select_option("french")
        page.click("#clear")
        answered(page, "Which of you is right?", tokens="60")
        page.screenshot(path=place)


@pytest.mark.browser
def test_all_of_it_with_the_keyboard(page: Any) -> None:
    page.wait_for_selector("#adapters tr")
    page.focus("#key")
    seen = []
    while "send" not in seen:
        page.keyboard.press("Tab")
        seen.append(page.evaluate("() => document.activeElement.id || document.activeElement.tagName"))
    order = [name for name in seen if name in ("SELECT", "prompt", "mode", "tokens", "seed", "add", "send")]
    assert order == ["SELECT", "SELECT", "prompt", "mode", "tokens", "seed", "add", "send"]
    page.focus("#add")
    page.keyboard.press("Enter")
    assert len(page.query_selector_all(".pane")) == 3
    assert page.evaluate("() => document.activeElement.tagName") == "SELECT"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # its close button
    assert len(page.query_selector_all(".pane")) == 2
    assert page.evaluate("() => document.activeElement.id") == "prompt"


@pytest.mark.browser
def test_stop_ends_all_streams(page: Any) -> None:
    page.wait_for_selector("#adapters tr")
    page.fill("#tokens", "4000")
    page.fill("#prompt", "Hello")
    page.click("#send")
    page.wait_for_function("() => [...document.querySelectorAll('.waiting')].some((one) => one.textContent.length > 5)")
    page.click("#stop")
    page.wait_for_selector("#stop[disabled]", state="attached")
    assert all(one.inner_text().endswith("■") for one in page.query_selector_all(".talk .turn:last-child"))


@pytest.mark.browser
def test_what_a_model_says_is_text(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"
    monkeypatch.setattr(Sequence, "text", property(lambda self: bad if self.done else ""))
    page.wait_for_selector("#adapters tr")
    said = answered(page, bad)
    assert said == [bad, bad]
    assert page.title() == "Gossamer"


@pytest.mark.browser
def test_keys_and_faults(chromium: Any, folder: Path, keyring: Any, listening: Callable[[Any], str]) -> None:
    address = listening(create_app(engine(folder), name="toy", folder=folder, keyring=keyring))
    pages = opened(chromium, address)
    page = next(pages)
    page.wait_for_selector("#state.bad")
    page.fill("#key", KEYS["one"])
    page.keyboard.press("Tab")
    page.wait_for_function("() => document.getElementById('state').textContent === 'toy · 1 adapter'")
    page.reload()  # the key is kept for this tab
    page.wait_for_function("() => document.getElementById('state').textContent === 'toy · 1 adapter'")
    page.evaluate("() => document.getElementById('temperature').removeAttribute('max')")
    said = answered(page, "Hello", temperature="9")
    assert all("temperature" in text for text in said)
    assert len(page.query_selector_all(".fault")) == 2
    page.faults.clear()  # the browser writes down that the server refused
    next(pages, None)
