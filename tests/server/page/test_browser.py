"""The page in a real browser. Skipped where chromium is not installed."""

import gzip
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn

from slr_core.checkpoint.folder import BUNDLED_FOLDER
from slr_server.app import create_app
from slr_server.settings import ServerSettings
from tests import tiny
from tests.server.process import Server

CHROMIUM = shutil.which("chromium")
ROOT = Path(__file__).parents[3]
AXE = ROOT / "server" / "page" / "node_modules" / "axe-core" / "axe.min.js"
PROSQA = BUNDLED_FOLDER / "prosqa"
KEY = "k" * 20
MARKUP = "<img src=x onerror=\"document.title='attacked'\"><script>document.title='attacked'</script>"
LONGEST_TASK_MS = 1000  # a frozen page; benchmarks/page.py has the usual figure
VIEWS = ("Watch", "Compare", "Batch", "Server")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]


@contextmanager
def serving(folder, **settings):
    """A server in a thread: the function that stops it, with its ``url``."""
    config = uvicorn.Config(
        create_app(ServerSettings(model=str(folder), threads=1, **settings)), port=0, log_level="error"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)

    def stop():
        server.should_exit = True
        thread.join()

    stop.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    while httpx.get(f"{stop.url}/readyz").status_code != 200:
        time.sleep(0.05)
    try:
        yield stop
    finally:
        stop()


