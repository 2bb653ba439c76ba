"""Common clients, unchanged: OpenAI's own, two wrappers of it, and lm-eval's local-completions."""

import asyncio
import json

import openai
import pytest
import torch

from slr_core.generation.reference import generate
from slr_core.params import LoopParams
from slr_core.types import Tokens
from tests import tiny
from tests.server.process import Server

pytestmark = pytest.mark.slow
KEY = "k" * 20
PROMPT = "w9 w8 w7 w6"
MESSAGES = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def made():
    return tiny.reasoner(text={"chat_template": "{% for m in messages %}{{ m.content }} {% endfor %}"})


@pytest.fixture(scope="module")
def server(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clients") / "tiny"
    made.save_pretrained(str(folder))
    started = Server(folder, folder.parent / "log", SLR_API_KEYS=KEY)
    started.folder = folder
    yield started
    started.kill()


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def expected(made, prompt, **options):
    loop = options.pop("loop", {})
    return generate(made, [tiny.request(made, prompt, loop, max_new_tokens=5, **options)])[0]


def raw(text):
    return Tokens(tuple(tiny.ids(text)))


def test_completions(client, made):
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=5, temperature=0, logprobs=2)
    result = expected(made, raw(PROMPT), logprobs=2)
    assert answer.choices[0].text == result.text
    assert answer.choices[0].logprobs.token_logprobs == pytest.approx([s.logprob for s in result.scores], abs=1e-4)
    assert answer.usage.completion_tokens == 5
    assert answer.choices[0].slr["iterations"] == result.iterations


def test_streamed_completions(client, made):
    parts = client.completions.create(
        model="tiny",
        prompt=[PROMPT, "w1 w2"],
        max_tokens=5,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"slr": {"max_iterations": 2}},
    )
    texts, usage = {}, None
    for part in parts:
        usage = part.usage or usage
        for choice in part.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    results = [expected(made, raw(prompt), loop={"max_iterations": 2}) for prompt in (PROMPT, "w1 w2")]
    assert texts == {0: results[0].text, 1: results[1].text}
    assert usage.completion_tokens == sum(result.completion_tokens for result in results)


def test_chats(client, made):
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=5, temperature=0)
    assert answer.choices[0].message.content == expected(made, MESSAGES).text
    parts = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_completion_tokens=5, temperature=0, stream=True
    )
    told = [part.choices[0] for part in parts]
    assert "".join(choice.delta.content or "" for choice in told) == answer.choices[0].message.content
    assert told[-1].finish_reason == answer.choices[0].finish_reason


def test_the_async_client(server, made):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
            one = client.chat.completions.create(
                model="tiny", messages=MESSAGES, max_tokens=5, temperature=0, stream=True
            )
            return "".join([part.choices[0].delta.content or "" async for part in await one])

    assert asyncio.run(ask()) == expected(made, MESSAGES).text


def test_models_and_errors(client, server):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "slr"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="tiny", prompt="w1", max_tokens=10_000)
    assert (error.value.param, error.value.code) == ("max_tokens", "invalid_value")
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x" * 20, max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_conversation(client, made):
    question = MESSAGES[0]
    first = client.chat.completions.create(model="tiny", messages=[question], max_tokens=5, temperature=0)
    messages = [question, first.choices[0].message, question]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=5, temperature=0)
    turns = [question, {"role": "assistant", "content": first.choices[0].message.content}, question]
    assert answer.choices[0].message.content == expected(made, turns).text


