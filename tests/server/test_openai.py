"""OpenAI's endpoints: forms of prompts, echo and log-probabilities against the base model, streams, ignored fields."""

import pytest
import torch
from fastapi.testclient import TestClient

from slr_core.engine import Engine
from slr_core.generation.reference import generate
from slr_core.types import Tokens
from slr_server.app import create_app
from slr_server.protocol.chat import ChatChunk, ChatCompletion
from slr_server.protocol.completions import Completion
from slr_server.settings import ServerSettings
from tests import tiny
from tests.server import events

PROMPT = "w9 w8 w7 w6 w5 w4"
IDS = tiny.ids(PROMPT)
GREEDY = {"temperature": 0, "max_tokens": 5}


@pytest.fixture
def client(shared_client):
    return shared_client


@pytest.fixture(scope="module")
def chatty():
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    return tiny.reasoner(text={"chat_template": template})


@pytest.fixture(scope="module")
def chat(chatty):
    with Engine(chatty, threads=1) as engine, TestClient(create_app(ServerSettings(), engine)) as client:
        yield client


def complete(client, **body):
    response = client.post("/v1/completions", json={**GREEDY, "prompt": PROMPT, **body})
    assert response.status_code == 200, response.text
    return Completion.model_validate_json(response.content, strict=True)


def expected(reference, loop=None, **options):
    options = {"max_new_tokens": 5, **options}
    return generate(reference, [tiny.request(reference, Tokens(tuple(IDS)), loop, **options)])[0]


def test_completion(client, reference):
    result = expected(reference)
    answer = complete(client)
    (choice,) = answer.choices
    assert (answer.object, answer.model) == ("text_completion", "prosqa")
    assert (choice.text, choice.finish_reason, choice.logprobs) == (result.text, result.finish_reason, None)
    assert (choice.slr.iterations, choice.slr.exit_reason) == (result.iterations, result.exit_reason)
    assert answer.usage.model_dump() == {"prompt_tokens": 6, "completion_tokens": 5, "total_tokens": 11}


@pytest.mark.parametrize("prompt", [PROMPT, [PROMPT], IDS, [IDS]])
def test_prompt_forms(client, reference, prompt):
    assert complete(client, prompt=prompt).choices[0].text == expected(reference).text


def test_batches_and_samples(client, reference):
    answer = complete(client, prompt=[IDS, tiny.ids("w1 w2")], n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in answer.choices]
    assert texts[0] == texts[1] == expected(reference).text
    assert texts[2] == texts[3] != texts[0]
    assert answer.usage.prompt_tokens == 8


def test_prompts_are_raw():
    made = tiny.reasoner(text={"prompt_prefix": "w1 ", "prompt_suffix": " w2", "answer_prefix": "w3"})
    plain = tiny.reasoner()
    with Engine(made, threads=1) as engine, TestClient(create_app(ServerSettings(), engine)) as client:
        assert complete(client).choices[0].text == expected(plain).text


def test_settings_of_the_loop(client, reference):
    result = expected(reference, {"max_iterations": 2, "criterion": "kl", "threshold": 0.5})
    choice = complete(client, slr={"max_iterations": 2, "convergence": {"criterion": "kl", "threshold": 0.5}}).choices[
        0
    ]
    assert (choice.text, choice.slr.iterations) == (result.text, result.iterations)


def plain(reference, ids):
    """Log-probabilities of the base model."""
    with torch.inference_mode(), reference.adapters.use(None):
        return reference.base(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)


def test_echo_logprobs(client, reference):
    (choice,) = complete(client, echo=True, logprobs=1, max_tokens=1).choices
    result = expected(reference, max_new_tokens=1)
    assert choice.text == f"{PROMPT}{result.text}"
    logprobs, by_hand = choice.logprobs, plain(reference, IDS)
    assert "".join(logprobs.tokens) == choice.text
    assert [token.strip() for token in logprobs.tokens] == [*PROMPT.split(), result.text]
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    assert logprobs.token_logprobs[1:6] == pytest.approx([float(by_hand[i, IDS[i + 1]]) for i in range(5)], abs=1e-4)
    for i in range(5):
        best = int(by_hand[i].argmax())
        top = logprobs.top_logprobs[i + 1]
        top = {token.strip(): value for token, value in top.items()}
        assert top[tiny.WORDS[best]] == pytest.approx(float(by_hand[i, best]), abs=1e-4)
        assert set(top) == {tiny.WORDS[best], PROMPT.split()[i + 1]}, "the token itself is always included"
    assert logprobs.text_offset[:3] == [0, 2, 5]
    assert logprobs.text_offset[6] == len(PROMPT)


