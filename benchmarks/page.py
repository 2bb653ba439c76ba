"""What the page costs: bytes of its first load, time until it can be used, time to draw a long trace.

    python -m benchmarks.page --out benchmarks/results/page.md

In Chromium without a GPU, against a server of the bundled checkpoint. Every repetition has a new browser context with
an empty cache. "Interactive" begins with the navigation and ends when the button *Ask* can be pressed. "Drawn" begins
when the text of a trace file has been read and ends after the frame that shows all of it: the logit lens of 64
iterations by 50 tokens, the four charts and the rest of *Watch*. "Longest task" is the longest time for which the page
does not react while the events of 64 such iterations and 4,000 tokens arrive, all at once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory

from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from benchmarks.server_process import start_server

MAX_BYTES, MAX_INTERACTIVE_MS, MAX_DRAW_MS, MAX_TASK_MS = 300_000, 1000.0, 50.0, 200.0
ITERATIONS, TOKENS, ANSWER_TOKENS = 64, 50, 4000
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
WATCH = """
(() => {
  window.longest = 0;
  new PerformanceObserver(list => {
    for (const { duration } of list.getEntries()) window.longest = Math.max(window.longest, duration);
  }).observe({ type: "longtask" });
  const ready = () => document.querySelector("button.main:not([disabled])");
  const observer = new MutationObserver(() => {
    if (ready()) { window.interactive = performance.now(); observer.disconnect(); }
  });
  observer.observe(document, { subtree: true, childList: true, attributes: true });
  const read = File.prototype.text;
  File.prototype.text = async function () {
    const text = await read.call(this);
    const began = performance.now();
    const wait = () => requestAnimationFrame(() => {
      const canvas = document.querySelector(".map canvas");
      const charts = [...document.querySelectorAll(".chart > div")];
      // A chart below the window is drawn when it comes near.
      const missing = (host) => host.getBoundingClientRect().top < innerHeight && !host.querySelector("canvas");
      if (!canvas || charts.length < 4 || charts.some(missing)) return wait();
      const channel = new MessageChannel();
      channel.port1.onmessage = () => { window.drawn = performance.now() - began; };
      channel.port2.postMessage(null);
    });
    wait();
    return text;
  };
})();
"""


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="Repetitions of each measurement, at least 2.")
    parser.add_argument("--out", type=Path, help="File for the table, in Markdown.")
    arguments = parser.parse_args()
    if arguments.repeats < 2:
        parser.error("--repeats must be at least 2")
    with TemporaryDirectory() as folder, serving() as url, sync_playwright() as playwright:
        trace = Path(folder) / "trace.json"
        trace.write_text(json.dumps(long_trace()))
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        loads = [measure_load(browser, url) for _ in range(arguments.repeats)]
        draws = [measure_draw(browser, url, trace) for _ in range(arguments.repeats)]
        tasks = [measure_longest_task(browser, url) for _ in range(arguments.repeats)]
        text = report(loads, draws, tasks, browser.version)
        browser.close()
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


@contextmanager
def serving() -> Iterator[str]:
    """A server of the bundled checkpoint in its own process: its URL."""
    process, url = start_server()
    try:
        yield url
    finally:
        process.terminate()
        process.wait(60)


def long_trace() -> dict[str, object]:
    """A trace file of 64 iterations whose logit lens has 50 tokens, with a number in every cell."""
    steps = [
        {
            "relative_change": 0.9**t,
            "contraction": 0.9,
            "entropy": 3.0 - t / 40,
            "norm": 8 + t / 100,
            "top_tokens": [{"token": f"word{i}", "prob": 0.01 + ((i * 7 + t * 3) % 50) / 60} for i in range(TOKENS)],
        }
        for t in range(ITERATIONS)
    ]
    points = [[0.9**t, 0.8**t] for t in range(ITERATIONS)]
    result = {"text": "an answer", "exit_reason": "max_iterations", "iterations": ITERATIONS}
    projection = {"points": points, "shares": [0.8, 0.1]}
    return {
        "format": "slr-trace",
        "prompt": "a prompt",
        "text": "an answer",
        "criterion": "relative_change",
        "threshold": 0.05,
        "trace": steps,
        "result": result,
        "projection": projection,
    }


def _open(context: BrowserContext, url: str) -> tuple[float, int]:
    """Load the page: milliseconds until it can be used, and bytes transferred."""
    page = context.new_page()
    session, received = context.new_cdp_session(page), [0.0]
    session.send("Network.enable")

    def count(event: dict[str, float]) -> None:
        received[0] += event["encodedDataLength"]

    session.on("Network.loadingFinished", count)
    page.add_init_script(WATCH)
    page.goto(url, wait_until="networkidle")
    return _wait_for(page, "interactive"), int(received[0])


def _wait_for(page: Page, name: str) -> float:
    """A number that the page's script sets. The page's policy forbids Playwright's own way of waiting for it."""
    look = "function look() { name in window ? done(window[name]) : setTimeout(look, 20); }"
    script = f"name => new Promise(done => ({look})())"
    return float(page.evaluate(script, name))


