"""The engine and its process: threads that it leaves to others, forks, the end. Each in a process of its own."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc, and processes forked")

SETTING = '''
import os, sys, threading, time
import torch
from slr_core.engine import Engine
from slr_core.engine.runner.device import release_workers
from slr_core.errors import EngineError
from tests import tiny

count = lambda: len(os.listdir("/proc/self/task"))
add = lambda: torch.ones(1_000_000).add_(1).sum().item()

def settles(most, least=None):
    """Whether there come to be so many threads: some are still ending."""
    until = time.monotonic() + 10
    while not (least or most) <= count() <= most and time.monotonic() < until:
        time.sleep(0.01)
    return (least or most) <= count() <= most

def elsewhere(run):
    got = []
    thread = threading.Thread(target=lambda: got.append(run()))
    thread.start()
    thread.join()
    return got[0]

made = tiny.reasoner()
request = tiny.request(made, "w1 w2", {"max_iterations": 2, "criterion": "fixed"})
'''


def run(script, code=0):
    done = subprocess.run([sys.executable, "-c", SETTING + script], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.slow
def test_engine_leaves_no_idle_workers():
    done = run("""
torch.set_num_threads(4)
before = count()
add()
assert settles(before + 3)
release_workers()
assert settles(before), count() - before
assert add() == 2_000_000  # it gets others
for threads in (None, 1, 2):
    add()
    with Engine(made, slots=2, threads=threads) as engine:
        for _ in range(2):
            # Its own thread, and what it computes with beside it.
            assert settles(before + engine.threads, before + 1), (threads, engine.threads, count() - before)
            engine.submit(request).result()
        number = torch.get_num_threads
        numbers = number(), elsewhere(number), engine._thread.call(number)
        assert numbers == (4, 4, threads or engine.threads), (threads, numbers)
    release_workers()
    assert settles(before), count() - before
print("fine")
""")
    assert done.stdout == "fine\n"


@pytest.mark.slow
def test_forked_process():
    done = run("""
torch.set_num_threads(2)
add()
with Engine(made, slots=2, threads=1) as engine:
    text = engine.submit(request).result().text
    add()
    child = os.fork()
    if not child:
        try:
            engine.submit(request)
        except EngineError as error:
            assert "forked" in str(error), error
            with Engine(made, slots=2, threads=1) as own:
                assert own.submit(request).result(60).text == text
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert engine.submit(request).result().text == text
print("fine")
""")
    assert done.stdout == "fine\n"


@pytest.mark.slow
def test_forks_under_load():
    # A fork copies locks as they are: held by a thread that the child does not have.
    done = run("""
import signal
ended = False
def load():
    while not ended:
        engine.submit(request).result()

def refused(call):
    try:
        call()
    except EngineError as error:
        assert "forked" in str(error), error
        return True

def fork():
    child = os.fork()
    if not child:
        signal.alarm(20)
        calls = (
            lambda: engine.submit(request), lambda: engine.generate("w1"), lambda: engine.prepare("w1"),
            lambda: next(engine.stream("w1")), lambda: engine.queued, lambda: engine.load_loop_set("a", "/nowhere/a"),
            lambda: engine.remove_loop_set("a"),
        )
        fine = all([refused(call) for call in calls]) and not engine.alive
        engine.close()
        os._exit(7 if fine else 1)
    return child

def ends(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

with Engine(made, slots=2, threads=1) as engine:
    locks = engine._thread._changed, engine._adapter_sets._lock
    for lock in locks:
        lock.acquire()
    child = elsewhere(fork)
    for lock in locks:
        lock.release()
    assert ends(child) == 7
    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert [ends(fork()) for _ in range(20)] == [7] * 20
    ended = True
    for thread in threads:
        thread.join()
print("fine")
""")
    assert done.stdout == "fine\n"


@pytest.mark.slow
@pytest.mark.parametrize(("end", "code"), [("", 0), ("raise ValueError('mine')", 1)])
def test_exit_status_with_a_running_engine(end, code):
    done = run(
        f"""
made = tiny.reasoner(loop=tiny.WORKSPACES["block"])
endless = tiny.request(made, "w1 w2", {{"max_iterations": 1_000_000, "criterion": "fixed"}}, max_new_tokens=1)
engine = Engine(made, slots=2, threads=1)
endless = [engine.submit(endless) for _ in range(2)]
while not engine.in_flight:
    time.sleep(0.01)
{end}
""",
        code,
    )
    assert "terminate called" not in done.stderr
    assert ("ValueError: mine" in done.stderr) == bool(end)