def test_echo_with_loop_at(client, reference):
    (choice,) = complete(client, echo=True, logprobs=0, max_tokens=0, slr={"loop_at": 4}).choices
    request = tiny.request(
        reference, Tokens(tuple(IDS[:4])), max_new_tokens=1, logprobs=0, score_prompt=True, forced_ids=tuple(IDS[4:])
    )
    (result,) = generate(reference, [request])
    by_hand = [s.logprob for s in (*result.prompt_scores, *result.scores[:2])]
    assert choice.text == PROMPT
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(by_hand[1:], abs=1e-4)
    assert choice.logprobs.token_logprobs[:4] == pytest.approx(by_hand[:4], abs=1e-4)
    base = plain(reference, IDS)
    assert abs(choice.logprobs.token_logprobs[4] - float(base[3, IDS[4]])) > 1e-2, "the loop changes the score"
    # Without iterations there is no difference.
    (still,) = complete(client, echo=True, logprobs=0, max_tokens=0, slr={"loop_at": 4, "max_iterations": 0}).choices
    assert still.logprobs.token_logprobs[4] == pytest.approx(float(base[3, IDS[4]]), abs=1e-4)


def test_echoed_log_probabilities_are_limited(engine):
    """Also those of the part of the prompt that is run after the loop."""
    with TestClient(create_app(ServerSettings(max_response_values=30), engine)) as client:
        body = {"prompt": IDS, "max_tokens": 1, "echo": True, "logprobs": 5}
        for more in ({}, {"slr": {"loop_at": 1, "max_iterations": 1}}):
            response = client.post("/v1/completions", json=body | more)
            assert (response.status_code, response.json()["error"]["param"]) == (400, "logprobs"), more


def test_echo_of_token_ids_with_loop_at(client):
    answer = complete(client, prompt=IDS, echo=True, slr={"loop_at": 4}, max_tokens=2, logprobs=0)
    (choice,) = answer.choices
    assert choice.text.startswith(PROMPT)
    assert len(choice.logprobs.tokens) == 8
    assert answer.usage.model_dump() == {"prompt_tokens": 6, "completion_tokens": 2, "total_tokens": 8}


def test_echo_without_logprobs(client):
    (choice,) = complete(client, echo=True, max_tokens=0).choices
    assert (choice.text, choice.logprobs, choice.finish_reason) == (PROMPT, None, "length")


def test_logprobs(client, reference):
    (choice,) = complete(client, logprobs=3).choices
    result = expected(reference, logprobs=3)
    assert choice.logprobs.token_logprobs == pytest.approx([s.logprob for s in result.scores], abs=1e-4)
    assert all(len(top) == 3 for top in choice.logprobs.top_logprobs)


def chunks(response, kind):
    told = list(events.of(response.text))
    assert told[-1].data == "[DONE]"
    return [kind.model_validate(event.data) for event in told[:-1]]


