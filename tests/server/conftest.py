"""A tiny engine and the application around it, in process."""

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from slr_core.engine import Engine
from slr_core.reasoner import LatentReasoner
from slr_server.app import create_app
from slr_server.settings import ServerSettings
from tests import tiny
from tests.server.process import Server

for name in [name for name in os.environ if name.startswith("SLR_")]:
    del os.environ[name]


@pytest.fixture(scope="session")
def reasoner() -> LatentReasoner:
    """The engine's model. Tests that run a model themselves use ``reference``."""
    return tiny.reasoner()


@pytest.fixture(scope="session")
def reference(reasoner) -> LatentReasoner:
    return tiny.twin(reasoner)


@pytest.fixture(scope="session")
def engine(reasoner) -> Iterator[Engine]:
    with Engine(reasoner, threads=1) as made:
        yield made


@pytest.fixture
def app(engine) -> FastAPI:
    return create_app(ServerSettings(), engine)


@pytest.fixture
def client(app) -> Iterator[TestClient]:
    with TestClient(app) as made:
        yield made


@pytest.fixture(scope="module")
def shared_client(engine) -> Iterator[TestClient]:
    """One client for a module whose tests do not read metrics."""
    with TestClient(create_app(ServerSettings(), engine)) as made:
        yield made


@dataclass
class Gate:
    """Blocks a model before each forward pass until it is opened; can make a pass fail."""

    opened: threading.Event = field(default_factory=threading.Event)
    reached: threading.Event = field(default_factory=threading.Event)
    fail_next: bool = False

    def __call__(self, *_: object) -> None:
        self.reached.set()
        assert self.opened.wait(20)
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("secret of the engine")


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def gated(reasoner, gate) -> Iterator[Callable[..., TestClient]]:
    """Creates clients of a server whose engine is blocked by ``gate``; arguments are settings."""
    made = tiny.twin(reasoner)
    with Engine(made, slots=2, threads=1) as engine:
        engine.model.base_model.register_forward_pre_hook(gate)
        clients = []

        def build(**settings) -> TestClient:
            clients.append(TestClient(create_app(ServerSettings(**settings), engine)))
            return clients[-1].__enter__()

        yield build
        gate.opened.set()
        for client in clients:
            client.__exit__(None, None, None)


def sample(client: TestClient, name: str, **labels: str) -> float | None:
    """One sample of a server's metrics."""
    return client.app.state.service.metrics.registry.get_sample_value(name, labels)


KEY = "k" * 20


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, reasoner) -> Path:
    """The engine's model as a checkpoint folder."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    reasoner.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def guarded(tiny_checkpoint) -> Iterator[Server]:
    """A server in its own process, with a key and short time limits."""
    flags = ("--api-keys", KEY, "--head-timeout-s", "1", "--slots", "4")
    server = Server(tiny_checkpoint, tiny_checkpoint.parent / "guarded", *flags, key=KEY)
    yield server
    server.kill()
