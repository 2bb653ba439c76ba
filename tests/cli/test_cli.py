import io
import json
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from slr_core import __version__, cli
from slr_core.checkpoint.info import describe
from slr_core.checkpoint.read import load
from slr_core.generation.reference import generate
from slr_core.model.reasoner import LatentReasoner
from tests import tiny
from tests.training.recipe import DATA

QUESTION = "Tom is a rompus. Every rompus is a lempus. Sam is a impus. Is Tom a impus or lempus?"
LOOP = ["--max-iterations", "3", "--criterion", "fixed"]


def expected(made, loop=None):
    loop = {"max_iterations": 3, "criterion": "fixed"} if loop is None else loop
    return generate(made, [tiny.request(made, QUESTION, loop)])[0]


def test_generate_prints_the_answer(run, made, folder):
    code, out, err = run("generate", "--model", folder, *LOOP, QUESTION)
    assert (code, out) == (0, expected(made).text + "\n")
    assert "3 iterations, max_iterations" in err


def test_the_prompt_can_come_from_standard_input(run, made, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(QUESTION + "\n"))
    _, out, _ = run("generate", "--model", folder, *LOOP, "-")
    assert out == expected(made).text + "\n"


def test_generate_as_json(run, made, folder):
    _, out, _ = run("generate", "--model", folder, "--max-iterations", 0, "--json", QUESTION)
    found, result = json.loads(out), expected(made, {"max_iterations": 0})
    assert (found["text"], found["iterations"], found["final_change"]) == (result.text, 0, None)
    assert found["usage"] == {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.completion_tokens,
        "forward_passes": result.forward_passes,
    }


def test_sampling_has_a_seed(run, folder):
    options = ["generate", "--model", folder, "--temperature", 2.0, "--top-k", 40, "--seed", 5]
    assert run(*options, QUESTION)[1] == run(*options, QUESTION)[1]
    texts = {run(*options[:-1], seed, QUESTION)[1] for seed in range(5)}
    assert len(texts) > 1


def test_trace_has_a_line_an_iteration(run, made, folder):
    code, out, _ = run("trace", "--model", folder, *LOOP, "--top-tokens", 2, QUESTION)
    lines = out.splitlines()
    assert code == 0
    assert [line.split()[0] for line in lines[1:4]] == ["1", "2", "3"]
    assert expected(made).text in out
    for line, record in zip(lines[1:4], expected(made).records, strict=True):
        assert f"{record.relative_change:.3f}" in line
        assert record.adapter in line


def test_trace_as_json(run, made, folder):
    found = json.loads(run("trace", "--model", folder, *LOOP, "--top-tokens", 2, "--json", QUESTION)[1])
    assert [record["t"] for record in found["trace"]] == [1, 2, 3]
    assert all(len(record["top_tokens"]) == 2 for record in found["trace"])
    assert found["stability"]["converged"] is False
    assert found["text"] == expected(made).text


# -- a block that is put into words, with a chat template ------------------------------------------------

THINKING = {
    "workspace": "block",
    "block_size": 3,
    "decoder": {"latent_decoder": {"hidden_size": 16, "heads": 2, "max_thought_tokens": 4}},
}
TEMPLATE = "{% for m in messages %}w1 {{ m.content }} {% endfor %}w2"


@pytest.fixture(scope="module")
def thinking():
    return tiny.reasoner(loop=THINKING, text={"chat_template": TEMPLATE})