@pytest.mark.parametrize("options", [{}, {"echo": True}, {"echo": True, "slr": {"loop_at": 3}}, {"logprobs": 2}])
def test_streamed_completion(client, options):
    body = {**GREEDY, "prompt": [PROMPT, "w1 w2 w3 w4"], "n": 2, **options}
    whole = complete(client, **body)
    response = client.post("/v1/completions", json={**body, "stream": True, "stream_options": {"include_usage": True}})
    parts = chunks(response, Completion)
    assert parts[-1].usage == whole.usage
    assert parts[-1].choices == []
    for choice in whole.choices:
        mine = [part.choices[0] for part in parts[:-1] if part.choices[0].index == choice.index]
        assert "".join(part.text for part in mine) == choice.text
        assert [part.finish_reason for part in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        assert mine[-1].slr.iterations == choice.slr.iterations
        if choice.logprobs:
            tokens = [token for part in mine if part.logprobs for token in part.logprobs.tokens]
            assert tokens == choice.logprobs.tokens
    assert len({part.id for part in parts}) == 1


def test_chat(chat, chatty):
    body = {"messages": [{"role": "user", "content": PROMPT}], **GREEDY}
    response = chat.post("/v1/chat/completions", json={**body, "logprobs": True, "top_logprobs": 2})
    answer = ChatCompletion.model_validate_json(response.content, strict=True)
    messages = [{"role": "user", "content": PROMPT}]
    (result,) = generate(chatty, [tiny.request(chatty, messages, max_new_tokens=5, logprobs=2)])
    (choice,) = answer.choices
    assert choice.message.content == result.text
    assert [one.logprob for one in choice.logprobs.content] == pytest.approx(
        [s.logprob for s in result.scores], abs=1e-4
    )
    assert all(len(one.top_logprobs) == 2 for one in choice.logprobs.content)
    assert bytes(choice.logprobs.content[0].bytes).decode() == choice.logprobs.content[0].token
    assert choice.slr.exit_reason == result.exit_reason
    assert answer.usage.completion_tokens == result.completion_tokens


def test_message_parts_and_developer_role(chat):
    parts = [{"type": "text", "text": "w9 w8 w7 "}, {"type": "text", "text": "w6 w5 w4"}]
    bodies = [
        {"messages": [{"role": "developer", "content": parts}], **GREEDY},
        {"messages": [{"role": "user", "content": PROMPT}], **GREEDY},
    ]
    texts = [chat.post("/v1/chat/completions", json=b).json()["choices"][0]["message"]["content"] for b in bodies]
    assert texts[0] == texts[1]


def test_streamed_chat(chat):
    body = {"messages": [{"role": "user", "content": PROMPT}], **GREEDY, "n": 2, "logprobs": True}
    whole = chat.post("/v1/chat/completions", json=body).json()
    response = chat.post("/v1/chat/completions", json={**body, "stream": True})
    parts = chunks(response, ChatChunk)
    for chunk in list(events.of(response.text))[:-1]:
        (choice,) = chunk.data["choices"]
        assert "usage" not in chunk.data
        assert None not in choice["delta"].values()
        assert ("slr" in choice) == (choice["finish_reason"] is not None)
    for choice in whole["choices"]:
        mine = [part.choices[0] for part in parts if part.choices[0].index == choice["index"]]
        assert mine[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in mine) == choice["message"]["content"]
        assert mine[-1].finish_reason == choice["finish_reason"]
        assert sum(len(part.logprobs.content) for part in mine if part.logprobs) == 5


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_usage_is_null_up_to_the_last_chunk_if_it_is_asked_for(chat, path):
    asked = {"messages": [{"role": "user", "content": PROMPT}]} if "chat" in path else {"prompt": PROMPT}
    for options in ({}, {"stream_options": {"include_usage": True}}):
        told = [event.data for event in events.of(chat.post(path, json={**asked, "stream": True, **options}).text)][:-1]
        if not options:
            assert all("usage" not in data for data in told)
        else:
            assert [data["usage"] is None for data in told] == [True] * (len(told) - 1) + [False]


def test_models(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "prosqa"
    assert client.get("/v1/models/prosqa").json() == model
    assert client.get("/v1/models/gpt-5").status_code == 404
    assert complete(client, model="prosqa").model == "prosqa"
    assert client.post("/v1/completions", json={"prompt": "w1", "model": "gpt-5"}).status_code == 404


def test_default_temperature(client):
    asked = {"temperature": None, "max_tokens": 12}
    texts = {complete(client, seed=seed, **asked).choices[0].text for seed in range(4)}
    assert len(texts) > 1
    assert len({complete(client, seed=1, **asked).choices[0].text for _ in range(2)}) == 1


IGNORED = [
    {"store": True},
    {"store": False},
    {"metadata": {"a": "b"}},
    {"service_tier": "auto"},
    {"service_tier": "default"},
    {"user": "someone"},
    {"safety_identifier": "x"},
    {"prompt_cache_key": "x"},
    {"stream_options": {"continuous_usage_stats": False, "include_obfuscation": True}},
    {"logit_bias": {}},
    {"frequency_penalty": 0, "presence_penalty": 0.0},
]
IGNORED_IN_CHATS = [
    {"parallel_tool_calls": True},
    {"parallel_tool_calls": False},
    {"tools": [], "tool_choice": "auto"},
    {"tool_choice": "none"},
    {"reasoning_effort": "medium"},
    {"modalities": ["text"]},
    {"response_format": {"type": "text"}},
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"chat_template_kwargs": {}},
]


def text_of(response):
    """The text of a completion or a chat, whole or streamed."""
    assert response.status_code == 200, response.text
    if not response.headers["content-type"].startswith("text/event-stream"):
        return text_of_json(response.json())
    told = [event.data["choices"][0] for event in events.of(response.text)[:-1]]
    return "".join((c["text"] if "text" in c else c["delta"].get("content", "")) for c in told)


@pytest.mark.parametrize("fields", IGNORED, ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_ignored_fields_in_completions(client, fields, stream):
    if not stream and "stream_options" in fields:
        fields = {"stream_options": None}
    body = {"prompt": PROMPT, **GREEDY, "stream": stream}
    assert text_of(client.post("/v1/completions", json={**body, **fields})) == complete(client).choices[0].text
    null = dict.fromkeys(fields)
    assert client.post("/v1/completions", json={**body, **null}).status_code == 200


@pytest.mark.parametrize("fields", [*IGNORED, *IGNORED_IN_CHATS], ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_ignored_fields_in_chats(chat, fields, stream):
    if not stream and "stream_options" in fields:
        fields = {"stream_options": None}
    body = {"messages": [{"role": "user", "content": PROMPT}], **GREEDY}
    plain = text_of(chat.post("/v1/chat/completions", json=body))
    assert text_of(chat.post("/v1/chat/completions", json={**body, **fields, "stream": stream})) == plain
    null = dict.fromkeys(fields)
    assert chat.post("/v1/chat/completions", json={**body, **null}).status_code == 200


def test_answer_as_message(chat):
    question = {"role": "user", "content": "w9 w8"}
    answer = chat.post("/v1/chat/completions", json={"messages": [question], **GREEDY}).json()["choices"][0]["message"]
    known = {"id": "msg_1", "name": "a", "reasoning_content": "w30 w31", "refusal": None, "audio": None}
    known |= {"provider_specific_fields": {"refusal": None}}
    known |= {"function_call": None, "tool_calls": [], "annotations": []}
    texts = [
        text_of(chat.post("/v1/chat/completions", json={"messages": [question, message, question], **GREEDY}))
        for message in (answer, answer | known, {"role": "assistant", "content": answer["content"]})
    ]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("path", ["/generate", "/trace", "/v1/completions", "/v1/chat/completions"])
def test_stop_is_a_string_or_a_list(chat, path):
    limit = {"max_new_tokens": 12} if path[1] != "v" else {"max_tokens": 12, "temperature": 0}
    prompt = {"messages": [{"role": "user", "content": PROMPT}]} if "chat" in path else {"prompt": PROMPT}

    def text(**stop):
        answer = chat.post(path, json={**prompt, **limit, **stop}).json()
        return answer["results"][0]["text"] if "results" in answer else text_of_json(answer)

    whole = text()
    word = whole.split()[2]
    assert text(stop=word) == text(stop=[word]) == whole[: whole.index(word)]
    assert text(stop=None) == text(stop=[]) == whole


def text_of_json(answer):
    (choice,) = answer["choices"]
    return choice["text"] if "text" in choice else choice["message"]["content"]


BAD = [
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, "w1"]}, "prompt"),
    ({"prompt": [[1], "w1"]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**9]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": ["w1", ""]}, "prompt.1"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 2000}, "max_tokens"),
    ({"max_tokens": 60}, "max_tokens"),
    ({"logprobs": 51}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"stop": [""]}, "stop.0"),
    ({"stop": 3}, "stop"),
    ({"stream_options": {}}, "stream_options"),
    ({"stream": True, "echo": True, "logprobs": 1}, "stream"),
    ({"slr": {"loop_at": 2}}, "slr.loop_at"),
    ({"slr": {"loop_at": 99}, "echo": True}, "slr.loop_at"),
    ({"slr": {"loop_at": 0}, "echo": True}, "slr.loop_at"),
    ({"slr": {"max_iterations": 65}}, "slr.max_iterations"),
    ({"slr": {"min_iterations": 3, "max_iterations": 2}}, "slr.min_iterations"),
    ({"slr": {"convergence": {"criterion": "learned"}}}, "slr.convergence.criterion"),
    ({"slr": {"speed": 1}}, "slr.speed"),
    ({"n": 17}, "n"),
    ({"functions": []}, "functions"),
    ({"service_tier": "priority"}, "service_tier"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
]
BAD_CHATS = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"tools": [{}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format.type"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"max_completion_tokens": 60}, "max_completion_tokens"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"reasoning_effort": "none"}, "reasoning_effort"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"modalities": ["text", "audio"]}, "modalities.1"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages.0.tool_calls"),
    ({"verbosity": "low"}, "verbosity"),
]


@pytest.mark.parametrize(("body", "param"), BAD)
def test_bad_completions(client, body, param):
    refused(client.post("/v1/completions", json={"prompt": PROMPT, **body}), param)


@pytest.mark.parametrize(("body", "param"), BAD_CHATS)
def test_bad_chats(chat, body, param):
    good = {"messages": [{"role": "user", "content": PROMPT}]}
    refused(chat.post("/v1/chat/completions", json={**good, **body}), param)


def test_chat_without_template(client):
    refused(client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "w1"}]}), "messages")


def refused(response, param):
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] is not None
    assert error["param"].startswith(param) or param.startswith(error["param"]), error
