"""Tiny reasoners of every architecture and workspace."""

import pytest

from tests import tiny

EVERY = [(kind, workspace) for kind in tiny.KINDS for workspace in tiny.WORKSPACES]


def in_turn(kind, workspace, *values, turn=0):
    """A parameter that is quick in one workspace only, another for the next architecture or turn; else slow."""
    is_quick = list(tiny.WORKSPACES).index(workspace) == (tiny.KINDS.index(kind) + turn) % len(tiny.WORKSPACES)
    return pytest.param((kind, workspace, *values), marks=() if is_quick else pytest.mark.slow)


@pytest.fixture(scope="session", params=[in_turn(*pair) for pair in EVERY], ids="-".join)
def kind_and_workspace(request):
    return request.param


@pytest.fixture(scope="session")
def kind(kind_and_workspace):
    return kind_and_workspace[0]


@pytest.fixture(scope="session")
def loop(kind_and_workspace):
    """The loop changes that make the workspace."""
    return tiny.WORKSPACES[kind_and_workspace[1]]


@pytest.fixture(scope="session")
def saved(kind, loop, tmp_path_factory):
    """A reasoner with an adapter `decode`, and its checkpoint folder."""
    folder = tmp_path_factory.mktemp(kind) / "checkpoint"
    made = tiny.reasoner(kind, loop, decode=True)
    made.save_pretrained(str(folder))
    return made, folder
