import copy

import pytest
from tokenizers.processors import TemplateProcessing

from slr_core.errors import RequestError
from slr_server.errors import NotFound
from slr_server.preprocess import FieldNames, GenerationJob, RawText, check_limits, preprocess
from slr_server.protocol.native import GenerateRequest, TraceRequest, to_job
from slr_server.settings import ServerSettings
from tests import tiny


def planned(reference, body, **settings):
    return preprocess(to_job(GenerateRequest(**body)), ServerSettings(**settings), reference)


def test_defaults_are_the_checkpoints(reference):
    (request,) = planned(reference, {"prompt": "w1 w2"})
    assert request == tiny.request(reference, "w1 w2", max_new_tokens=None)


def test_limits_bound_defaults(reference):
    (request,) = planned(reference, {"prompt": "w1"}, max_iterations=2, max_new_tokens=3)
    assert (request.loop.max_iterations, request.max_new_tokens) == (2, 3)
    (request,) = planned(reference, {"prompt": "w1"}, max_iterations=0)
    assert (request.loop.max_iterations, request.loop.min_iterations) == (0, 0)
    (request,) = preprocess(to_job(TraceRequest(prompt="w1")), ServerSettings(max_top_tokens=2), reference)
    assert request.top_tokens == 2


def test_max_prompt_tokens(reference):
    assert planned(reference, {"prompt": "w1 w2"}, max_prompt_tokens=2)
    with pytest.raises(RequestError, match="has 3 tokens, this server takes at most 2") as error:
        planned(reference, {"prompt": "w1 w2 w3"}, max_prompt_tokens=2)
    assert error.value.param == "prompt"


def test_samples(reference):
    seeds = [r.sampling.seed for r in planned(reference, {"prompt": ["w1", "w2"], "seed": 5, "n": 2})]
    assert seeds == [5, 6, 5, 6]
    assert [r.sampling.seed for r in planned(reference, {"prompt": "w1", "n": 2})] == [None, None]


@pytest.mark.parametrize(
    ("body", "settings", "param"),
    [
        ({"prompt": ["a", "b"]}, {"max_prompts": 1}, "prompt"),
        ({"n": 3}, {"max_n": 2}, "n"),
        ({"max_iterations": 3}, {"max_iterations": 2}, "max_iterations"),
        ({"min_iterations": 3}, {"max_iterations": 2}, "min_iterations"),
        ({"max_new_tokens": 3}, {"max_new_tokens": 2}, "max_new_tokens"),
        ({"n": 3}, {"max_queue": 2}, "n"),
        ({"prompt": ["a", "b", "c"]}, {"max_queue": 2}, "prompt"),
    ],
)
def test_limits(body, settings, param):
    request = GenerateRequest(**{"prompt": "w1", **body})
    job = to_job(request)
    assert job.answers > 0
    check_limits(job, ServerSettings())
    with pytest.raises(RequestError) as error:
        check_limits(job, ServerSettings(**settings))
    assert error.value.param == param


def test_include_states(reference):
    def asked(**body):
        (request,) = preprocess(to_job(TraceRequest(prompt="w1", **body)), ServerSettings(), reference)
        return request.include_states

    assert asked(include_states=True)
    assert not asked(include_states=False)
    assert not asked(include_states=None)
    assert not asked()
    (request,) = planned(reference, {"prompt": "w1"})
    assert not request.include_states


@pytest.mark.parametrize(("workspace", "values"), [("append", 2 * 3), ("block", 2 * 3 * 4), ("prompt", (1 + 3) * 3)])
def test_max_state_values(workspace, values):
    # Two prompts of 1 and 3 tokens and 3 iterations; a block has 4 positions, a state 32 numbers.
    made = tiny.reasoner(loop={"workspace": workspace, "block_size": 4})
    body = TraceRequest(prompt=["w1", "w1 w2 w3"], max_iterations=3, include_states=True)
    assert len(preprocess(to_job(body), ServerSettings(max_state_values=32 * values), made)) == 2
    with pytest.raises(RequestError, match=f"include_states: .* {32 * values} numbers, .* at most 50;") as error:
        preprocess(to_job(body), ServerSettings(max_state_values=50), made)
    assert error.value.param == "include_states"
    with pytest.raises(RequestError):
        preprocess(to_job(body), ServerSettings(max_state_values=32 * values - 1), made)
    with pytest.raises(RequestError):
        preprocess(to_job(body.model_copy(update={"n": 2})), ServerSettings(max_state_values=32 * values), made)
    assert (
        len(
            preprocess(
                to_job(body.model_copy(update={"include_states": False})), ServerSettings(max_state_values=0), made
            )
        )
        == 2
    )


def test_unsupported_criterion(reference):
    with pytest.raises(RequestError) as error:
        planned(reference, {"prompt": "w1", "convergence": {"criterion": "learned"}})
    assert error.value.param == "convergence.criterion"
    halting = tiny.reasoner(loop={"halting_head": True})
    (request,) = planned(halting, {"prompt": "w1", "convergence": {"criterion": "learned"}})
    assert (request.loop.criterion, request.loop.threshold) == ("learned", 0.5)


def test_past_end_policy():
    strict = tiny.reasoner(loop={"max_iterations": 3, "lora": {"past_end": "error"}})
    with pytest.raises(RequestError) as error:
        planned(strict, {"prompt": "w1", "max_iterations": 4})
    assert error.value.param == "max_iterations"


def test_first_token_not_added_twice():
    made = tiny.reasoner()
    made.tokenizer = copy.deepcopy(made.tokenizer)
    made.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", tiny.EOS)]
    )

    def ids(text):
        (request,) = preprocess(GenerationJob((RawText(text),)), ServerSettings(), made)
        return request.prompt_ids

    assert ids("w1 w2") == ids("<eos> w1 w2") == (tiny.EOS, *tiny.ids("w1 w2"))


@pytest.mark.parametrize("option", ["enable_thinking", "messages", "thinking"])
def test_template_options(option):
    template = "{{ messages[0].content }}{% if enable_thinking %} w2{% endif %}"
    made = tiny.reasoner(text={"chat_template": template})
    job = GenerationJob(([{"role": "user", "content": "w1"}],), template_options={option: True})
    if option == "thinking":
        (request,) = preprocess(job, ServerSettings(), made)
        assert request.prompt_ids == tuple(tiny.ids("w1"))
        return
    with pytest.raises(RequestError, match=f"template_options.{option} is not supported") as error:
        preprocess(job, ServerSettings(), made)
    assert error.value.param == "template_options"


def test_field_names_in_errors():
    names = FieldNames({"n": "count", "stop": "stops"})
    for error, param, message in (
        (RequestError("n must be at most 2, n", "n"), "count", "count must be at most 2, n"),
        (RequestError("seed is wrong", "seed"), "seed", "seed is wrong"),
        (RequestError("n is wrong"), None, "n is wrong"),
        (NotFound("no stop", "stop"), "stops", "no stops"),
    ):
        with pytest.raises(type(error)) as raised, names.in_errors():
            raise error
        assert (str(raised.value), raised.value.param) == (message, param)