@pytest.fixture
def litellm(monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    monkeypatch.setenv("LITELLM_TELEMETRY", "False")
    return pytest.importorskip("litellm")


@pytest.mark.filterwarnings("ignore")
def test_litellm_chats(litellm, server, made):
    options = {"base_url": f"{server.url}/v1", "api_key": KEY, "max_tokens": 5, "temperature": 0}
    answer = litellm.completion("openai/tiny", messages=MESSAGES, user="me", **options)
    text = expected(made, MESSAGES).text
    assert answer.choices[0].message.content == text
    assert answer.usage.completion_tokens == 5
    streamed = litellm.completion(
        "openai/tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **options
    )
    parts = list(streamed)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == text
    turns = [*MESSAGES, answer.choices[0].message, *MESSAGES]
    again = litellm.completion("openai/tiny", messages=turns, **options)
    assert (
        again.choices[0].message.content
        == expected(made, [*MESSAGES, {"role": "assistant", "content": text}, *MESSAGES]).text
    )


@pytest.mark.filterwarnings("ignore")
def test_litellm_completions(litellm, server, made):
    options = {"base_url": f"{server.url}/v1", "api_key": KEY, "max_tokens": 5, "temperature": 0}
    text = expected(made, raw(PROMPT)).text
    answer = litellm.text_completion(PROMPT, "text-completion-openai/tiny", **options)
    assert answer.choices[0].text == text
    parts = litellm.text_completion(PROMPT, "text-completion-openai/tiny", stream=True, **options)
    assert "".join(part.choices[0].text or "" for part in parts) == text


@pytest.mark.filterwarnings("ignore")
def test_langchain_chats(server, made):
    langchain = pytest.importorskip("langchain_openai")
    options = {"base_url": f"{server.url}/v1", "api_key": KEY, "model": "tiny", "max_tokens": 5, "temperature": 0}
    chat = langchain.ChatOpenAI(**options, logprobs=True, top_logprobs=2)
    text = expected(made, MESSAGES).text
    answer = chat.invoke(PROMPT)
    assert answer.content == text
    assert b"".join(bytes(t["bytes"]) for t in answer.response_metadata["logprobs"]["content"]).decode() == text
    parts = list(langchain.ChatOpenAI(**options, stream_usage=True).stream(PROMPT))
    assert "".join(part.content for part in parts) == text
    assert sum(part.usage_metadata["output_tokens"] for part in parts if part.usage_metadata) == 5
    turns = [*MESSAGES, {"role": "assistant", "content": text}, *MESSAGES]
    assert chat.invoke([("user", PROMPT), answer, ("user", PROMPT)]).content == expected(made, turns).text


@pytest.mark.filterwarnings("ignore")
def test_langchain_completions(server, made):
    langchain = pytest.importorskip("langchain_openai")
    options = {"base_url": f"{server.url}/v1", "api_key": KEY, "model": "tiny", "max_tokens": 5, "temperature": 0}
    model, text = langchain.OpenAI(**options), expected(made, raw(PROMPT)).text
    assert model.invoke(PROMPT) == text
    assert "".join(model.stream(PROMPT)) == text


QUESTIONS = [
    {"question": "w1 w2 w3", "choices": ["w4 w5", "w6", "w7 w8 w9"], "answer": 0},
    {"question": "w5 w5", "choices": ["w30 w1", "w2 w2", "w3"], "answer": 2},
    {"question": "w20 w21 w22 w23", "choices": ["w24", "w25 w26", "w27"], "answer": 1},
]
TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: OUTPUT
doc_to_text: "{{question}}"
DETAILS
"""


@pytest.fixture
def evaluate(server, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(q) for q in QUESTIONS))

    def run(output, details):
        task = TASK.replace("FILE", str(tmp_path / "data.jsonl")).replace("OUTPUT", output)
        (tmp_path / "tiny.yaml").write_text(task.replace("DETAILS", details))
        where = f"base_url={server.url}/v1/completions,model=tiny,tokenizer={server.folder}"
        return lm_eval.simple_evaluate(
            model="local-completions",
            model_args=f"{where},tokenizer_backend=huggingface,max_length=60,num_concurrent=2",
            tasks=["tiny"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            log_samples=True,
            batch_size=2,
            bootstrap_iters=0,
        )["samples"]["tiny"]

    return run


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_scores(evaluate, made):
    details = 'doc_to_choice: choices\ndoc_to_target: answer\nmetric_list: [{metric: acc}]\ntarget_delimiter: " "'
    samples = evaluate("multiple_choice", details)
    assert len(samples) == 3
    for sample in samples:
        for choice, (told, greedy) in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True):
            before, ids = len(tiny.ids(sample["doc"]["question"])), tiny.ids(f"{sample['doc']['question']} {choice}")
            with torch.inference_mode(), made.adapters.use(None):
                logprobs = made.base(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            own = range(before, len(ids))
            assert float(told) == pytest.approx(sum(float(logprobs[i - 1, ids[i]]) for i in own), abs=1e-3)
            assert greedy in (
                str(all(int(logprobs[i - 1].argmax()) == ids[i] for i in own)),
                all(int(logprobs[i - 1].argmax()) == ids[i] for i in own),
            )


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_generates(evaluate, made):
    details = (
        'doc_to_target: "w1"\ngeneration_kwargs: {until: ["w99"], max_gen_toks: 5, temperature: 0}\n'
        "metric_list: [{metric: exact_match}]"
    )
    samples = evaluate("generate_until", details)
    loop = LoopParams().resolve(made.config)
    assert loop.max_iterations > 0
    for sample in samples:
        assert sample["resps"][0][0] == expected(made, raw(sample["doc"]["question"])).text
