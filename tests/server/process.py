"""A server in its own process, with a checkpoint from a folder, over sockets."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families


@contextmanager
def default_hangup() -> Iterator[None]:
    """Let servers that are started meanwhile end on SIGHUP: below ``nohup`` they would ignore it. Main thread only."""
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, inherited)


class Server:
    """A server process.

    Args:
        folder: the checkpoint.
        log: file for standard error.
        flags: of ``slr-serve``.
        module: the module to run.
        key: an API key, for :meth:`metrics`.
        stderr: where standard error goes instead of to the log.
        stdout: where standard output goes; the server must then have a known port.
        environment: additional environment variables.
    """

    def __init__(
        self,
        folder: Path,
        log: Path,
        *flags: str,
        module: str = "slr_server.cli",
        key: str | None = None,
        stderr: int | None = None,
        stdout: int = subprocess.PIPE,
        **environment: str,
    ) -> None:
        self.log, self.key = log, key
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, "--model", str(folder), "--port", "0", "--threads", "1", *flags],
                env={**os.environ, **environment},
                stdout=stdout,
                stderr=file if stderr is None else stderr,
                text=True,
            )
        self.line = "" if self.process.stdout is None else self.process.stdout.readline()
        self.url = self.line.split()[-1] if self.line else ""

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()

    def metrics(self) -> dict[str, float]:
        """Samples by name; with labels, by ``name{value,...}``."""
        headers = {} if self.key is None else {"authorization": f"Bearer {self.key}"}
        text = httpx.get(f"{self.url}/metrics", headers=headers, timeout=30).text
        return {
            s.name + (f"{{{','.join(s.labels.values())}}}" if s.labels else ""): s.value
            for family in text_string_to_metric_families(text)
            for s in family.samples
        }

    def until(self, condition) -> None:
        """Wait until a condition holds; fails after a minute."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.005)

    def idle(self) -> None:
        """Wait until no request is left; fails if one is leaked."""
        gauges = ("slr_slots_in_use", "slr_requests_queued", "slr_requests_in_flight")
        self.until(lambda: not any(map(self.metrics().__getitem__, gauges)))

    @property
    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    @property
    def resident_mib(self) -> float:
        with open(f"/proc/{self.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
