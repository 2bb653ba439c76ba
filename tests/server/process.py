"""A real server: its own process, a checkpoint from a folder, sockets."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families


class Server:
    """A server that runs until it is stopped.

    Args:
        folder: its checkpoint.
        log: where its standard error goes.
        flags: of ``slr-serve``.
        module: what is run in place of ``server.cli``.
        environment: variables besides our own.
    """

    def __init__(
        self, folder: Path, log: Path, *flags: str, module: str = "slr_server.cli", **environment: str
    ) -> None:
        # A file, because a pipe that nobody reads would fill up and stop the server.
        self.log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, "--model", str(folder), "--port", "0", "--threads", "1", *flags],
                env={**os.environ, **environment},
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self.line = self.process.stdout.readline()
        self.url = self.line.split()[-1] if self.line else ""

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def metrics(self) -> dict[str, float]:
        """Samples without labels by name, those with labels as ``name{value,...}``."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        return {
            s.name + (f"{{{','.join(s.labels.values())}}}" if s.labels else ""): s.value
            for family in text_string_to_metric_families(text)
            for s in family.samples
        }

    def until(self, condition) -> None:
        """Wait for something that ends by itself."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.005)

    def idle(self) -> None:
        """Wait until nothing is left of any request; what stays is a leak, and fails."""
        gauges = ("slr_slots_in_use", "slr_requests_queued", "slr_requests_in_flight")
        self.until(lambda: not any(map(self.metrics().__getitem__, gauges)))

    @property
    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    @property
    def resident_mib(self) -> float:
        with open(f"/proc/{self.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