@pytest.fixture(scope="module")
def server():
    with serving(PROSQA) as made:
        yield made


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

    def open_page(url=None, fragment="", expected=(), routes=(), **options):
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
        for pattern, handle in routes:
            page.route(pattern, handle)
        page.goto(f"{own}/{fragment}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def ask(page):
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_role("button", name="Download trace").wait_for()


def view(page, name):
    page.get_by_role("navigation").get_by_role("button", name=name).click()


def table(page, name):
    """The rows of a heat map, from its table."""
    frame = page.locator(f".map[aria-label='{name}'] + details")
    if frame.get_attribute("open") is None:
        frame.get_by_text("As a table").click()
    return [row.split("\t") for row in frame.get_by_role("row").all_inner_texts()]


def set_iterations(page, count):
    page.get_by_text("Settings", exact=True).filter(visible=True).click()
    page.get_by_label("Maximum iterations").filter(visible=True).fill(str(count))


def test_ask_and_scrub(visit):
    page = visit()
    ask(page)
    assert re.match(r"\w+ is a \w+\.", page.locator(".answer .text").inner_text())
    assert "The exit criterion was met" in page.locator(".answer").inner_text()
    slider = page.get_by_role("slider")
    last = int(slider.input_value())
    lens = page.get_by_role("img", name="Logit lens")
    assert f"Iteration {last} is marked" in lens.get_attribute("aria-label")
    assert slider.get_attribute("aria-valuetext").startswith(f"{last} of {last}, likeliest token")
    before = page.locator(".graph").get_attribute("aria-label")
    slider.focus()
    for _ in range(last - 1):
        page.keyboard.press("ArrowLeft")
    assert slider.input_value() == "1"
    assert "Iteration 1 is marked" in lens.get_attribute("aria-label")
    assert len(table(page, "Logit lens")[0]) == last + 1
    assert page.locator(".graph").get_attribute("aria-label") != before
    assert page.locator(".chart canvas").count() == 4
    assert page.locator(".path text").all_text_contents()[:last] == [str(t) for t in range(1, last + 1)]


def test_new_question(visit):
    page = visit()
    box, button = page.get_by_role("textbox", name="Question"), page.get_by_role("button", name="New question")
    button.wait_for()
    before = box.input_value()
    button.click()
    prompt = box.input_value()
    assert prompt != before
    assert sorted(set(re.findall(r"\w+", prompt))) == sorted(set(re.findall(r"\w+", before)))
    ask(page)
    root, *options = re.search(r"Is (\w+) a (\w+) or (\w+)\?$", prompt).groups()
    assert page.locator(".answer .text").inner_text() in [f"{root} is a {option}." for option in options]


def test_copies(visit):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    set_iterations(page, 3)
    ask(page)
    page.get_by_role("button", name="Copy as curl").click()
    page.get_by_text("curl command copied.").wait_for()
    command = page.evaluate("navigator.clipboard.readText()")
    answer = json.loads(subprocess.run(["bash", "-c", f"{command} -s"], capture_output=True, check=True).stdout)
    assert answer["results"][0]["iterations"] == 3
    assert answer["results"][0]["text"].strip() == page.locator(".answer .text").inner_text()
    page.get_by_role("button", name="Link to this run").click()
    page.get_by_text("Link copied.").wait_for()
    link = page.evaluate("navigator.clipboard.readText()")
    again = visit(fragment="#" + link.partition("#")[2])
    ask(again)
    assert again.get_by_role("slider").input_value() == "3"


def test_trace_file_without_server(visit, server, tmp_path):
    page = visit()
    ask(page)
    body = {"prompt": page.get_by_role("textbox", name="Question").input_value(), "include_states": True}
    trace = httpx.post(f"{server.url}/trace", json=body).json()["results"][0]["trace"]
    for button, name in (
        ("Download trace", "trace.json"),
        ("Picture (SVG)", "lens.svg"),
        ("Picture (PNG)", "lens.png"),
    ):
        with page.expect_download() as saved:
            page.get_by_role("button", name=button).click()
        saved.value.save_as(tmp_path / name)
    points = torch.tensor(json.loads((tmp_path / "trace.json").read_text())["projection"]["points"])
    states = torch.tensor([step["state"] for step in trace]).flatten(1)
    components, scales, _ = torch.linalg.svd(states - states.mean(0), full_matrices=False)
    torch.testing.assert_close(points.abs(), (components * scales)[:, :2].abs(), rtol=1e-3, atol=1e-3)
    assert "var(" not in (tmp_path / "lens.svg").read_text()
    assert (tmp_path / "lens.png").read_bytes().startswith(b"\x89PNG")
    other = visit()
    other.get_by_role("button", name="Ask", exact=True).wait_for()
    other.context.set_offline(True)
    other.get_by_label("Open a trace file").set_input_files(tmp_path / "trace.json")
    other.locator(".map").first.wait_for()
    assert other.locator(".answer .text").inner_text() == page.locator(".answer .text").inner_text()
    assert other.locator(".path").inner_html() == page.locator(".path").inner_html()


def test_markup_shows_as_text(visit, tmp_path):
    def rename(route):
        route.fulfill(json={**route.fetch().json(), "model": MARKUP, "models": [MARKUP, MARKUP]})

    step = {"top_tokens": [{"token": MARKUP, "prob": 0.9}], "thought": MARKUP, "adapter": MARKUP}
    result = {"text": MARKUP, "exit_reason": MARKUP, "token_traces": [[step, step]]}
    fields = {
        "tokens": [MARKUP],
        "depths": [2, 1],
        "prompt": MARKUP,
        "model": MARKUP,
        "criterion": MARKUP,
        "text": MARKUP,
    }
    file = tmp_path / "trace.json"
    file.write_text(json.dumps({"format": "slr-trace", **fields, "trace": [step], "result": result}))
    page = visit(routes=[("**/checkpoint", rename)])
    page.locator("header b").wait_for()
    page.get_by_label("Open a trace file").set_input_files(file)
    page.locator(".map").first.wait_for()
    assert MARKUP in page.locator(".answer").inner_text()
    assert MARKUP in page.locator("header").inner_text()
    shown = MARKUP[:10]
    assert table(page, "Tokens")[1:] == [[MARKUP, shown, f"{shown} (exit)"], ["token 2", "(exit)", "–"]]
    view(page, "Batch")
    page.get_by_label("Questions", exact=False).first.fill(json.dumps({"question": MARKUP, "answer": MARKUP}))
    page.get_by_role("button", name="Run all").click()
    page.get_by_text("wrong", exact=True).wait_for()
    assert page.get_by_role("cell", name=MARKUP, exact=True).count() == 1
    view(page, "Compare")
    page.get_by_role("button", name="Compare").last.click()
    page.get_by_role("heading", name="Where the paths part").wait_for()
    assert page.locator("main img, main script").count() == 0
    assert page.title() == "Stable Latent Reasoning"


def test_unusable_files(visit, tmp_path):
    (tmp_path / "trace.json").write_text("[]")
    page = visit()
    page.get_by_label("Open a trace file").set_input_files(tmp_path / "trace.json")
    assert page.get_by_role("alert").inner_text() == "The file is not a trace from this page."
    view(page, "Batch")
    page.get_by_label("Questions", exact=False).first.fill('{"question": "w"}\n{')
    page.get_by_role("button", name="Run all").click()
    assert page.get_by_role("alert").inner_text() == "Line 2 is not JSON."


def test_long_answer_leaves_the_page_responsive(visit):
    """64 iterations by 50 tokens and 4,000 tokens arrive in one piece."""
    tokens = [{"token": f"w{i}", "prob": 0.02} for i in range(50)]
    step = {"index": 0, "relative_change": 0.5, "contraction": 0.9, "entropy": 1.0, "norm": 8.0, "top_tokens": tokens}
    usage = {"prompt_tokens": 1, "completion_tokens": 4000, "forward_passes": 4064}
    result = {"text": "word " * 4000, "iterations": 64, "exit_reason": "max_iterations", "usage": usage}
    result |= {"timings": {"total_s": 1}, "trace": [{**step, "t": t} for t in range(1, 65)]}
    events = [("iteration", {**step, "t": t}) for t in range(1, 65)]
    events += [("token", {"index": 0, "token_id": 1, "text": "word "})] * 4000 + [("result", result), ("done", {})]
    body = "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events)
    page = visit(routes=[("**/trace", lambda route: route.fulfill(content_type="text/event-stream", body=body))])
    page.evaluate(
        "window.longest = 0; new PerformanceObserver(list => list.getEntries().forEach(entry => {"
        " window.longest = Math.max(window.longest, entry.duration); })).observe({ type: 'longtask' })"
    )
    ask(page)
    page.get_by_role("slider").focus()
    page.keyboard.press("Home")
    assert page.get_by_role("slider").input_value() == "1"
    assert len(page.locator(".answer .text").inner_text().split()) == 4000
    assert page.evaluate("longest") < LONGEST_TASK_MS


def test_compare(visit):
    page = visit()
    view(page, "Compare")
    page.get_by_role("button", name="Compare").last.click()
    page.get_by_role("heading", name="Where the paths part").wait_for()
    assert "B has no loop" in page.locator(".parting").inner_text()
    page.get_by_text("Settings of B").click()
    page.get_by_label("Maximum iterations").filter(visible=True).fill("2")
    page.get_by_role("button", name="Compare").last.click()
    page.get_by_role("table").wait_for()
    assert "same after each of the first 2 iterations" in page.locator(".parting").inner_text()
    rows = page.get_by_role("row").all_inner_texts()[1:]
    assert [" ≠" in row for row in rows] == [False, False] + [True] * (len(rows) - 2)
    assert page.locator(".path g > rect").count() == 2
    page.get_by_role("button", name="Open B in Watch").click()
    assert page.get_by_role("slider").input_value() == "2"
    view(page, "Compare")
    page.get_by_role("button", name="Perturb").click()
    page.get_by_role("button", name="Compare").last.click()
    page.get_by_role("img", name="Distance").wait_for()
    assert "The answers are the same." in page.locator(".parting").inner_text()


def test_batch(visit, tmp_path):
    page = visit()
    view(page, "Batch")
    examples = json.loads((PROSQA / "examples.json").read_text())
    lines = [
        {"question": examples[i % len(examples)]["prompt"], "answer": examples[i % len(examples)]["answer"]}
        for i in range(19)
    ]
    lines.append({"question": examples[0]["prompt"], "answer": "No."})
    graph = {"idx_to_symbol": [], "edges": [], "root": 0, "target": 1, "neg_target": 2}
    lines = [{**line, **graph} for line in lines]
    (tmp_path / "questions.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    page.get_by_label("Open a file").set_input_files(tmp_path / "questions.jsonl.gz")
    page.get_by_role("button", name="Run all").click()
    page.get_by_text("20 of 20.").wait_for()
    assert "19 of 20 correct (95 %)" in page.get_by_role("status").inner_text()
    assert "Graded as prosqa" in page.get_by_role("status").inner_text()
    assert "answers" in page.locator(".histogram").get_attribute("aria-label")
    page.get_by_role("button", name="Measure").click()
    page.get_by_role("button", name="Run all").wait_for()
    accuracies = page.get_by_role("img", name="Accuracy").get_attribute("aria-label").split("correct ")[1].split(", ")
    assert float(accuracies[0]) < float(accuracies[-1]) == 0.95
    wrong = page.get_by_role("row").filter(has_text="wrong")
    wrong.get_by_role("button", name="Watch").click()
    page.get_by_role("slider").wait_for()
    assert page.get_by_role("textbox", name="Question").input_value() == examples[0]["prompt"]


def test_server_view(visit):
    page = visit()
    ask(page)
    view(page, "Server")
    row = page.get_by_role("row").filter(has_text="Exits: converged")
    row.wait_for()
    assert int(row.get_by_role("cell").last.inner_text()) >= 1
    assert re.match(
        r"[\d.]+ m?s", page.get_by_role("row").filter(has_text="median").first.get_by_role("cell").last.inner_text()
    )


@pytest.mark.parametrize("workspace", ["block", "prompt"])
def test_positions(visit, tmp_path, workspace):
    made = tiny.reasoner(loop={**tiny.WORKSPACES[workspace], "max_iterations": 4})
    made.save_pretrained(str(tmp_path / "tiny"))
    with serving(tmp_path / "tiny") as server:
        page = visit(server.url)
        page.get_by_role("textbox", name="Question").fill(tiny.words(1, 2, 3, 4, 5))
        ask(page)
        with page.expect_download() as saved:
            page.get_by_role("button", name="Download trace").click()
        body = {"prompt": tiny.words(1, 2, 3, 4, 5), "include_states": True}
        trace = httpx.post(f"{server.url}/trace", json=body).json()["results"][0]["trace"]
        states = torch.tensor([step["state"] for step in trace])
        changes = torch.tensor(json.loads(saved.value.path().read_text())["positions"][1:])
        torch.testing.assert_close(changes, (states[1:] - states[:-1]).norm(dim=-1) / states[:-1].norm(dim=-1))
        labels = [row[0] for row in table(page, "Positions")[1:]]
        assert labels == [f"position {i + 1}" for i in range(3 if workspace == "block" else 5)]


def test_token_loops(visit, tmp_path):
    made = tiny.reasoner(loop={"workspace": "token", "max_iterations": 6, "convergence": {"threshold": 0.82}})
    made.save_pretrained(str(tmp_path / "tiny"))
    with serving(tmp_path / "tiny") as server:
        page = visit(server.url)
        page.get_by_role("textbox", name="Question").fill(tiny.words(1, 2, 3))
        ask(page)
        body = {"prompt": tiny.words(1, 2, 3), "trace_tokens": 100, "top_tokens": 1}
        (result,) = httpx.post(f"{server.url}/trace", json=body).json()["results"]
        rows = table(page, "Tokens")[1:]
        assert [row[0] for row in rows][: len(result["text"].split())] == result["text"].split()
        reads = [[step["top_tokens"][0]["token"] for step in loop] for loop in result["token_traces"]]
        assert len({len(loop) for loop in reads}) > 1, "loops of different lengths"
        expected = [[*loop[:-1], f"{loop[-1]} (exit)", *["–"] * (len(rows[0]) - 1 - len(loop))] for loop in reads]
        assert [row[1:] for row in rows] == expected


def test_chat(visit, tmp_path):
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    made = tiny.reasoner(loop={"max_iterations": 4}, text={"chat_template": template, "max_new_tokens": 3})
    made.save_pretrained(str(tmp_path / "tiny"))
    with serving(tmp_path / "tiny") as server:
        page = visit(server.url, permissions=["clipboard-read", "clipboard-write"])
        log, message = page.get_by_role("log"), page.get_by_role("textbox", name="Message Enter")
        page.get_by_text("System message").click()
        page.get_by_role("textbox", name="Instruction").fill(tiny.words(7, 8))
        messages = [{"role": "system", "content": tiny.words(7, 8)}]
        for i, text in enumerate((tiny.words(1, 2), tiny.words(3))):
            message.fill(text)
            message.press("Enter")
            page.get_by_role("button", name=f"Watch turn {i + 1}").wait_for()
            messages.append({"role": "user", "content": text})
            (expected,) = httpx.post(f"{server.url}/trace", json={"prompt": messages}).json()["results"]
            assert log.locator(".model span").nth(i).inner_text() == expected["text"].strip()
            messages.append({"role": "assistant", "content": expected["text"]})
        page.get_by_role("button", name="Watch turn 2").click()
        assert page.get_by_role("slider").input_value() == str(expected["iterations"])
        page.get_by_role("button", name="Copy as curl").click()
        page.get_by_text("curl command copied.").wait_for()
        command = page.evaluate("navigator.clipboard.readText()")
        answer = json.loads(subprocess.run(["bash", "-c", f"{command} -s"], capture_output=True, check=True).stdout)
        assert answer["results"][0]["text"] == expected["text"]
        page.get_by_role("button", name="Link to this run").click()
        page.get_by_text("Link copied.").wait_for()
        link = page.evaluate("navigator.clipboard.readText()")
        view(page, "Chat")
        page.get_by_role("button", name="Clear").click()
        page.get_by_text("Nothing has been said yet.").wait_for()
        assert log.inner_text() == ""
        again = visit(server.url, fragment="#" + link.partition("#")[2])
        turns = again.get_by_role("log").get_by_role("listitem")
        turns.first.wait_for()
        assert turns.count() == 1
        assert again.get_by_role("textbox", name="Message Enter").input_value() == tiny.words(3)
        if AXE.exists():
            again.evaluate(AXE.read_text())
            assert again.evaluate("axe.run().then(r => r.violations.map(v => [v.id, v.nodes.map(n => n.html)]))") == []


def test_refused_chat(visit, tmp_path):
    refusal = "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template = "{% for m in messages %}" + refusal + "{{ m.content }} {% endfor %}"
    tiny.reasoner(text={"chat_template": template}).save_pretrained(str(tmp_path / "tiny"))
    with serving(tmp_path / "tiny") as server:
        page = visit(server.url, expected=["status of 400"])
        page.get_by_text("System message").click()
        page.get_by_role("textbox", name="Instruction").fill("w1")
        message = page.get_by_role("textbox", name="Message Enter")
        message.fill("w2")
        message.press("Enter")
        assert "no system" in page.get_by_role("alert").inner_text()
        assert message.input_value() == "w2"


def test_slow_server_then_killed(visit, tmp_path):
    server = Server(PROSQA, tmp_path / "log", module="tests.server.frozen", SLR_TEST_FREEZE=str(tmp_path))
    try:
        page = visit(server.url, expected=["net::ERR", "status of 503"])
        page.locator("button.main:enabled").first.wait_for()
        (tmp_path / "freeze-decode").touch()
        page.get_by_role("button", name="Ask", exact=True).click()
        page.get_by_role("slider").wait_for()
        assert page.get_by_role("button", name="Download trace").count() == 0
        page.get_by_role("slider").fill("1")
        picked = page.locator(".scrub").filter(has_text="Iteration 1")
        picked.wait_for()
        page.get_by_role("button", name="Stop").click()
        page.get_by_role("button", name="Ask", exact=True).wait_for()
        assert picked.count() == 1, "what arrives later does not move the slider"
        (tmp_path / "freeze-decode").unlink()
        ask(page)
        (tmp_path / "freeze-decode").touch()
        page.get_by_role("button", name="Ask", exact=True).click()
        page.get_by_role("button", name="Stop").wait_for()
        page.get_by_role("slider").wait_for()
        server.process.kill()
        page.get_by_text("The connection ended before the answer was complete.").wait_for()
        assert page.get_by_role("slider").count() == 1, "what has arrived stays"
        page.get_by_role("button", name="Ask", exact=True).click()
        page.get_by_text("The server cannot be reached.").wait_for()
    finally:
        server.kill()


def test_loop_adapter_sets(visit, tmp_path):
    shutil.copytree(PROSQA, tmp_path / "sets" / "second")
    with serving(PROSQA, loop_sets=str(tmp_path / "sets"), admin_key=KEY) as server:
        headers = {"authorization": f"Bearer {KEY}"}
        httpx.post(f"{server.url}/admin/loop_sets", json={"name": "second"}, headers=headers).raise_for_status()
        page = visit(server.url)
        view(page, "Compare")
        page.get_by_role("button", name="Adapters second").click()
        page.get_by_role("button", name="Compare").last.click()
        page.get_by_role("heading", name="Where the paths part").wait_for()
        assert page.get_by_role("heading", name="B: adapters second").count() == 1
        assert "The answers are the same. The likeliest token is the same" in page.locator(".parting").inner_text()


def test_keyboard_alone(visit):
    page = visit()
    page.locator("button.main:enabled").first.wait_for()

    def tab_to(name):
        for _ in range(40):
            page.keyboard.press("Tab")
            focused = page.evaluate("[document.activeElement.innerText, document.activeElement.type].join('|')")
            if re.match(name, focused):
                return
        raise AssertionError(f"{name} is not reached")

    tab_to(r"Another example\|")
    page.keyboard.press("Shift+Tab")
    tab_to(r"Another example\|")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Download trace").wait_for()
    tab_to(r"\|range")
    page.keyboard.press("Home")
    assert "Iteration 1" in page.locator(".scrub").inner_text()


def test_server_refusal(visit):
    page = visit(expected=["status of 400"])
    set_iterations(page, 65)
    page.get_by_role("button", name="Ask", exact=True).click()
    assert "max_iterations" in page.get_by_role("alert").inner_text()


def test_key(visit):
    with serving(PROSQA, api_keys=KEY) as server:
        page = visit(server.url, expected=["status of 401", "status of 503", "net::ERR"])
        page.get_by_label("API key").fill("x" * 20)
        page.get_by_role("button", name="Use key").click()
        assert "a valid key is required" in page.get_by_role("alert").inner_text()
        page.get_by_label("API key").fill(KEY)
        page.get_by_role("button", name="Use key").click()
        ask(page)
        assert page.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie])") == '[{},{},""]'
        page.get_by_role("button", name="Ask", exact=True).wait_for()
        server()
        page.get_by_role("button", name="Ask", exact=True).click()
        page.get_by_text("The server cannot be reached.").wait_for()


