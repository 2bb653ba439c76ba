"""Work on threads of its own, one piece at a time."""

import asyncio
import threading

import pytest

from slr_server import threads
from slr_server.threads import SerialWorker


def test_serial_worker(monkeypatch):
    gate, begun = threading.Event(), []

    def work(name):
        begun.append(name)
        gate.wait(10)
        return name

    async def scenario():
        worker = SerialWorker()
        first, dropped, last = (asyncio.create_task(worker.run(lambda name=name: work(name))) for name in "abc")
        while not begun:
            await asyncio.sleep(0.001)
        first.cancel()
        dropped.cancel()
        await asyncio.wait((first, dropped))
        await asyncio.sleep(0.01)
        assert begun == ["a"]  # it is cancelled, but its thread still runs
        gate.set()
        assert await last == "c"
        assert begun == ["a", "c"]

        with monkeypatch.context() as patch:
            patch.setattr(threads, "start_daemon", refuse)
            with pytest.raises(RuntimeError):
                await worker.run(lambda: work("d"))
        assert await worker.run(lambda: work("e")) == "e"

    def refuse(work):
        raise RuntimeError("can't start new thread")

    asyncio.run(scenario())
