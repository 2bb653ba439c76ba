"""Requests that are cut, paused and refused at random, while loop adapter sets are replaced and servers get signals.

Every answer must be a known one, and in the end nothing may be left of all this. It starts its own servers.
"""

import asyncio
import json
import random
import signal
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from slr_core.generation.reference import generate
from slr_core.reasoner import LatentReasoner
from tests import tiny
from tests.hostile.wire import head, request
from tests.server import events
from tests.server.process import Server, default_hangup

KEY, ADMIN = "k" * 20, "a" * 20
CLIENTS, SLOTS, QUEUE, ITERATIONS, TOKENS = 24, 4, 40, 4, 6
LOST_S = 180.0
"""A request without a response for so long is lost: the server's own limit is 120 s."""
SETTLE_S = 6.0
"""Seconds without load before memory is read."""
NAME, MODEL = "swapped", "tiny"

Known = dict[tuple[str, str, int], str]
"""The right answer by loop adapter set, prompt and iterations."""


class Sample(NamedTuple):
    """Resources of the server while it is idle."""

    memory_mib: float
    descriptors: int


class Churn(NamedTuple):
    """What a churn has done, and what was left of it.

    Attributes:
        outcomes: number of requests by kind and outcome.
        faults: answers and outcomes that are wrong, in words.
        events: number of signals, restarts, loads and removals.
        left: slots, requests and bodies that are still in use.
        warm: after a tenth of the requests.
        after: in the end.
    """

    outcomes: Counter[str]
    faults: list[str]
    events: Counter[str]
    left: dict[str, float]
    warm: Sample
    after: Sample

    @property
    def violations(self) -> list[str]:
        """All that should not be."""
        found = [*self.faults, *(f"{name} is {value:g}" for name, value in self.left.items() if value)]
        if self.after.memory_mib > 1.1 * self.warm.memory_mib:
            found.append("memory has grown by more than a tenth")
        if self.after.descriptors > self.warm.descriptors:
            found.append("descriptors are left open")
        return found

    def __str__(self) -> str:
        lines = ["# Churn", "", f"`python -m tests.hostile churn --requests {sum(self.outcomes.values())}`", ""]
        lines += ["| request | outcome | number |", "|---|---|---|"]
        lines += [f"| {' | '.join(name.split(': '))} | {n} |" for name, n in sorted(self.outcomes.items())]
        lines += [
            "",
            "| meanwhile | number |",
            "|---|---|",
            *(f"| {k} | {n} |" for k, n in sorted(self.events.items())),
        ]
        lines += ["", "| in the end | |", "|---|---|"]
        lines += [f"| {name} | {value:g} |" for name, value in self.left.items()]
        lines.append(f"| memory, MiB | {self.warm.memory_mib:.1f} warm, {self.after.memory_mib:.1f} after |")
        lines.append(f"| descriptors | {self.warm.descriptors} warm, {self.after.descriptors} after |")
        wrong = "; ".join(f"{n} x {fault}" for fault, n in Counter(self.violations).items())
        lines.append(f"| wrong | {wrong or 'nothing'} |")
        return "\n".join(lines) + "\n"


def churn(requests: int = 20_000, seed: int = 0, out: str = "") -> Churn:
    """Send requests to a server while it and another one get signals.

    Args:
        requests: how many.
        seed: of all random choices.
        out: a Markdown file for the result.
    """
    with tempfile.TemporaryDirectory() as folder, default_hangup():
        result = _run(Path(folder), requests, random.Random(seed))
    if out:
        Path(out).write_text(str(result))
    return result


