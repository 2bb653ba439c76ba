import pytest

from tests import tiny

WORDS_BLOCK = {
    "workspace": "block",
    "block_size": 3,
    "decoder": {"latent_decoder": {"hidden_size": 16, "heads": 2, "max_thought_tokens": 4}},
}
TEMPLATE = "{% for m in messages %}w1 {{ m.content }} {% endfor %}w2"


@pytest.fixture(scope="session")
def thinking():
    """A block that a latent decoder puts into words, with a chat template."""
    return tiny.reasoner(loop=WORDS_BLOCK, text={"chat_template": TEMPLATE})


@pytest.fixture(scope="session")
def block(thinking, tmp_path_factory):
    """Its checkpoint."""
    folder = tmp_path_factory.mktemp("cli") / "thinking"
    thinking.save_pretrained(str(folder))
    return str(folder)
