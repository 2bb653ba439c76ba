import time

from hypothesis import example, given
from hypothesis import strategies as st

from slr_core.generation.decoding import DecodeState
from slr_core.generation.stop_strings import StopStringFinder
from tests import tiny

LETTERS = "ab\ufffd"
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=4)
EDITS = st.lists(st.tuples(st.integers(0, 6), st.text(LETTERS, max_size=5)), max_size=12)
"""How many characters at the end are rewritten, and what comes in their place."""


def defined(text, stops, start):
    """Position and number of begun characters, by definition."""
    found = [at for stop in stops if (at := text.find(stop, start)) >= 0]
    complete = text.rstrip("\ufffd")[start:]
    missing = [stop for stop in stops if stop not in complete]
    begun = [n for stop in missing for n in range(1, len(stop)) if complete.endswith(stop[:n])]
    return min(found, default=None), max(begun, default=0)


@given(STOPS, EDITS, st.integers(0, 4))
@example(["aab"], [(0, "aa"), (0, "ab")], 0)
@example(["ab", "b"], [(0, "a"), (0, "b")], 0)
@example(["a\ufffd"], [(0, "a\ufffd"), (1, "b")], 0)
@example(["ab"], [(0, "ab"), (1, "a"), (1, "b")], 0)
def test_equals_definition(stops, edits, start):
    finder, text = StopStringFinder(stops, start), ""
    for rewritten, piece in edits:
        text = text[: max(0, len(text) - rewritten)] + piece
        finder.read(text)
        assert (finder.position, finder.begun) == defined(text, stops, start)


class Decoder:
    """Decodes token ``i`` to one letter, by appending to what it decoded before."""

    def __init__(self):
        self.text = ""
        self.backend_tokenizer, self.added_tokens_decoder = None, {}

    def decode(self, ids, skip_special_tokens):
        if len(ids) > len(self.text):
            self.text += "".join(chr(i) for i in ids[len(self.text) :])
        return self.text[: len(ids)]

    def convert_ids_to_tokens(self, token):
        return chr(token)


def streaming_s(stops, tokens=1500):
    """Processor time of a stream of ``a`` that no stop string ends."""
    made = tiny.reasoner()
    request = tiny.request(made, "w1", stop=stops, max_new_tokens=50)
    answer = DecodeState(made, request)
    answer.tokenizer = Decoder()
    began, parts = time.thread_time(), []
    for _ in range(tokens):
        answer.finish_reason = None
        answer.tokens.append(ord("a"))
        parts.append(answer.new_text())
    return time.thread_time() - began, "".join(parts)


def test_cost_of_a_token():
    # The worst case: every string has begun, and none ends.
    stops = tuple("a" * 255 + chr(ord("b") + i) for i in range(16))
    streaming_s(stops, 1)
    (without, _), (long, text) = streaming_s(()), streaming_s(stops)
    assert text == "a" * (1500 - 255)
    assert long < without + 0.15, "0.1 ms a token; prefix by prefix it is 1 ms"
