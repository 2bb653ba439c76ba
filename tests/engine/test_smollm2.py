"""The engine on SmolLM2-135M-Instruct, with random adapters: against the reference, in every workspace and format.

The reference has the same packed or quantized weights. In bf16, and where quantized products round their inputs to
bf16, sums in another order differ by :data:`MARGIN`: exits nearer to a threshold are replayed at a fixed depth, and
tokens may differ where the reference gives both nearly the same probability. Measured: these differences are smaller
than those between the references in bf16 and in fp32, with one iteration.
"""

import re
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slr_core.config import SLRConfig
from slr_core.engine.runner.linear import pack_linears
from slr_core.errors import DeadlineError
from slr_core.generation.prepare import prepare
from slr_core.generation.reference import generate
from slr_core.params import LoopParams
from slr_core.reasoner import LatentReasoner
from tests import tiny
from tests.contract.derivation import derive
from tests.engine.harness import SteppedCore, is_empty, near
from tests.server.process import Server

pytestmark = pytest.mark.slow

PROMPTS = ("The capital of France is", "Two plus three equals", "In 1969,", "Water boils at", "Dear Sir or Madam,")
WORKSPACES = {**tiny.WORKSPACES, "token": {"workspace": "token"}}
EXACT = 2e-3
CASES = [
    *(("float32", "none", workspace) for workspace in WORKSPACES),
    *(("bfloat16", "none", workspace) for workspace in WORKSPACES),
    ("bfloat16", "int8", "append"),
    ("float32", "int8", "token"),
    ("bfloat16", "int4", "block"),
    ("float32", "int4", "append"),
]
MARGIN = {"float32": EXACT, "bfloat16": 0.1}


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


def reasoner(folder, tokenizer, workspace, dtype="float32", quantization="none"):
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=getattr(torch, dtype))
    config = SLRConfig.from_dict({"loop": {**tiny.LOOP, **WORKSPACES[workspace]}})
    torch.manual_seed(0)  # of the adapters' other half
    made = LatentReasoner(base, tokenizer, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name or not name.startswith("base."):
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    pack_linears(made.base, quantization)
    return made.eval()


def margin(dtype, quantization):
    return MARGIN["float32" if quantization == "none" and dtype == "float32" else "bfloat16"]


def random_requests(made, random, close):
    """Requests whose loops end at several depths, none of which rounding can change, and what the reference answers."""
    # Every iteration of these random loops amplifies rounding: in half precision, a second one would hide faults.
    depths = (0, 3, 3, 2, 3) if close == EXACT else (0, 1, 1, 1, 1)
    found = []
    for i, prompt in enumerate(PROMPTS):
        most = depths[i]
        loop = LoopParams(max_iterations=most, criterion="relative_change", threshold=random.choice([0.2, 0.5, 1.0]))
        request = prepare(made, prompt, loop, max_new_tokens=random.choice([2, 3]), logprobs=20)
        (result,) = generate(made, [request])
        records = [record for loop in result.records_per_token or (result.records,) for record in loop]
        bound = request.loop.threshold
        changes = [record.relative_change for record in records if record.relative_change is not None]
        if any(abs(change - bound) <= close * bound for change in changes):
            depth = result.iterations
            fixed = replace(request.loop, criterion="fixed", max_iterations=depth, min_iterations=depth)
            request = replace(request, loop=fixed)
            (result,) = generate(made, [request])
        found.append((request, result))
    return found


def assert_near(found, expected, close):
    """Loops are the same; tokens are, up to the first that the reference finds about as likely. How many were."""
    assert (found.iterations, found.exit_reason) == (expected.iterations, expected.exit_reason)
    for mine, theirs in zip(found.records, expected.records, strict=True):
        assert near(mine.relative_change, theirs.relative_change, close)
    for i, (mine, theirs) in enumerate(zip(found.scores, expected.scores, strict=False)):
        likely = dict(theirs.top)
        assert likely[theirs.token_id] - likely[mine.token_id] <= 6 * close
        if mine.token_id != theirs.token_id:
            return i
        assert mine.logprob == pytest.approx(theirs.logprob, abs=6 * close)
    assert found.token_ids == expected.token_ids
    assert found.iterations_per_token == expected.iterations_per_token
    assert found.forward_passes == expected.forward_passes
    return len(found.token_ids)


@pytest.mark.parametrize(("dtype", "quantization", "workspace"), CASES)
def test_any_mix(smollm2, tokenizer, dtype, quantization, workspace):
    """Requests that arrive at any step, two of which are cancelled or late, get what they get alone."""
    made = reasoner(smollm2, tokenizer, workspace, dtype, quantization)
    close, random = margin(dtype, quantization), Random(f"{dtype} {quantization} {workspace}")
    wanted = random_requests(made, random, close)
    stepped = SteppedCore(made, slots=3, capacity=96, prefill_chunk=random.choice([2, 4, 512]))
    arrives = [random.randrange(5) for _ in wanted]
    cancelled, late = (stepped.submit(request) for request, _ in wanted[1:3])
    futures, step = {}, 0
    while stepped.core.busy or len(futures) < len(wanted):
        if step == 1:
            stepped.sequence(late).deadline = 0.0
        if step == 2:
            cancelled.cancel()
        for i, (request, _) in enumerate(wanted):
            if arrives[i] == step:
                futures[i] = stepped.submit(request)
        if stepped.core.busy:
            stepped.step()
        step += 1
    assert is_empty(stepped.core)
    assert cancelled.cancelled()
    assert isinstance(late.exception(), DeadlineError)
    same = [assert_near(futures[i].result(), expected, close) for i, (_, expected) in enumerate(wanted)]
    assert len({result.iterations for _, result in wanted}) >= 2
    if close == EXACT:
        assert same == [len(result.token_ids) for _, result in wanted]
    else:  # how often two tokens are about as likely differs from processor to processor
        assert sum(tokens > 0 for tokens in same) >= 3


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_formulas(smollm2, tokenizer, workspace, tmp_path):
    """The reference against the loop as it is derived from the checkpoint's files alone."""
    base = AutoModelForCausalLM.from_pretrained(smollm2 / "base")
    config = SLRConfig.from_dict({"loop": {**tiny.LOOP, **WORKSPACES[workspace]}})
    made = LatentReasoner(base, tokenizer, config)
    tiny.shake(made)
    made.eval().save_pretrained(str(tmp_path))
    request = prepare(made, PROMPTS[0], LoopParams(max_iterations=3, criterion="fixed"), max_new_tokens=3)
    request = replace(request, include_states=True)
    (ours,) = generate(made, [request])
    derived = derive(tmp_path, list(request.prompt_ids), request.loop, 3)
    assert (ours.iterations, list(ours.token_ids)) == (3, derived.tokens)
    torch.testing.assert_close(ours.states, torch.stack(derived.states), rtol=1e-3, atol=1e-3)


def test_memory_at_start(smollm2, tmp_path):
    server = Server(smollm2, tmp_path / "log")
    try:
        libraries = Path(f"/proc/{server.process.pid}/maps").read_text()
        assert not re.findall(r"/(?:scipy|PIL)/", libraries)
        assert server.resident_mib * 2**20 < 1.01e9
    finally:
        server.kill()