def test_stream_that_breaks(visit):
    page = visit()
    page.get_by_role("button", name="Ask", exact=True).wait_for()
    frame = {"index": 0, "t": 1, "relative_change": 1, "top_tokens": []}
    body = f"event: iteration\ndata: {json.dumps(frame)}\n\n"
    page.route("**/trace", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    page.get_by_role("button", name="Ask", exact=True).click()
    assert "ended before the answer was complete" in page.get_by_role("alert").inner_text()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 360)])
def test_layout(visit, scheme, width):
    page = visit(color_scheme=scheme, reduced_motion="reduce", viewport={"width": width, "height": 800})
    ask(page)
    assert page.evaluate("getComputedStyle(document.querySelector('.graph rect')).transitionDuration") == "0s"
    if AXE.exists():  # `npm ci` in server/page installs it
        page.evaluate(AXE.read_text())
    for name in VIEWS:
        view(page, name)
        if name == "Compare":
            page.get_by_role("button", name="Compare").last.click()
            page.get_by_role("heading", name="Where the paths part").wait_for()
        elif name == "Batch":
            page.get_by_role("button", name="Use the examples").click()
            page.get_by_role("button", name="Run all").click()
            page.get_by_role("button", name="Measure").wait_for()
        elif name == "Server":
            page.get_by_role("table").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} must not scroll sideways"
        if AXE.exists():
            found = page.evaluate("axe.run().then(r => r.violations.map(v => [v.id, v.nodes.map(n => n.html)]))")
            assert found == [], name
    if not AXE.exists():
        pytest.skip("axe-core is not installed: npm ci in server/page")


def test_screenshots(tmp_path):
    """The script that takes the pictures of the docs still runs."""
    command = [
        sys.executable,
        str(ROOT / "docs" / "screenshots.py"),
        "--only",
        "page-token.png",
        "--out",
        str(tmp_path),
    ]
    subprocess.run(command, check=True, timeout=120, stderr=subprocess.DEVNULL, cwd=ROOT)
    assert (tmp_path / "page-token.png").stat().st_size > 20_000
