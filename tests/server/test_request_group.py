"""Events on their way from the engine's thread to the event loop."""

import asyncio
import threading
import time
from concurrent.futures import Future

from slr_core.engine.events import TokenEvent
from slr_server.request_group import AdmittedRequest, RequestGroup

EVENTS, BURSTS = 50, 20


class Submitted:
    """An engine that keeps what is submitted."""

    def submit(self, request, *, on_event, **options):
        self.on_event = on_event
        return Future()


def test_events_of_a_step_wake_the_loop_once(monkeypatch):
    async def scenario():
        loop, wakes, engine = asyncio.get_running_loop(), [], Submitted()
        wake = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *call: (wakes.append(call), wake(*call)))

        def work():
            for burst in range(BURSTS):
                for i in range(EVENTS):
                    engine.on_event(TokenEvent(burst * EVENTS + i, ""))
                time.sleep(0.001)  # a step

        options = {"loop_set": None, "stream": True, "deadline": time.monotonic() + 60, "limit_s": 60.0}
        with RequestGroup(engine, [AdmittedRequest(None, False)], on_done=lambda *_: None, **options) as group:
            for i in range(EVENTS):  # while the loop does something else
                engine.on_event(TokenEvent(i, ""))
            assert len(wakes) == 1
            assert [(await anext(group)).event.token_id for _ in range(EVENTS)] == list(range(EVENTS))
            thread = threading.Thread(target=work)
            thread.start()
            seen = [(await anext(group)).event.token_id for _ in range(BURSTS * EVENTS)]
            thread.join()
        assert seen == list(range(BURSTS * EVENTS))

    asyncio.run(scenario())