@pytest.fixture(scope="module")
def block(thinking, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "thinking"
    thinking.save_pretrained(str(folder))
    return str(folder)


def traced(made, prompt=tiny.PROMPTS[1]):
    loop = {"max_iterations": 3, "criterion": "fixed"}
    return generate(made, [tiny.request(made, prompt, loop, trace=True, include_states=True)])[0]


def test_a_trace_shows_thoughts_where_there_are_any(run, thinking, block, folder):
    _, out, _ = run("trace", "--model", block, *LOOP, tiny.PROMPTS[1])
    lines = out.splitlines()
    assert lines[0].split()[-1] == "thought"
    for line, record in zip(lines[1:4], traced(thinking).records, strict=True):
        assert record.thought in line
    # Nothing compares with the learned vectors that the block starts from.
    assert lines[1].split()[:4] == ["1", "-", "-", "-"]
    assert lines[2].split()[3] == "-"
    assert "thought" not in run("trace", "--model", folder, *LOOP, QUESTION)[1]


def test_a_trace_as_json_has_thoughts_where_there_are_any(run, thinking, block, folder):
    found = json.loads(run("trace", "--model", block, *LOOP, "--json", tiny.PROMPTS[1])[1])
    assert [record["thought"] for record in found["trace"]] == [r.thought for r in traced(thinking).records]
    assert found["trace"][0]["relative_change"] is None
    plain = json.loads(run("trace", "--model", folder, *LOOP, "--json", QUESTION)[1])
    assert all("thought" not in record for record in plain["trace"])


def test_states_are_written_to_a_file(run, thinking, block, tmp_path):
    code, out, _ = run("trace", "--model", block, *LOOP, "--states", tmp_path / "h.safetensors", tiny.PROMPTS[1])
    states = load_file(tmp_path / "h.safetensors")["states"]
    assert code == 0
    assert "states" not in out
    assert states.shape == (4, 3, 32)
    torch.testing.assert_close(states, traced(thinking).states)


@pytest.mark.parametrize("command", ["generate", "trace"])
def test_a_chat_goes_through_the_template(run, thinking, block, command):
    found = json.loads(run(command, "--model", block, *LOOP, "--json", "--chat", tiny.PROMPTS[1])[1])
    expected = traced(thinking, f"w1 {tiny.PROMPTS[1]} w2")
    assert found["usage"]["prompt_tokens"] == expected.prompt_tokens == 7
    assert found["final_change"] == pytest.approx(expected.final_change, rel=1e-4)
    assert found["final_change"] != pytest.approx(traced(thinking).final_change, rel=1e-3)


# -- info and init ---------------------------------------------------------------------------------------


def test_info(run, made, folder):
    code, out, _ = run("info", "--model", folder)
    facts = describe(made)
    assert code == 0
    assert "LlamaForCausalLM" in out
    assert f"{facts.added_parameters:,} parameters, {facts.added_share:.1%} of the base" in out
    rows = {line[:12].strip(): line[12:].strip() for line in out.splitlines()}
    assert rows["workspace"] == "append"
    assert rows["cache"].startswith("128 bytes a position; a prompt of 256 tokens and an answer of 6 take 33.2 KiB")
    assert rows["cache"].endswith("the loop's part 512 bytes")
    found = json.loads(run("info", "--model", folder, "--json")[1])
    assert found["config"]["loop"] == made.config.loop.model_dump(mode="json")
    assert found["added_parameters"] == facts.added_parameters
    assert found["added_share"] == pytest.approx(facts.added_share)


def test_info_of_a_block_with_a_decoder(run, block):
    out = run("info", "--model", block)[1]
    rows = {line[:12].strip(): line[12:].strip() for line in out.splitlines()}
    assert rows["workspace"] == "block of 3"
    assert rows["answers by"] == "lm_head (latent decoder: 2 layers)"
    assert rows["loop LoRA"] == "per_iteration, rank 2"


def test_init_makes_a_folder_that_answers(run, tmp_path):
    tiny.base().save_pretrained(tmp_path / "plain")
    tiny.tokenizer().save_pretrained(tmp_path / "plain")
    (tmp_path / "loop.yaml").write_text("workspace: block\n")
    options = ["--out", tmp_path / "out", "--config", tmp_path / "loop.yaml"]
    code, out, err = run("init", tmp_path / "plain", *options)
    facts = describe(load(LatentReasoner, tmp_path / "out"))
    assert (code, err) == (0, "")
    assert f"{facts.added_parameters:,} parameters, {facts.added_share:.1%} of the base" in out
    assert "block of 8" in out
    assert run("info", "--model", tmp_path / "out")[1] == out
    code, out, _ = run("generate", "--model", tmp_path / "out", "--json", "w1 w2")
    assert (code, json.loads(out)["usage"]["prompt_tokens"]) == (0, 2)
    code, out, err = run("init", tmp_path / "plain", *options)
    assert (code, out) == (1, "")
    assert "new or an empty folder" in err


def test_init_as_json(run, tmp_path):
    tiny.base().save_pretrained(tmp_path / "plain")
    tiny.tokenizer().save_pretrained(tmp_path / "plain")
    found = json.loads(run("init", tmp_path / "plain", "--out", tmp_path / "out", "--seed", 3, "--json")[1])
    assert found["added_parameters"] == found["adapter_parameters"] + found["module_parameters"]
    assert found == json.loads(run("info", "--model", tmp_path / "out", "--json")[1]) | {"config": found["config"]}


# -- train, and what goes wrong ---------------------------------------------------------------------------


def test_train(run, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**DATA, "stages": DATA["stages"][:1]}))
    code, out, _ = run("train", path, "--set", f"output_dir={tmp_path / 'out'}", "--set", "seed=9")
    assert code == 0
    assert str(tmp_path / "out") in out
    assert json.loads((tmp_path / "out" / "training.json").read_text())["recipe"]["seed"] == 9


WRONG = {
    "no-such-model": ["generate", "--model", "/no/where", "x"],
    "empty-prompt": ["generate", "--model", "FOLDER", " "],
    "criterion": ["generate", "--model", "FOLDER", "--criterion", "vibes", QUESTION],
    "bounds": ["generate", "--model", "FOLDER", "--min-iterations", "4", "--max-iterations", "2", QUESTION],
    "chat": ["generate", "--model", "FOLDER", "--chat", QUESTION],
    "learned": ["generate", "--model", "FOLDER", "--criterion", "learned", QUESTION],
    "states": ["trace", "--model", "FOLDER", "--states", "/no/where/h.safetensors", QUESTION],
    "init-base": ["init", "/no/where", "--out", "/no/where/else"],
    "init-file": ["init", "/no/where.gguf", "--out", "/no/where/else"],
    "init-config": ["init", "FOLDER", "--out", "/no/where/else", "--config", "/no/where.yaml"],
    "init-out": ["init", "FOLDER", "--out", "FOLDER"],
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_is_one_line_and_exit_code_1(case, run, folder):
    code, out, err = run(*(folder if word == "FOLDER" else word for word in WRONG[case]))
    assert code == 1
    assert err.startswith("slr: ")
    assert len(err.strip().splitlines()) == 1
    assert out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["generate", "--max-iterations", "-1", "x"],
        ["generate", "--max-iterations", "many", "x"],
        ["generate", "--patience", "0", "x"],
        ["generate", "--threshold", "nan", "x"],
        ["generate", "--threshold", "-1", "x"],
        ["generate", "--top-p", "1.5", "x"],
        ["trace", "--top-tokens", "51", "x"],
        ["train", "/no/where.yaml"],
        ["init"],
        ["init", "x"],
        ["init", "x", "--out", "y", "--seed", "-1"],
        ["nonesuch"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(arguments):
    assert CliRunner().invoke(cli.app, arguments).exit_code == 2


def test_version_and_help(run):
    assert run("--version")[:2] == (0, f"slr {__version__}\n")
    assert CliRunner().invoke(cli.app, ["--help"]).exit_code == 0
