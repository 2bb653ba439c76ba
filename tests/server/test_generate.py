import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest

from slr_core.generation.reference import generate
from slr_core.params import SamplingParams
from tests import tiny

# A body, and the arguments of LoopParams and prepare that mean the same.
SETTINGS = [
    ({}, {}, {}),
    ({"max_iterations": 0}, {"max_iterations": 0}, {}),
    ({"max_iterations": 3, "min_iterations": 3}, {"max_iterations": 3, "min_iterations": 3}, {}),
    ({"convergence": {"threshold": 0.5}}, {"threshold": 0.5}, {}),
    ({"initial_noise": {"scale": 0.5, "seed": 3}}, {"noise_scale": 0.5, "noise_seed": 3}, {}),
    ({"convergence": {"criterion": "kl", "patience": 2}}, {"criterion": "kl", "patience": 2}, {}),
    ({"convergence": {"criterion": "fixed"}, "stop": ["w16"]}, {"criterion": "fixed"}, {"stop": ["w16"]}),
    (
        {"temperature": 0.7, "top_p": 0.9, "top_k": 10, "seed": 3},
        {},
        {"sampling": SamplingParams(temperature=0.7, top_p=0.9, top_k=10, seed=3)},
    ),
]


def alone(reference, prompt, loop, options, **more):
    return generate(reference, [tiny.request(reference, prompt, loop, **options, **more)])[0]


def near(shown, value, rel=1e-4) -> bool:
    return shown is None if value is None else shown == pytest.approx(value, rel=rel)


def agrees(shown, result) -> bool:
    usage = {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.completion_tokens,
        "forward_passes": result.forward_passes,
    }
    return (
        all(shown[name] == getattr(result, name) for name in ("text", "finish_reason", "iterations", "exit_reason"))
        and near(shown["final_change"], result.final_change)
        and shown["usage"] == usage
    )


@pytest.mark.parametrize(("body", "loop", "options"), SETTINGS)
def test_answers_match_reference(client, reference, body, loop, options):
    response = client.post("/generate", json={"prompt": tiny.PROMPTS[1], "max_new_tokens": 6, **body})
    assert response.status_code == 200, response.text
    (shown,) = response.json()["results"]
    assert agrees(shown, alone(reference, tiny.PROMPTS[1], loop, options))


def test_response(client):
    before = int(time.time())
    response = client.post("/generate", json={"prompt": "w1", "max_iterations": 2}).json()
    assert set(response) == {"id", "model", "created", "results"}
    assert re.fullmatch("slr-[0-9a-f]{32}", response["id"])
    assert response["model"] == "prosqa"
    assert before <= response["created"] <= time.time()
    (result,) = response["results"]
    timings = result["timings"]
    assert set(timings) == {"queue_s", "prefill_s", "loop_s", "decode_s", "total_s"}
    assert sum(value for stage, value in timings.items() if stage != "total_s") == pytest.approx(timings["total_s"])
    assert set(result) == {
        *("index", "text", "finish_reason", "iterations", "exit_reason", "final_change", "usage", "timings"),
        "budget_reduced",
    }


def test_no_iterations(client):
    (result,) = client.post("/generate", json={"prompt": "w1", "max_iterations": 0}).json()["results"]
    assert (result["iterations"], result["exit_reason"], result["final_change"]) == (0, "max_iterations", None)


def test_several_prompts_in_order(client, reference):
    body = {"prompt": list(tiny.PROMPTS), "max_new_tokens": 6, "convergence": {"threshold": 0.5}}
    results = client.post("/generate", json=body).json()["results"]
    assert [result["index"] for result in results] == list(range(len(tiny.PROMPTS)))
    for result, prompt in zip(results, tiny.PROMPTS, strict=True):
        assert agrees(result, alone(reference, prompt, {"threshold": 0.5}, {}))


def test_sample_order_and_seeds(client):
    body = {"max_new_tokens": 6, "temperature": 1.5}

    def texts(**more):
        results = client.post("/generate", json={**body, **more}).json()["results"]
        assert [result["index"] for result in results] == list(range(len(results)))
        return [result["text"] for result in results]

    prompts = list(tiny.PROMPTS[:2])
    one_by_one = [texts(prompt=prompt, seed=7 + i)[0] for prompt in prompts for i in range(3)]
    assert texts(prompt=prompts, seed=7, n=3) == one_by_one
    assert len(set(one_by_one)) > 3


def test_largest_seed(client):
    body = {"prompt": "w1", "seed": 2**63 - 1, "temperature": 1, "n": 3, "max_new_tokens": 2}
    assert client.post("/generate", json=body).status_code == 200


def test_concurrent_answers_match_reference(client, reference):
    jobs = [(prompt, *settings) for prompt in tiny.PROMPTS for settings in SETTINGS]

    def ask(job):
        prompt, body, _, _ = job
        return client.post("/generate", json={"prompt": prompt, "max_new_tokens": 6, **body}).json()["results"][0]

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, jobs))
    for answer, (prompt, _, loop, options) in zip(answers, jobs, strict=True):
        assert agrees(answer, alone(reference, prompt, loop, options))


def test_trace(client, reference):
    body = {"prompt": tiny.PROMPTS[1], "max_new_tokens": 6, "max_iterations": 3, "top_tokens": 2}
    (shown,) = client.post("/trace", json=body).json()["results"]
    result = alone(reference, tiny.PROMPTS[1], {"max_iterations": 3}, {}, trace=True, top_tokens=2)
    assert agrees(shown, result)
    stability = asdict(result.stability)
    assert all(near(shown["stability"][name], value) for name, value in stability.items())
    assert [step["t"] for step in shown["trace"]] == [1, 2, 3]
    for step, record in zip(shown["trace"], result.records, strict=True):
        assert set(step) == set(vars(record)) - {"thought"}
        for name in ("relative_change", "cosine", "norm", "contraction", "kl", "entropy"):
            assert near(step[name], getattr(record, name), rel=1e-3), name
        assert step["adapter"] == record.adapter
        assert step["duration_s"] > 0
        assert [top["token"] for top in step["top_tokens"]] == [token for token, _ in record.top_tokens]
    assert shown["trace"][0]["contraction"] is None


@pytest.mark.parametrize(("asked", "shown"), [({}, 5), ({"top_tokens": 0}, 0), ({"top_tokens": 50}, 40)])
def test_top_tokens_of_a_trace(client, asked, shown):
    (result,) = client.post("/trace", json={"prompt": "w1", "max_iterations": 1, **asked}).json()["results"]
    (step,) = result["trace"]
    assert len(step["top_tokens"]) == shown


def test_trace_answers_as_generate(client):
    body = {"prompt": tiny.PROMPTS[2], "max_new_tokens": 6}
    (plain,) = client.post("/generate", json=body).json()["results"]
    (traced,) = client.post("/trace", json=body).json()["results"]
    assert all(traced[name] == plain[name] for name in ("text", "iterations", "exit_reason", "usage"))


def test_non_finite_norm_is_null(client, monkeypatch, engine):
    def explode(g, *_):
        return g * float("inf")

    monkeypatch.setattr(engine.reasoner.residual, "forward", explode)
    (result,) = client.post("/trace", json={"prompt": "w1", "max_new_tokens": 3}).json()["results"]
    assert result["exit_reason"] == "diverged"
    assert result["trace"][-1]["norm"] is None
