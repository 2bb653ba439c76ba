"""Benchmarks: all of them import, those of the engine record its passes, and the long one shows its progress."""

import json
import pkgutil
import sys
from importlib import import_module
from pathlib import Path

import pytest

import benchmarks
from benchmarks import llama_cpp, overload, passes, prosqa, word_problems
from slr_core.engine import Engine
from slr_core.engine.runner.kv_cache import KVCache
from tests import tiny


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(benchmarks.__path__)])
def test_imports(name):
    assert callable(getattr(import_module(f"benchmarks.{name}"), "main", tuple))


def test_engine_passes_run_bare():
    made = tiny.reasoner()
    with Engine(made, slots=3, prefix_gib=0) as engine:
        requests = [tiny.request(made, prompt) for prompt in tiny.PROMPTS[:3]]

        def run():
            return [future.result() for future in [engine.submit(request) for request in requests]]

        with passes.record_passes(engine) as recorded:
            results = run()
        rows = sum(rows * queries if queries == 1 else rows for rows, queries, _ in recorded.shapes)
        assert rows >= max(result.forward_passes for result in results)
        assert sum(recorded.heads) >= sum(result.completion_tokens for result in results)
        separate = [shape for shape in recorded.unpacked if shape[1] > 1]
        assert [queries for _, queries, _ in separate if queries > 1]
        engine._thread.call(
            lambda: passes.run_bare(
                engine, recorded.unpacked, recorded.heads, KVCache(engine.model, 3, engine.capacity)
            )
        )
        seconds = passes.time_parts(engine, run)
        assert list(seconds) == list(passes.PARTS)
        assert all(value > 0 for value in seconds.values())


@pytest.fixture
def clock(monkeypatch):
    """The time that the benchmark sees, in seconds."""
    now = [0.0]
    monkeypatch.setattr(prosqa.time, "perf_counter", lambda: now[0])
    return now


