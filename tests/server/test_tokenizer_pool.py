"""Tokenizing: large prompts do not hold up small ones, too large ones are refused unread, and lags are shown."""

import asyncio
import threading
import time

import pytest
from fastapi.testclient import TestClient

from slr_core.errors import RequestError
from slr_server import preprocess, service
from slr_server.app import create_app
from slr_server.loop_lag import LoopLag
from slr_server.preprocess import FieldNames, GenerationJob, RawText, check_characters
from slr_server.settings import ServerSettings
from slr_server.tokenizer_pool import LARGE_CHARACTERS, TokenizerPool
from tests.server.conftest import sample

BODY = {"prompt": "w1", "max_new_tokens": 1}


@pytest.fixture
def blocked():
    """Work that lasts until the event is set."""
    ended = threading.Event()
    yield lambda: ended.wait(20), ended
    ended.set()


def test_large_prompts_do_not_hold_up_small_ones(blocked):
    work, ended = blocked

    async def scenario():
        pool = TokenizerPool()
        large = [asyncio.create_task(pool.run(work, LARGE_CHARACTERS)) for _ in range(3)]
        small = asyncio.create_task(pool.run(work, 1))
        assert await asyncio.wait_for(pool.run(lambda: 7, 1), 10) == 7
        waiting_s = pool.waiting_s
        assert pool.lag_s >= waiting_s > 0
        ended.set()
        assert await asyncio.gather(*large, small) == [True] * 4
        pool.close()

    asyncio.run(scenario())


def test_dropped_work_does_not_run(blocked):
    work, ended = blocked
    begun = threading.Semaphore(0)

    def begin():
        begun.release()
        return work()

    async def scenario():
        pool, ran = TokenizerPool(), []
        running = [asyncio.create_task(pool.run(begin, 1)) for _ in range(2)]
        dropped = asyncio.create_task(pool.run(lambda: ran.append(1), 1))
        for _ in running:
            await asyncio.to_thread(begun.acquire)
        assert pool.waiting_s > 0
        dropped.cancel()
        await asyncio.wait((dropped,))
        assert pool.waiting_s == 0
        assert pool.lag_s > 0
        ended.set()
        await asyncio.gather(*running)
        await pool.run(int, 1)
        assert not ran
        assert pool.lag_s == 0
        pool.close()

    asyncio.run(scenario())


def test_panic_is_an_error():
    class PanicException(BaseException):
        """As the tokenizers' library raises."""

    def panic():
        raise PanicException("regex")

    async def scenario():
        pool = TokenizerPool()
        with pytest.raises(RuntimeError, match="tokenizing failed: PanicException"):
            await pool.run(panic, 1)
        assert await pool.run(lambda: 7, 1) == 7, "the thread goes on"
        pool.close()

    asyncio.run(scenario())


def test_too_long_prompts_are_not_tokenized(client, monkeypatch):
    monkeypatch.setattr(service, "preprocess", lambda *_: pytest.fail("it was tokenized"))
    long = "w1 " * 10_000
    for path, body, param in (
        ("/generate", {"prompt": long}, "prompt"),
        ("/generate", {"prompt": ["w1", long]}, "prompt.1"),
        ("/v1/completions", {"prompt": long}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}, "messages"),
    ):
        error = client.post(path, json=body).json()["error"]
        assert error["param"] == param
        assert "has 30000 characters, this server takes at most 16384" in error["message"].replace("30004", "30000")


def test_limit_of_characters():
    job = GenerationJob(("ab", RawText("abc"), [{"role": "u", "content": "abc"}]), names=FieldNames({"prompt": "text"}))
    assert check_characters(job, ServerSettings(max_prompt_chars=4), 8) == 9
    with pytest.raises(RequestError, match="prompt 2: text has 4 characters, this server takes at most 3") as error:
        check_characters(job, ServerSettings(max_prompt_chars=3), 8)
    assert error.value.param == "text.2"
    limit = preprocess._CHARACTERS_PER_POSITION * 4096
    assert check_characters(GenerationJob(("x" * limit,)), ServerSettings(), 4096) == limit


def test_blocked_tokenizer_is_not_ready(engine, monkeypatch, blocked):
    work, ended = blocked
    monkeypatch.setattr(service, "preprocess", lambda *_: work())
    settings = ServerSettings(stall_timeout_s=0.2, request_timeout_s=20)
    with TestClient(create_app(settings, engine)) as client:
        pool = client.app.state.service.tokenizers
        sending = [threading.Thread(target=client.post, args=("/generate",), kwargs={"json": BODY}) for _ in range(3)]
        for each in sending:
            each.start()
        deadline = time.monotonic() + 10
        while pool.waiting_s < 0.2 and time.monotonic() < deadline:
            time.sleep(0.01)
        ready = client.get("/readyz")
        assert (ready.status_code, "the tokenizer makes no progress" in ready.text) == (503, True)
        assert client.get("/livez").status_code == 200
        assert sample(client, "slr_tokenizer_lag_seconds") >= 0.2
        monkeypatch.undo()
        ended.set()
        for each in sending:
            each.join()
        assert client.get("/readyz").status_code == 200


def test_event_loop_lag():
    async def scenario():
        lag = LoopLag()
        watching = asyncio.create_task(lag.watch())
        await asyncio.sleep(0)
        time.sleep(0.3)
        await asyncio.sleep(0.05)
        watching.cancel()
        assert 0.1 < lag.seconds < 5

    asyncio.run(scenario())
