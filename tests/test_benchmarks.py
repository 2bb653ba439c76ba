"""Benchmarks that people start by hand tell how far they are."""

import sys

import pytest

from benchmarks import prosqa


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
    # Three sets of one question: with the loop, without it, and forced to two depths; and two that may diverge.
    assert err.startswith("14 answers to compute\n14 answers in ")
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
