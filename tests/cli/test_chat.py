import io
import os
import pty
import subprocess
import sys
import threading

import pytest

from slr_core.engine import Engine
from slr_core.generation.reference import generate
from tests import tiny
from tests.cli.questions import LOOP

FIRST, SECOND = tiny.PROMPTS[:2]
OPTIONS = [*LOOP, "--max-new-tokens", "6"]


@pytest.fixture
def chat(run, block, monkeypatch):
    """Chat with lines of standard input: the exit code, output and errors."""

    def chat(*lines, options=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return run("chat", "--model", block, *OPTIONS, *options)

    return chat


def answer(made, *contents):
    """The reference's answer to a conversation of a user and an assistant in turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return generate(made, [tiny.request(made, messages, {"max_iterations": 3, "criterion": "fixed"})])[0]


def test_conversation(chat, thinking):
    first = answer(thinking, FIRST)
    second = answer(thinking, FIRST, first.text, SECOND)
    code, out, err = chat(FIRST, SECOND)
    assert (code, out) == (0, f"{first.text}\n{second.text}\n")
    lines = err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("[3 iterations, max_iterations") for line in lines)
    assert second.text != answer(thinking, SECOND).text


def test_reset(chat, thinking):
    out = chat(FIRST, "/reset", SECOND)[1]
    assert out == f"{answer(thinking, FIRST).text}\n{answer(thinking, SECOND).text}\n"


def test_exit(chat, thinking):
    assert chat(FIRST, "/exit", SECOND)[:2] == (0, f"{answer(thinking, FIRST).text}\n")


def test_help_and_unknown_command(chat):
    code, out, err = chat("/help", "/rest", "")
    assert code == 0
    assert "/reset: start a new conversation" in out
    assert err == "slr: unknown command /rest; did you mean /reset?\n"


def test_system_message(chat, thinking):
    messages = [{"role": "system", "content": "w3"}, {"role": "user", "content": FIRST}]
    loop = {"max_iterations": 3, "criterion": "fixed"}
    expected = generate(thinking, [tiny.request(thinking, messages, loop)])[0].text
    assert chat(FIRST, options=["--system", "w3"])[1] == f"{expected}\n"
    assert chat(FIRST, "/reset", FIRST, options=["--system", "w3"])[1] == f"{expected}\n" * 2


def test_refused_message_is_dropped(chat, thinking):
    code, out, err = chat("w1 " * 500, FIRST)
    assert (code, out) == (0, f"{answer(thinking, FIRST).text}\n")
    assert err.startswith("slr: prompt has ")


def test_interrupt_cancels_the_answer(chat, thinking, monkeypatch):
    """Ctrl-C while an answer is generated: the request is cancelled and the conversation goes on without it."""
    futures, submit, stream = [], Engine.submit, Engine.stream

    def submitted(self, *args, **options):
        futures.append(submit(self, *args, **options))
        return futures[-1]

    def interrupted(self, *args, **options):
        events = stream(self, *args, **options)
        yield next(events)
        if len(futures) == 1:
            events.close()
            raise KeyboardInterrupt
        yield from events

    monkeypatch.setattr(Engine, "submit", submitted)
    monkeypatch.setattr(Engine, "stream", interrupted)
    code, out, err = chat(FIRST, SECOND)
    assert futures[0].cancelled()
    assert code == 0
    assert "slr: cancelled\n" in err
    assert out == f"\n{answer(thinking, SECOND).text}\n"


def test_no_template(run, folder):
    code, out, err = run("chat", "--model", folder)
    assert (code, out) == (1, "")
    assert err.startswith("slr: this checkpoint has no chat template")


@pytest.mark.slow
def test_terminal(block, thinking):
    """On a terminal: a prompt, the running iteration, the answer and a summary."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "slr_core.cli", "chat", "--model", block, *OPTIONS],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "xterm"},
    ) as process:
        os.close(slave)
        timer = threading.Timer(120, process.kill)
        timer.start()
        shown = ""

        def until(text):
            nonlocal shown
            while text not in shown:
                shown += os.read(master, 4096).decode()

        try:
            until("> ")
            os.write(master, f"{FIRST}\n".encode())
            until("3 iterations, max_iterations")
            os.write(master, b"/exit\n")
            assert process.wait(60) == 0
        finally:
            timer.cancel()
            process.kill()
            os.close(master)
    assert "\r\x1b[K[iteration 1, change -]\r\x1b[K[iteration 2, change " in shown
    assert f"\r\x1b[K{answer(thinking, FIRST).text}\r\n" in shown


BUNDLED = {
    "prosqa": ("Max is a impus. Every impus is a rompus. Is Max a rompus or lempus?", "Max is a rompus."),
    "prontoqa": ("Max is a wumpus. Wumpuses are cold. True or false: Max is cold.", "True"),
}


@pytest.mark.parametrize("model", BUNDLED)
def test_bundled(run, monkeypatch, model):
    """The bundled checkpoints have a template: of a chat, they answer the last user message."""
    question, text = BUNDLED[model]
    assert run("generate", "--model", model, question)[1] == f"{text}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"Hello\n{question}\n"))
    code, out, _ = run("chat", "--model", model)
    assert (code, out.splitlines()[1]) == (0, text)
