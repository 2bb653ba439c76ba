import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from slr_core.errors import RequestError
from slr_core.generation.prepare import prepare
from tests import tiny


def test_panic_of_the_tokenizer_is_a_request_error():
    made = tiny.reasoner()
    encoding = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    encoding.pre_tokenizer = Split(Regex("(a+)+$"), "isolated")
    made.tokenizer = PreTrainedTokenizerFast(tokenizer_object=encoding, unk_token="<unk>")
    with pytest.raises(RequestError, match=r"the tokenizer cannot process this prompt: .*retry-limit"):
        prepare(made, "a" * 40 + "b")


@pytest.mark.parametrize("name", ["top_tokens", "logprobs", "trace_tokens"])
def test_negative_counts_are_refused(name):
    made = tiny.reasoner(loop={"workspace": "token"})
    with pytest.raises(RequestError, match=f"{name} must not be negative, got -1") as caught:
        prepare(made, "w1", **{name: -1})
    assert caught.value.param == name
