"""Tiny reasoners of every architecture and workspace."""

import pytest

from tests import tiny

EVERY = [(kind, workspace) for kind in tiny.KINDS for workspace in tiny.WORKSPACES]


@pytest.fixture(scope="session", params=EVERY, ids="-".join)
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