def _run(folder: Path, requests: int, random_: random.Random) -> Churn:
    known = _make_checkpoints(folder)
    keys = folder / "keys"
    keys.write_text(KEY)
    limits = ("--slots", str(SLOTS), "--max-queue", str(QUEUE), "--elastic-floor", "1", "--log-level", "error")
    own = ("--api-keys-file", str(keys), "--admin-key", ADMIN, "--loop-sets", str(folder / "sets"))
    server = Server(folder / MODEL, folder / "log", *limits, *own, key=KEY)
    others = [Server(folder / MODEL, folder / "other log", *limits)]
    load = _Load(folder, server, others, known, random_)
    try:
        asyncio.run(load.run(max(1, requests // 10)))
        warm = _sample(server)
        asyncio.run(load.run(requests - max(1, requests // 10)))
        after = _sample(server)
        metrics = server.metrics()
        left = {name: metrics[f"slr_{name}"] for name in ("slots_in_use", "requests_queued", "requests_in_flight")}
        left["connections"] = metrics["slr_connections"] - 1  # that of this scrape
        if code := server.stop():
            load.faults.append(f"the server ended with status {code}: {server.log.read_text()[-2000:]}")
        if "Traceback" in (log := server.log.read_text()):
            load.faults.append(f"the server's log: {log[log.index('Traceback') :][:3000]}")
    finally:
        for each in (server, *others):
            each.kill()
    return Churn(load.outcomes, load.faults, load.events, left, warm, after)


def _sample(server: Server) -> Sample:
    time.sleep(SETTLE_S)
    server.idle()
    return Sample(server.resident_mib, server.descriptors)


def _make_checkpoints(folder: Path) -> Known:
    """The served checkpoint and two loop adapter sets with texts of their own; with their answers."""
    made = tiny.reasoner()
    sets = {MODEL: made}
    for seed, name in enumerate(("a", "b"), 7):
        sets[name] = tiny.twin(made)
        tiny.shake(sets[name], seed=seed)
        text = made.config.text.model_copy(update={"prompt_prefix": tiny.words(seed, seed + 20) + " "})
        sets[name].config = made.config.model_copy(update={"text": text})
    for name, each in sets.items():
        each.save_pretrained(str(folder / name))
    (folder / "sets").mkdir()
    known = {(name, *key): text for name, each in sets.items() for key, text in _answers(each).items()}
    differing = sum(known["a", *key] != known["b", *key] for key in _answers_of(known, "a"))
    assert differing > len(known) / 6, "the sets must be told apart by their answers"
    return known


def _answers_of(known: Known, name: str) -> list[tuple[str, int]]:
    return [(prompt, iterations) for made, prompt, iterations in known if made == name]


def _answers(made: LatentReasoner) -> dict[tuple[str, int], str]:
    cases = [(prompt, iterations) for prompt in tiny.PROMPTS for iterations in range(ITERATIONS + 1)]
    loops = [{"max_iterations": iterations, "criterion": "fixed"} for _, iterations in cases]
    requests = [
        tiny.request(made, prompt, loop, max_new_tokens=TOKENS) for (prompt, _), loop in zip(cases, loops, strict=True)
    ]
    return {case: result.text for case, result in zip(cases, generate(made, requests), strict=True)}


# -- one request -------------------------------------------------------------------------------------------


class _Cut(Exception):
    """This client has left."""


class _Wire:
    """A connection that speaks HTTP badly on purpose."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, url: str) -> "_Wire":
        parts = urlsplit(url)
        return cls(*await asyncio.open_connection(parts.hostname, parts.port))

    async def response(self) -> tuple[int, bool, bytes]:
        """Status, whether the connection stays open, and body."""
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:] if line)
        if headers.get("transfer-encoding") == "chunked":
            parts = []
            while size := int(await self.reader.readline(), 16):
                parts.append(await self.reader.readexactly(size))
                await self.reader.readline()
            await self.reader.readline()
            body = b"".join(parts)
        else:
            body = await self.reader.readexactly(int(headers["content-length"]))
        return int(lines[0].split()[1]), headers.get("connection") != "close", body

    def reset(self) -> None:
        """Close without the usual goodbye, as after a crash."""
        raw = self.writer.get_extra_info("socket")
        with suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self.writer.transport.abort()


class _Load:
    """The clients, and those who disturb them."""

    def __init__(
        self, folder: Path, server: Server, others: list[Server], known: Known, random_: random.Random
    ) -> None:
        self.folder, self.server, self.others, self.known, self.random = folder, server, others, known, random_
        self.outcomes: Counter[str] = Counter()
        self.events: Counter[str] = Counter()
        self.faults: list[str] = []
        self._left = 0
        self._swaps = 0

    async def run(self, requests: int) -> None:
        """Send requests; the disturbances end with the last one."""
        self._left = requests
        disturbing = [asyncio.create_task(each()) for each in (self._pause, self._reload_keys, self._swap_sets)]
        stop = asyncio.Event()
        second = asyncio.create_task(self._signal_other(stop))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(CLIENTS):
                    group.create_task(self._client())
        finally:
            stop.set()
            for task in disturbing:
                task.cancel()
            ended = await asyncio.gather(*disturbing, second, return_exceptions=True)
            self.server.process.send_signal(signal.SIGCONT)
        self.faults += [f"a disturbance failed: {error!r}" for error in ended if isinstance(error, Exception)]

    async def _client(self) -> None:
        wire: _Wire | None = None
        while self._left > 0:
            self._left -= 1
            kind = self.random.choices(tuple(KINDS), [weight for weight, _ in KINDS.values()])[0]
            if wire is None or self.random.random() < 0.5:
                if wire is not None:
                    wire.writer.close()
                wire = await _Wire.open(self.server.url)
            stays = False
            try:
                async with asyncio.timeout(LOST_S):
                    outcome, stays = await KINDS[kind][1](self, wire)
            except _Cut:
                outcome = "cut"
            except (OSError, EOFError, ValueError) as error:
                outcome = f"lost ({type(error).__name__})"
                self.faults.append(f"{kind}: {outcome} {error}")
            self.outcomes[f"{kind}: {outcome}"] += 1
            if not stays:
                wire.reset() if self.random.random() < 0.3 else wire.writer.close()
                wire = None
        if wire is not None:
            wire.writer.close()

    def _ask(self, **more: Any) -> tuple[dict[str, Any], list[tuple[str, int]]]:
        """A body, and the keys of its answers."""
        iterations = self.random.randrange(ITERATIONS + 1)
        prompts = self.random.sample(tiny.PROMPTS, self.random.choice((1, 1, 1, 2, 4)))
        body = {"max_iterations": iterations, "convergence": {"criterion": "fixed"}, "max_new_tokens": TOKENS}
        return {"prompt": prompts, **body, **more}, [(prompt, iterations) for prompt in prompts]

    def _check(self, keys: list[tuple[str, int]], texts: list[str], names: tuple[str, ...] = (MODEL,)) -> None:
        if all(texts != [self.known[name, *key] for key in keys] for name in names):
            self.faults.append(f"wrong text: {texts} of {keys} by {names}")

    # Kinds of requests: each returns its outcome and whether the connection can be used again.

    async def _whole(
        self, wire: _Wire, body: dict[str, Any], keys: list[tuple[str, int]], names: tuple[str, ...] = (MODEL,)
    ) -> tuple[str, bool]:
        status, stays, content = await wire.response()
        if status == 200:
            texts = [result["text"] for result in json.loads(content)["results"]]
            self._check(keys, texts, names)
        elif status not in (429, *((400,) if NAME in names or "loop_set" in body else ())):
            self.faults.append(f"status {status}: {content[:300]!r}")
        return str(status), stays

    async def plain(self, wire: _Wire) -> tuple[str, bool]:
        """A request as any."""
        body, keys = self._ask()
        wire.writer.write(request("/generate", body, key=KEY))
        return await self._whole(wire, body, keys)

    async def swapped(self, wire: _Wire) -> tuple[str, bool]:
        """For a loop adapter set that others replace under its name: one set's texts and weights, or none's."""
        body, keys = self._ask(loop_set=NAME)
        wire.writer.write(request("/generate", body, key=KEY))
        return await self._whole(wire, body, keys, ("a", "b"))

    async def streamed(self, wire: _Wire) -> tuple[str, bool]:
        """All events of a stream."""
        body, keys = self._ask(stream=True)
        wire.writer.write(request("/generate", body, key=KEY))
        status, stays, content = await wire.response()
        if status == 200:
            parts = events.of(content.decode())
            whole, pieces = [""] * len(keys), [""] * len(keys)
            for event in parts:
                if event.name == "result":
                    whole[event.data["index"]] = event.data["text"]
                elif event.name == "token":
                    pieces[event.data["index"]] += event.data["text"]
            self._check(keys, whole)
            self._check(keys, pieces)
            if parts[-1].name != "done":
                self.faults.append(f"a stream ends with {parts[-1]}")
        elif status != 429:
            self.faults.append(f"status {status} of a stream")
        return str(status), stays

    async def paused(self, wire: _Wire) -> tuple[str, bool]:
        """A request that arrives in pieces, with pauses."""
        body, keys = self._ask()
        content = request("/generate", body, key=KEY)
        for at in range(0, len(content), 150):
            wire.writer.write(content[at : at + 150])
            await asyncio.sleep(self.random.random() * 0.03)
        return await self._whole(wire, body, keys)

    async def half_closed(self, wire: _Wire) -> tuple[str, bool]:
        """A client that ends its side of the connection after the request counts as gone."""
        body, _ = self._ask()
        wire.writer.write(request("/generate", body, key=KEY))
        wire.writer.write_eof()
        await wire.reader.read()
        raise _Cut

    async def cut_request(self, wire: _Wire) -> tuple[str, bool]:
        """Leave in the middle of the request."""
        content = request("/generate", self._ask()[0], key=KEY)
        wire.writer.write(content[: self.random.randrange(len(content))])
        await asyncio.sleep(self.random.random() * 0.02)
        raise _Cut

    async def cut_wait(self, wire: _Wire) -> tuple[str, bool]:
        """Leave before the answer, at times with bytes behind the request."""
        wire.writer.write(request(self.random.choice(("/generate", "/trace")), self._ask(n=2)[0], key=KEY))
        await asyncio.sleep(self.random.random() * 0.05)
        wire.writer.write(self.random.choice((b"", b"GET", b"\0\xff\r\n\r\n")))
        raise _Cut

    async def cut_stream(self, wire: _Wire) -> tuple[str, bool]:
        """Leave in the middle of a stream."""
        wire.writer.write(request("/generate", self._ask(stream=True, n=2)[0], key=KEY))
        with suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                for _ in range(self.random.randrange(4)):
                    await wire.reader.read(self.random.choice((1, 100, 1000)))
        raise _Cut

    async def refused(self, wire: _Wire) -> tuple[str, bool]:
        """A request with a fault."""
        faults: tuple[dict[str, Any], ...] = ({"n": -1}, {"prompt": 5}, {"seed": 1 << 70}, {"x": {}}, {"stop": [""]})
        wire.writer.write(request("/generate", self._ask()[0] | self.random.choice(faults), key=KEY))
        status, stays, content = await wire.response()
        if status not in (400, 429):
            self.faults.append(f"status {status} of a request with a fault: {content[:300]!r}")
        return str(status), stays

    async def garbage(self, wire: _Wire) -> tuple[str, bool]:
        """Bytes that are no request, or one without a key."""
        kind = self.random.randrange(3)
        bad = (b"\x16\x03\x01\r\n\r\n", head("/generate", "content-length: -3"), request("/generate", {"prompt": "w1"}))
        wire.writer.write(bad[kind])
        status, _, _ = await wire.response()
        if status != (400, 400, 401)[kind]:
            self.faults.append(f"status {status} of garbage {kind}")
        return str(status), False

    # -- disturbances ------------------------------------------------------------------------------

    async def _pause(self) -> None:
        """Stop the server's process for a moment, again and again."""
        while True:
            await asyncio.sleep(self.random.uniform(0.3, 2))
            self.server.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(self.random.uniform(0.01, 0.3))
            self.server.process.send_signal(signal.SIGCONT)
            self.events["the server is stopped and continued"] += 1

    async def _reload_keys(self) -> None:
        """Let the server read its keys again; a file with a fault changes nothing."""
        texts = (KEY, f"# new\n{'n' * 20}\n{KEY}\n", "short")
        while True:
            await asyncio.sleep(self.random.uniform(0.2, 1))
            (self.folder / "new").write_text(self.random.choice(texts))
            (self.folder / "new").replace(self.folder / "keys")
            self.server.process.send_signal(signal.SIGHUP)
            self.events["keys are read again"] += 1

    async def _swap_sets(self) -> None:
        """Replace a loop adapter set by another one under the same name."""
        link = self.folder / "sets" / NAME
        while True:
            await asyncio.sleep(self.random.random())
            removed = await self._administer("DELETE", f"/admin/loop_sets/{NAME}", None, (200, 404))
            self._swaps += 1
            (self.folder / "next").symlink_to(self.folder / "ab"[self._swaps % 2])
            (self.folder / "next").replace(link)
            loaded = await self._administer("POST", "/admin/loop_sets", {"name": NAME}, (200,))
            self.events["loop adapter sets are removed"] += removed == 200
            self.events["loop adapter sets are loaded"] += loaded == 200

    async def _administer(self, method: str, path: str, body: Any, expected: tuple[int, ...]) -> int:
        wire = await _Wire.open(self.server.url)
        content = b"" if body is None else json.dumps(body).encode()
        wire.writer.write(head(path, f"content-length: {len(content)}", method=method, key=ADMIN) + content)
        try:
            status, _, answer = await wire.response()
        finally:
            wire.writer.close()
        if status not in expected:
            self.faults.append(f"{method} {path}: {status} {answer[:300]!r}")
        return status

    async def _signal_other(self, stop: asyncio.Event) -> None:
        """End a second server under load by a random signal, and start it again."""
        flags, log = ("--slots", str(SLOTS), "--log-level", "error"), self.folder / "other log"
        while not stop.is_set() and (server := self.others[-1]).url:
            ended = asyncio.Event()
            asking = [asyncio.create_task(self._ask_other(server.url, ended)) for _ in range(4)]
            await asyncio.sleep(self.random.uniform(0.1, 1))
            sent = self.random.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL))
            server.process.send_signal(sent)
            if self.random.random() < 0.3:
                server.process.send_signal(sent)
            code = await asyncio.to_thread(server.process.wait, 60)
            ended.set()
            await asyncio.gather(*asking)
            self.events[f"a second server gets {sent.name}"] += 1
            if code != (-signal.SIGKILL if sent == signal.SIGKILL else 0):
                self.faults.append(f"after {sent.name}, the second server ends with {code}")
            server.kill()
            self.others[-1] = await asyncio.to_thread(Server, self.folder / MODEL, log, *flags)
        if not self.others[-1].url:
            self.faults.append(f"the second server does not start: {log.read_text()[-2000:]}")

    async def _ask_other(self, url: str, ended: asyncio.Event) -> None:
        while not ended.is_set():
            body, keys = self._ask()
            with suppress(OSError, EOFError):
                wire = await _Wire.open(url)
                try:
                    wire.writer.write(request("/generate", body))
                    status, _, content = await wire.response()
                finally:
                    wire.writer.close()
                if status == 200:
                    self._check(keys, [result["text"] for result in json.loads(content)["results"]])
                elif status not in (429, 503):
                    self.faults.append(f"status {status} of the second server: {content[:300]!r}")
            await asyncio.sleep(0.01)


KINDS: dict[str, tuple[int, Callable[[_Load, _Wire], Awaitable[tuple[str, bool]]]]] = {
    "plain": (25, _Load.plain),
    "swapped": (15, _Load.swapped),
    "streamed": (15, _Load.streamed),
    "paused": (5, _Load.paused),
    "half_closed": (5, _Load.half_closed),
    "cut_request": (8, _Load.cut_request),
    "cut_wait": (10, _Load.cut_wait),
    "cut_stream": (10, _Load.cut_stream),
    "refused": (4, _Load.refused),
    "garbage": (3, _Load.garbage),
}
"""Weights of the kinds of requests."""
