"""Recorded output of the projects' own code is reproduced: prompt ids, greedy tokens and thoughts."""

import json
from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load_file

from slr_core.checkpoint.importers import Import, get_peer, import_checkpoint
from slr_core.checkpoint.importers.check import first_logits, run_loop
from slr_core.checkpoint.importers.peer import ImportOptions
from slr_core.checkpoint.read import load_checkpoint
from slr_core.engine.engine import Engine
from slr_core.generation.prepare import prepare
from slr_core.generation.reference import generate
from slr_core.params import LoopParams
from slr_core.reasoner import LatentReasoner


@dataclass(frozen=True)
class Fixture:
    """A recorded checkpoint: the peer, the paths in its folder, and what no file says."""

    peer: str
    folder: str
    checkpoint: str
    options: ImportOptions = field(default_factory=ImportOptions)


FIXTURES = {
    "coconut": Fixture("coconut", "coconut", "checkpoint_1", ImportOptions(latents=6)),
    "simcot-coconut": Fixture("simcot-coconut", "simcot-coconut", "checkpoint_1", ImportOptions(latents=10)),
    "codi": Fixture("codi", "codi", "checkpoint", ImportOptions(latents=6, lora_alpha=16)),
    "codi-eos": Fixture("codi", "codi", "checkpoint", ImportOptions(latents=6, lora_alpha=16, keep_eos=True)),
    "codi-adapter": Fixture("codi", "codi", "checkpoint", ImportOptions(latents=6, lora_alpha=16, keep_adapter=True)),
    "lotus-folder": Fixture("lotus", "lotus", "hf", ImportOptions(latents=12, iterations=4)),
    "lotus-pickle": Fixture("lotus", "lotus", "checkpoint_final", ImportOptions(latents=12, iterations=4)),
    "pccot-adapter": Fixture("pccot", "pccot", "checkpoint"),
    "pccot-whole": Fixture("pccot", "pccot-full", "checkpoint"),
    "ouro": Fixture("ouro", "ouro", "checkpoint"),
}


@pytest.fixture(scope="module", params=FIXTURES)
def fixture(request):
    return FIXTURES[request.param]


@pytest.fixture(scope="module")
def recorded(fixture, shared_data):
    folder = shared_data / "peers" / fixture.folder
    if not folder.is_dir():
        pytest.skip("the recorded checkpoints are not here")
    return folder


@pytest.fixture(scope="module")
def imported(fixture, recorded, tmp_path_factory):
    out = tmp_path_factory.mktemp(fixture.folder) / "imported"
    checkpoint, base = recorded / fixture.checkpoint, recorded / "base"
    expect = None if fixture.options.keep_eos else recorded / "expected.json"
    check = import_checkpoint(
        Import(fixture.peer, str(checkpoint), str(base) if base.is_dir() else None, out, fixture.options, expect=expect)
    )
    if expect is not None:
        found = check.comparison
        assert (found.cases, found.equal_prompts, found.equal_answers) == (8, 8, 8)
        assert found.thoughts < 1e-3
        assert found.logits < 1e-3
    return load_checkpoint(LatentReasoner, out)


@pytest.fixture(scope="module")
def cases(fixture, recorded):
    data = json.loads((recorded / "expected.json").read_text())
    if not fixture.options.keep_eos:
        return data["cases"]
    prompts = [case["prompt"] for case in data["cases"]]
    return [{**case, "prompt": prompt} for case, prompt in zip(data["cases_with_eos"]["cases"], prompts, strict=True)]


def answers(case, ids, end):
    """Whether these are the recorded tokens; some peers keep the end token and some drop it."""
    tokens = case["tokens"]
    return ids == tokens or (case["ended"] == "end token" and ids == [*tokens, end])


def requests(imported, cases):
    return [prepare(imported, case["prompt"], max_new_tokens=24, include_states=True) for case in cases]


def test_prompts(imported, cases):
    assert [list(request.prompt_ids) for request in requests(imported, cases)] == [case["prompt_ids"] for case in cases]


def test_alone(fixture, recorded, imported, cases):
    """Each case alone: the tokens are equal, the thoughts to 1e-3."""
    thoughts = load_file(recorded / "thoughts.safetensors")
    compared = 0
    for number, (case, request) in enumerate(zip(cases, requests(imported, cases), strict=True)):
        (result,) = generate(imported, [request])
        assert answers(case, list(result.token_ids), imported.tokenizer.eos_token_id)
        loop = run_loop(imported, request.prompt_ids)
        assert torch.equal(loop.states[:-1], result.states)
        for key, found in get_peer(fixture.peer).recorded(imported, loop).items():
            if fixture.options.keep_eos:  # their thoughts were not recorded
                continue
            torch.testing.assert_close(found, thoughts[f"{number}{key}"], rtol=0, atol=1e-3)
            compared += 1
        for token, logit in case.get("first_logits_top5", ()):
            assert first_logits(imported, request.prompt_ids)[token].item() == pytest.approx(logit, abs=2e-3)
        if "forwards" in case:  # as many passes as the peer's own code runs
            assert result.forward_passes == case["forwards"]
    assert compared >= len(cases) or fixture.options.keep_eos


def test_together(imported, cases):
    """All cases in one padded batch."""
    results = generate(imported, requests(imported, cases))
    for case, result in zip(cases, results, strict=True):
        assert answers(case, list(result.token_ids), imported.tokenizer.eos_token_id)


def test_engine(imported, cases):
    """All cases in one engine batch, mixed with requests of other depths."""
    others = [prepare(imported, "How many?", LoopParams(max_iterations=n), max_new_tokens=9) for n in (0, 1, 3, 9)]
    with Engine(imported, slots=7, threads=1) as engine:
        mixed = [
            request for pair in zip(requests(imported, cases), [*others, *others], strict=True) for request in pair
        ]
        results = [future.result() for future in [engine.submit(request) for request in mixed]]
    alone = generate(imported, requests(imported, cases))
    for case, result, reference in zip(cases, results[::2], alone, strict=True):
        assert answers(case, list(result.token_ids), imported.tokenizer.eos_token_id)
        torch.testing.assert_close(result.states, reference.states, rtol=0, atol=1e-3)
    for request, result in zip(others, results[1::2], strict=False):
        assert result.token_ids == generate(imported, [request])[0].token_ids
