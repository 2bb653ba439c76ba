"""The reference, alone and in batches, and the derivation from the files do what the checked-in traces say."""

import json

import pytest
import torch

from slr_core.generation.reference import generate
from tests.contract.derivation import derive
from tests.golden import make


@pytest.fixture(scope="module", params=make.LOOPS)
def workspace(request):
    return request.param


@pytest.fixture(scope="module")
def golden(workspace):
    return json.loads((make.FOLDER / f"{workspace}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def made(workspace):
    return make.model(workspace)


def roughly(value):
    """``value`` with its distances, fp32, compared with a tolerance."""
    if isinstance(value, dict):
        return {key: roughly(x) for key, x in value.items()}
    if isinstance(value, list):
        return [roughly(x) for x in value]
    return pytest.approx(value, rel=1e-5, abs=1e-6) if isinstance(value, float) else value


def test_the_reference_reproduces_the_file(workspace, golden):
    traced = make.trace(workspace)
    assert traced["weights"] == golden["weights"], "the model itself differs, not its loop"
    assert traced.keys() == golden.keys()
    for now, expected in zip(traced["rows"], golden["rows"], strict=True):
        assert now == roughly(expected)


def test_so_does_one_batch_of_all_its_requests(workspace, golden, made):
    results = generate(made, make.requests(made))
    for result, expected in zip(results, golden["rows"], strict=True):
        wanted = {key: x for key, x in expected.items() if key not in ("request", "passes")}
        assert make.row(result, workspace) == roughly(wanted)


def test_so_does_the_derivation_from_its_saved_files(workspace, golden, made, tmp_path):
    made.save_pretrained(str(tmp_path))
    for request, expected in zip(make.requests(made), golden["rows"], strict=True):
        derived = derive(tmp_path, list(request.prompt_ids), request.loop, request.max_new_tokens)
        # As a result's states do, these pass through fp32.
        assert [make.fingerprint(h.float(), golden["decimals"]) for h in derived.states] == expected["states"]
        assert derived.iterations_per_token == expected.get("iterations_per_token", [])
        assert (derived.tokens, derived.exit_reason) == (expected["tokens"], expected["exit_reason"])
        assert [{"adapter": a, "positions": p} for a, p in derived.passes] == expected["passes"]
        for record, wanted in zip(derived.records, expected["trace"], strict=True):
            assert record == roughly({key: wanted[key] for key in record})


def test_the_counted_passes_are_those_that_a_result_reports(golden):
    for row in golden["rows"]:
        assert len(row["passes"]) == row["forward_passes"]
        assert [step["adapter"] for step in row["trace"]] == adapters_of_the_loop(row, golden["workspace"])


def adapters_of_the_loop(row, workspace):
    start = 0 if workspace in ("prompt", "token", "token_shared") else 1
    return [ran["adapter"] for ran in row["passes"][start : start + row["iterations"]]]


def test_the_file_holds_every_way_to_end(golden, made):
    rows, trained = golden["rows"], made.config.loop.trained_iterations
    assert {row["exit_reason"] for row in rows} == {"converged", "max_iterations"}
    assert any(row["iterations"] == 0 for row in rows)
    assert any(row["iterations"] == row["request"]["loop"].get("max_iterations") > trained for row in rows)
    assert len({tuple(row["tokens"]) for row in rows}) > 2


def test_no_state_is_hashed_where_rounding_decides(workspace, made):
    results = generate(made, make.requests(made))
    assert min(make.margin(result.states, workspace) for result in results) >= make.MARGINS[workspace]


def test_a_hash_knows_no_negative_zero_and_sees_a_small_change():
    values = torch.tensor([[0.0, 1.25, -2.0]])
    assert make.fingerprint(values, 6) == make.fingerprint(torch.tensor([[-0.0, 1.25, -2.0]]), 6)
    assert make.fingerprint(values, 6) == make.fingerprint(torch.tensor([[-1e-9, 1.25, -2.0]]), 6)
    assert make.fingerprint(values, 6) != make.fingerprint(torch.tensor([[2e-6, 1.25, -2.0]]), 6)
    assert make.fingerprint(values, 6) != make.fingerprint(values.T, 6)


@pytest.mark.slow
def test_making_them_again_changes_no_file(tmp_path):
    make.make(tmp_path)
    for workspace in make.LOOPS:
        again, checked_in = ((folder / f"{workspace}.json") for folder in (tmp_path, make.FOLDER))
        assert json.loads(again.read_text()) == roughly(json.loads(checked_in.read_text()))