def measure_load(browser: Browser, url: str) -> tuple[float, int]:
    """Milliseconds until the page can be used, and bytes transferred, with an empty cache."""
    context = browser.new_context()
    try:
        return _open(context, url)
    finally:
        context.close()


def measure_draw(browser: Browser, url: str, trace: Path) -> float:
    """Milliseconds until the first trace of a page is drawn."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    try:
        _open(context, url)
        page = context.pages[0]
        page.get_by_label("Open a trace file").set_input_files(trace)
        drawn = _wait_for(page, "drawn")
        # Only the part of the map that its box shows is drawn.
        width, height = page.locator(".map canvas").first.evaluate("c => [c.width, c.height]")
        assert width > 500, "the canvas is drawn"
        assert height > 400
        return drawn
    finally:
        context.close()


def long_stream() -> str:
    """The events of a long answer, as ``/trace`` sends them."""
    trace = long_trace()["trace"]
    assert isinstance(trace, list)
    steps = [{"index": 0, "t": t, **step} for t, step in enumerate(trace, start=1)]
    usage = {"prompt_tokens": 1, "completion_tokens": ANSWER_TOKENS, "forward_passes": 1}
    result = {"text": "word " * ANSWER_TOKENS, "iterations": ITERATIONS, "exit_reason": "max_iterations"}
    result |= {"usage": usage, "timings": {"total_s": 1.0}, "trace": steps}
    token = {"index": 0, "token_id": 1, "text": "word "}
    events = [("iteration", step) for step in steps] + [("token", token)] * ANSWER_TOKENS
    events += [("result", result), ("done", {})]
    return "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events)


def measure_longest_task(browser: Browser, url: str) -> float:
    """Milliseconds of the longest task while a long answer arrives; 50 if there is no longer one."""
    context, body = browser.new_context(viewport={"width": 1280, "height": 900}), long_stream()
    try:
        _open(context, url)
        page = context.pages[0]
        page.route("**/trace", lambda route: route.fulfill(content_type="text/event-stream", body=body))
        page.evaluate("window.longest = 0")
        page.get_by_role("button", name="Ask", exact=True).click()
        page.get_by_role("button", name="Download trace").wait_for()
        return max(50.0, float(page.evaluate("window.longest")))
    finally:
        context.close()


def report(loads: list[tuple[float, int]], draws: list[float], tasks: list[float], version: str) -> str:
    """The table."""
    interactive, sizes = [ms for ms, _ in loads], [size for _, size in loads]

    def row(name: str, values: list[float], limit: float, unit: str) -> str:
        low, _, high = quantiles(values, n=4)
        mark = "" if median(values) < limit else " (over)"
        shown = f"{median(values):.0f} {unit}{mark} | {low:.0f} to {high:.0f} | {min(values):.0f} | {limit:.0f}"
        return f"| {name} | {shown} |"

    lines = [
        "# The page",
        "",
        f"`python -m benchmarks.page`, {len(draws)} repetitions; Chromium {version} without a GPU, "
        f"{os.cpu_count()} cores ({platform.machine()}).",
        "",
        "| | median | quartiles | least | limit |",
        "|---|---|---|---|---|",
        row("bytes transferred by the first load", [float(size) for size in sizes], MAX_BYTES, "bytes"),
        row("from navigation until interactive", interactive, MAX_INTERACTIVE_MS, "ms"),
        row(f"a trace of {ITERATIONS} iterations by {TOKENS} tokens drawn", draws, MAX_DRAW_MS, "ms"),
        row(f"longest task, {ITERATIONS} iterations and {ANSWER_TOKENS} tokens", tasks, MAX_TASK_MS, "ms"),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
