"""The engine's API: generate, chat, stream and their asynchronous forms; what cancels requests."""

import asyncio
import subprocess
import sys
from contextlib import aclosing, closing

import pytest

from slr_core import LoopParams, SamplingParams, Tokens
from slr_core.engine import Engine, FinishedEvent, IterationEvent, TokenEvent
from slr_core.errors import DeadlineError, EngineError, RequestError
from slr_core.generation.reference import generate
from tests import tiny
from tests.engine.harness import TIMEOUT, facts, gated, is_empty, wait_until

LOOP = LoopParams(max_iterations=3, criterion="fixed")
SAMPLED = SamplingParams(temperature=1.5, seed=4)
PROMPT = tiny.PROMPTS[3]
LONG = LoopParams(min_iterations=40, max_iterations=40)
TEMPLATE = "{% for message in messages %}{{ message['content'] }} w7 {% endfor %}"


@pytest.fixture(scope="module")
def made():
    return tiny.reasoner(text={"chat_template": TEMPLATE})


@pytest.fixture(scope="module")
def engine(made):
    with Engine(made, slots=3, threads=1) as engine:
        yield engine


def alone(made, prompt, loop=LOOP, **options):
    options = {"max_new_tokens": 6, **options}
    return facts(generate(made, [tiny.request(made, prompt, vars(loop), **options)])[0])


def user(text):
    return [{"role": "user", "content": text}]


# -- generate and chat -----------------------------------------------------------------------------------


def test_generate(made, engine):
    results = engine.generate(list(tiny.PROMPTS), None, LOOP, max_new_tokens=6)
    assert [facts(result) for result in results] == [alone(made, prompt) for prompt in tiny.PROMPTS]
    (single,) = engine.generate(PROMPT, SAMPLED, LOOP, max_new_tokens=6)
    assert facts(single) == alone(made, PROMPT, sampling=SAMPLED) != alone(made, PROMPT)
    assert engine.generate([]) == []


def test_generate_from_tokens(made, engine):
    tokens = Tokens(tuple(tiny.ids(PROMPT)))
    for prompts in (tokens, [tokens, tokens]):
        for result in engine.generate(prompts, loop_params=LOOP, max_new_tokens=6):
            assert facts(result) == alone(made, PROMPT)


def test_unset_params_are_the_checkpoints(made, engine):
    (result,) = engine.generate(PROMPT)
    defaults = made.config.loop
    loop = LoopParams(defaults.max_iterations, defaults.min_iterations)
    assert facts(result) == alone(made, PROMPT, loop, max_new_tokens=None)


def test_chat(made, engine):
    rendered = [f"{text} w7" for text in tiny.PROMPTS[:3]]
    expected = [alone(made, text, sampling=SAMPLED) for text in rendered]
    chats = [user(text) for text in tiny.PROMPTS[:3]]
    assert [facts(r) for r in engine.chat(chats, SAMPLED, LOOP, max_new_tokens=6)] == expected
    assert [facts(r) for r in engine.chat(chats[1], SAMPLED, LOOP, max_new_tokens=6)] == expected[1:2]
    with pytest.raises(RequestError, match="messages must not be empty"):
        engine.chat([])


def test_agenerate(made, engine):
    async def main():
        both = await asyncio.gather(
            engine.agenerate(list(tiny.PROMPTS), None, LOOP, max_new_tokens=6),
            engine.agenerate(PROMPT, SAMPLED, LOOP, max_new_tokens=6),
        )
        with pytest.raises(RequestError, match="empty"):
            await engine.agenerate(["w1", ""])
        return both

    many, (single,) = asyncio.run(main())
    assert [facts(result) for result in many] == [alone(made, prompt) for prompt in tiny.PROMPTS]
    assert facts(single) == alone(made, PROMPT, sampling=SAMPLED)


# -- streams ---------------------------------------------------------------------------------------------


async def collect(stream):
    return [event async for event in stream]


def test_stream(made, engine):
    params = PROMPT, SAMPLED, LOOP
    for events in (
        list(engine.stream(*params, max_new_tokens=6)),
        asyncio.run(collect(engine.astream(*params, max_new_tokens=6))),
    ):
        result = events[-1].result
        assert facts(result) == alone(made, PROMPT, sampling=SAMPLED)
        kinds = [IterationEvent] * 3 + [TokenEvent] * len(result.token_ids) + [FinishedEvent]
        assert [type(event) for event in events] == kinds
        assert "".join(event.text for event in events if isinstance(event, TokenEvent)) == result.text


def test_stream_of_a_chat(made, engine):
    *_, last = engine.stream(user(PROMPT), None, LOOP, max_new_tokens=6)
    assert facts(last.result) == alone(made, f"{PROMPT} w7")


def test_concurrent_astreams(made, engine):
    async def last(prompt):
        *_, event = await collect(engine.astream(prompt, None, LOOP, max_new_tokens=6))
        return facts(event.result)

    async def main():
        return await asyncio.gather(*map(last, tiny.PROMPTS))

    assert asyncio.run(main()) == [alone(made, prompt) for prompt in tiny.PROMPTS]