def test_prosqa_counts_every_answer(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prosqa", "--questions", "1", "--divergence", "2"])
    monkeypatch.setattr(prosqa, "DEPTHS", (1, 2))
    prosqa.main()
    out, err = capsys.readouterr()
    # Four sets of one question: with the loop, without it, and forced to two depths; and two that may diverge.
    assert err.startswith("18 answers to compute\n18 answers in ")
    assert "Of 2 more generated questions" in out


def test_prosqa_says_what_is_left(clock, capsys):
    with prosqa.Bar(400) as bar:
        for seconds, count in ((59, 50), (2, 50), (1, 100), (60, 100)):
            clock[0] += seconds
            bar.advance(count)
    assert capsys.readouterr().err.splitlines() == [
        "400 answers to compute",
        "100 of 400 answers, about 3 min left",
        "300 of 400 answers, about 41 s left",
        "300 answers in 2 min",
    ]


def test_prosqa_says_how_long_it_takes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prosqa", "--help"])
    with pytest.raises(SystemExit):
        prosqa.main()
    assert "minutes" in capsys.readouterr().out


def test_overload_report():
    tally = overload.Tally(10.0, answered=[0.5] * 100, refused=[0.01] * 300, retry_after=[2] * 300, probes=[0.002, 0.9])
    before = {"ok": 5.0, "rejected": 0.0, "error": 0.0}
    assert overload.miscounted(before, {"ok": 105.0, "rejected": 300.0, "error": 0.0}, tally) == 0
    assert overload.miscounted(before, {"ok": 104.0, "rejected": 300.0, "error": 2.0}, tally) == 3
    loads = {f"{multiple:g}x": {**tally.row(), "miscounted": 0, "mib": 105.0} for multiple in overload.RATES}
    figures = {"rate": 10.0, "saturated": tally.row(), "loads": loads, "warm_mib": 100.0, "exit_code": 0}
    lines = overload.report(figures, figures, 60).splitlines()
    assert "| off | 10x | 10.0 | 30.0 | 0 | 500.0 | 500.0 | 10.0 | 2.0 | 900.0 | 0.0 | 0 | 105.0 |" in lines
    verdicts = [line.split("|")[2:4] for line in lines[-6:]]
    assert [value.strip() for value, _ in verdicts] == ["0", "5.0 %", "1.00x", "10.0 ms", "900.0 ms", "1.00x"]
    assert [verdict.strip() for _, verdict in verdicts] == ["met"] * 5 + ["**missed**"]


def test_llama_cpp_table():
    def side(texts, **rates):
        made = llama_cpp.Side(lambda prompts: texts[: len(prompts)])
        made.texts, made.rates = {2: texts}, {1: rates["alone"], 2: rates["two"]}
        return made

    sides = {
        llama_cpp.LLAMA: side(["abcd", "xy"], alone=50.0, two=60.0),
        llama_cpp.EXACT: side(["abXd", "xy"], alone=20.0, two=90.0),
        f"{llama_cpp.EXACT}, 4 iterations": side(["", ""], alone=19.0, two=72.0),
    }
    lines = llama_cpp.table(sides, [1, 2], 1)
    assert "| llama.cpp | - | 67% | 50.0 (1.00) | 60.0 (1.00) |" in lines
    assert "| float32 | - | 100% | 20.0 (0.40) | 90.0 (1.50) |" in lines
    assert lines[-2:] == [
        "| at least 0.5x at 1 at once | 0.40x (float32) | **missed** |",
        "| at most 15% less with a loop, float32, 4 iterations | 20% | **missed** |",
    ]
    sides[llama_cpp.EXACT].run([(1,), (2,)])
    assert sides[llama_cpp.EXACT].rates[2] > 90, "the best round counts"


@pytest.mark.slow
def test_word_problems_table(tmp_path, monkeypatch, capsys):
    """Two checkpoints of the recipes' folder, and a row for each that is there."""
    made = tiny.reasoner(loop={"workspace": "block", "block_size": 3})
    for name in ("no_cot", "block", "soft"):
        made.save_pretrained(str(tmp_path / name))
    arguments = ["--models", str(tmp_path), "--data", str(tmp_path), "--questions", "5", "--alone", "1", "--only"]
    chosen = ["answer at once", "loop `block`, 8 iterations", "`soft`, its chain written", "steps as equations"]
    monkeypatch.setattr(sys, "argv", ["word_problems", *arguments, *chosen, "--out", str(tmp_path / "table")])
    word_problems.main()
    assert f"steps as equations: no checkpoint {tmp_path / 'cot'}" in capsys.readouterr().out
    record = json.loads((tmp_path / "table.json").read_text())
    assert list(record) == chosen[:3]
    assert record[chosen[2]]["passes"] == record[chosen[2]]["tokens"], "the same weights, without a loop"
    assert all(row["right"]["held out"][1] == 5 for row in record.values())
    assert record[chosen[1]]["passes"] - record[chosen[1]]["tokens"] >= 9  # prompt, 8 iterations, the closing pass
    assert len((tmp_path / "table.md").read_text().splitlines()) == 6 + 3
    monkeypatch.setattr(word_problems, "grade", None)  # another run has nothing left to grade
    word_problems.main()


def test_word_problems_shares():
    sets = word_problems.question_sets(Path("nowhere"), 5, 0)
    rows = {
        "loop": word_problems.Row("", {"held out": (3, 5)}, 2.0, 5.0, 10.0),
        word_problems.WRITES: word_problems.Row("", {"held out": (4, 5)}, 20.0, 21.0, 40.0),
    }
    *_, loop, writes = word_problems.table(rows, sets, 1)
    assert loop == "| loop | 0.600 (0.231 to 0.882) | 2.0 | 5.0 | 10 | 0.25 | - |"
    assert writes.endswith("| 40 | 1.00 | - |")
