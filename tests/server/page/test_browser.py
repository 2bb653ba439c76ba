"""The page in a real browser. Skipped where chromium is not installed."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from slr_core.checkpoint.folder import BUNDLED_FOLDER
from tests.server.process import Server

CHROMIUM = shutil.which("chromium")
AXE = Path(__file__).parents[3] / "server" / "page" / "node_modules" / "axe-core" / "axe.min.js"
KEY = "k" * 20
MARKUP = "<img src=x onerror=\"document.title='attacked'\"><script>document.title='attacked'</script>"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Server(BUNDLED_FOLDER / "prosqa", tmp_path_factory.mktemp("server") / "log")
    yield made
    made.kill()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield made
        made.close()


@pytest.fixture
def visit(browser, server):
    """Opens the page; afterwards there must be no console error and no request to another host."""
    contexts, faults = [], []

    def open_page(url=None, fragment="", expected=(), **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)

        def note(message):
            if message.type == "error" and not any(text in message.text for text in expected):
                faults.append(message.text)

        page.on("console", note)
        page.on("pageerror", lambda error: faults.append(str(error)))
        own = url or server.url
        page.on("request", lambda r: r.url.startswith((own, "data:", "blob:")) or faults.append(r.url))
        page.goto(f"{own}/{fragment}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def ask(page):
    page.get_by_role("button", name="Ask").click()
    page.get_by_role("button", name="Download trace").wait_for()


def test_ask_and_scrub(visit):
    page = visit()
    ask(page)
    assert re.match(r"\w+ is a \w+\.", page.locator(".answer .text").inner_text())
    assert "The state stopped changing" in page.locator(".answer").inner_text()
    slider = page.get_by_role("slider")
    last = int(slider.input_value())
    assert page.locator(".lens text[font-weight=bold]").text_content() == str(last)
    before = page.locator(".graph").get_attribute("aria-label")
    slider.focus()
    for _ in range(last - 1):
        page.keyboard.press("ArrowLeft")
    assert slider.input_value() == "1"
    assert page.locator(".graph").get_attribute("aria-label") != before
    assert page.locator(".chart canvas").count() == 4


def test_curl_runs(visit):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    page.get_by_text("Settings").click()
    page.get_by_label("Maximum iterations").fill("3")
    ask(page)
    page.get_by_role("button", name="Copy as curl").click()
    page.get_by_text("curl command copied.").wait_for()
    command = page.evaluate("navigator.clipboard.readText()")
    answer = json.loads(subprocess.run(["bash", "-c", f"{command} -s"], capture_output=True, check=True).stdout)
    assert answer["results"][0]["iterations"] == 3
    assert answer["results"][0]["text"] == page.locator(".answer .text").inner_text()


def test_link_restores_settings(visit):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    page.get_by_text("Settings").click()
    page.get_by_label("Maximum iterations").fill("2")
    ask(page)
    page.get_by_role("button", name="Link to this run").click()
    page.get_by_text("Link copied.").wait_for()
    link = page.evaluate("navigator.clipboard.readText()")
    again = visit(fragment="#" + link.partition("#")[2])
    ask(again)
    assert again.get_by_role("slider").input_value() == "2"


def test_trace_file_without_server(visit, tmp_path):
    page = visit()
    ask(page)
    with page.expect_download() as saved:
        page.get_by_role("button", name="Download trace").click()
    saved.value.save_as(tmp_path / "trace.json")
    with page.expect_download() as saved:
        page.get_by_role("button", name="Picture (SVG)").click()
    saved.value.save_as(tmp_path / "lens.svg")
    assert "var(" not in (tmp_path / "lens.svg").read_text()
    with page.expect_download() as saved:
        page.get_by_role("button", name="Picture (PNG)").click()
    saved.value.save_as(tmp_path / "lens.png")
    assert (tmp_path / "lens.png").read_bytes().startswith(b"\x89PNG")
    other = visit()
    other.get_by_role("button", name="Ask").wait_for()
    other.context.set_offline(True)
    other.get_by_label("Open a trace file").set_input_files(tmp_path / "trace.json")
    other.locator(".lens").wait_for()
    assert other.locator(".answer .text").inner_text() == page.locator(".answer .text").inner_text()


def test_markup_shows_as_text(visit, tmp_path):
    step = {"top_tokens": [{"token": MARKUP, "prob": 0.9}], "thought": MARKUP, "adapter": MARKUP}
    result = {"text": MARKUP, "exit_reason": MARKUP}
    fields = {"prompt": MARKUP, "model": MARKUP, "criterion": MARKUP, "text": MARKUP}
    (tmp_path / "trace.json").write_text(
        json.dumps({"format": "slr-trace", **fields, "trace": [step], "result": result})
    )
    page = visit()
    page.get_by_label("Open a trace file").set_input_files(tmp_path / "trace.json")
    page.locator(".lens").wait_for()
    assert MARKUP in page.locator(".answer").inner_text()
    assert page.locator("main img, main script").count() == 0
    assert page.title() == "Stable Latent Reasoning"


def test_unusable_trace_file(visit, tmp_path):
    (tmp_path / "trace.json").write_text("[]")
    page = visit()
    page.get_by_label("Open a trace file").set_input_files(tmp_path / "trace.json")
    assert page.get_by_role("alert").inner_text() == "The file is not a trace from this page."


def test_long_trace(visit, tmp_path):
    tokens = [{"token": f"w{i}", "prob": 0.02} for i in range(50)]
    step = {"relative_change": 0.5, "contraction": 0.9, "entropy": 1.0, "norm": 8.0, "top_tokens": tokens}
    result = {"text": "word " * 4000, "exit_reason": "max_iterations"}
    file = {"format": "slr-trace", "prompt": "", "text": result["text"], "trace": [step] * 64, "result": result}
    (tmp_path / "trace.json").write_text(json.dumps(file))
    page = visit()
    page.get_by_label("Open a trace file").set_input_files(tmp_path / "trace.json")
    page.get_by_role("slider").focus()
    page.keyboard.press("Home")
    assert page.get_by_role("slider").input_value() == "1"


def test_server_refusal(visit):
    page = visit(expected=["status of 400"])
    page.get_by_text("Settings").click()
    page.get_by_label("Maximum iterations").fill("65")
    page.get_by_role("button", name="Ask").click()
    assert "max_iterations" in page.get_by_role("alert").inner_text()


def test_key(visit, tmp_path):
    server = Server(BUNDLED_FOLDER / "prosqa", tmp_path / "log", SLR_API_KEYS=KEY)
    try:
        page = visit(server.url, expected=["status of 401", "status of 503"])
        page.get_by_label("API key").fill("x" * 20)
        page.get_by_role("button", name="Use key").click()
        assert "a valid key is required" in page.get_by_role("alert").inner_text()
        page.get_by_label("API key").fill(KEY)
        page.get_by_role("button", name="Use key").click()
        ask(page)
        assert page.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie])") == '[{},{},""]'
    finally:
        server.kill()


def test_stream_that_breaks(visit):
    page = visit(expected=["net::ERR"])
    page.get_by_role("button", name="Ask").wait_for()
    frame = {"index": 0, "t": 1, "relative_change": 1, "top_tokens": []}
    body = f"event: iteration\ndata: {json.dumps(frame)}\n\n"
    page.route("**/trace", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    page.get_by_role("button", name="Ask").click()
    assert "ended before the answer was complete" in page.get_by_role("alert").inner_text()
    page.unroute("**/trace")
    page.route("**/trace", lambda route: route.abort())
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("The server cannot be reached.").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_layout(visit, scheme, width):
    page = visit(color_scheme=scheme, reduced_motion="reduce", viewport={"width": width, "height": 800})
    ask(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page must not scroll sideways"
    assert page.evaluate("getComputedStyle(document.querySelector('.lens rect')).transitionDuration") == "0s"


@pytest.mark.skipif(not AXE.exists(), reason="axe-core is not installed: npm ci in server/page")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(visit, scheme):
    page = visit(color_scheme=scheme)
    page.get_by_text("Settings").click()
    ask(page)
    page.evaluate(AXE.read_text())
    assert page.evaluate("axe.run().then(r => r.violations.map(v => [v.id, v.nodes.map(n => n.html)]))") == []