def test_stream_raises_the_error_of_its_request(made):
    with Engine(made, slots=2, threads=1) as engine:
        for options, error, message in (
            ({"loop_set": "unknown"}, RequestError, "loop_set"),
            ({"max_new_tokens": 0}, RequestError, "max_new_tokens"),
            ({"deadline": 0.0}, DeadlineError, "deadline has passed"),
        ):
            with pytest.raises(error, match=message):
                list(engine.stream(PROMPT, **options))
            with pytest.raises(error, match=message):
                asyncio.run(collect(engine.astream(PROMPT, **options)))
    for run in (lambda: list(engine.stream(PROMPT)), lambda: asyncio.run(collect(engine.astream(PROMPT)))):
        with pytest.raises(EngineError, match="shut down"):
            run()


# -- cancelling ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 5])
def test_leaving_a_stream_cancels(made, count):
    with gated(made) as (engine, gate):
        with closing(engine.stream(PROMPT, None, LOOP, max_new_tokens=20)) as stream:
            for _ in range(count):
                gate.release()
                next(stream)
        gate.release(500)
        wait_until(lambda: engine.in_flight == 0)
        assert engine.counters.tokens < 8
    assert is_empty(engine._core)


def test_leaving_an_astream_cancels(made):
    async def main(engine, gate):
        async with aclosing(engine.astream(PROMPT, None, LOOP, max_new_tokens=20)) as stream:
            for _ in range(3):
                gate.release()
                await anext(stream)

    with gated(made) as (engine, gate):
        asyncio.run(main(engine, gate))
        gate.release(500)
        wait_until(lambda: engine.in_flight == 0)
        assert engine.counters.tokens < 8
    assert is_empty(engine._core)


@pytest.mark.parametrize("method", ["agenerate", "astream"])
def test_cancelling_a_task_cancels(made, method):
    async def main(engine, gate):
        prompts = PROMPT if method == "astream" else [PROMPT] * 3
        run = getattr(engine, method)(prompts, None, LONG, max_new_tokens=1)
        task = asyncio.ensure_future(collect(run) if method == "astream" else run)
        while not engine.in_flight:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    with gated(made, slots=2) as (engine, gate):
        asyncio.run(main(engine, gate))
        gate.release(500)
        wait_until(lambda: engine.in_flight == engine.queued == 0)
        assert engine.counters.iterations < 40
    assert is_empty(engine._core)


def test_closed_event_loop_does_not_stop_the_engine(made):
    stream = None

    async def main(engine):
        nonlocal stream
        stream = engine.astream(PROMPT, None, LOOP, max_new_tokens=6)
        await anext(stream)

    with Engine(made, slots=2, threads=1) as engine:
        asyncio.run(main(engine))
        assert facts(engine.generate(PROMPT, None, LOOP, max_new_tokens=6)[0]) == alone(made, PROMPT)


def test_error_in_the_context_cancels():
    endless = LoopParams(min_iterations=1_000_000, max_iterations=1_000_000)
    made = tiny.reasoner(loop=tiny.WORKSPACES["block"])
    futures = []

    def fail():
        with Engine(made, slots=2, threads=1) as engine:
            request = engine.prepare(PROMPT, None, endless)
            futures.extend(engine.submit(request) for _ in range(4))
            wait_until(lambda: engine.in_flight == 2)
            raise KeyError("inside")

    with pytest.raises(KeyError):
        fail()
    assert [future.cancelled() for future in futures] == [True] * 4


INTERRUPTS = """
import asyncio, os, signal, threading, time
from slr_core import Engine, LoopParams
from tests import tiny

made = tiny.reasoner(loop=tiny.WORKSPACES["block"], text={"chat_template": "{{ messages[0]['content'] }}"})
long = LoopParams(min_iterations=1_000_000, max_iterations=1_000_000)
chat = [{"role": "user", "content": "w1 w2"}]

async def follow(engine):
    async for _ in engine.astream("w1 w2", None, long):
        pass

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
runs = {
    "generate": lambda engine: engine.generate(["w1 w2"] * 3, None, long),
    "chat": lambda engine: engine.chat([chat] * 3, None, long),
    "stream": lambda engine: [None for _ in engine.stream("w1 w2", None, long)],
    "agenerate": lambda engine: asyncio.run(engine.agenerate(["w1 w2"] * 3, None, long)),
    "astream": lambda engine: asyncio.run(follow(engine)),
}

def interrupt(engine):
    while engine.counters.iterations - before < 10:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)

with Engine(made, slots=2, threads=1) as engine:
    for name, run in runs.items():
        before = engine.counters.iterations
        threading.Thread(target=interrupt, args=[engine]).start()
        try:
            run(engine)
        except KeyboardInterrupt:
            print(name, "interrupted")
        end = time.monotonic() + 30
        while (engine.queued or engine.in_flight) and time.monotonic() < end:
            time.sleep(0.001)
        assert engine.queued == engine.in_flight == 0, name
        assert engine.counters.iterations - before < 100_000, name
        assert engine.generate("w1 w2", None, LoopParams(max_iterations=2))[0].iterations <= 2
"""


@pytest.mark.slow
def test_interrupt_cancels():
    """SIGINT during each method: it raises KeyboardInterrupt, and the engine is free again."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTS], capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr) == (0, "")
    names = ("generate", "chat", "stream", "agenerate", "astream")
    assert done.stdout.splitlines() == [f"{name} interrupted" for name in names]
