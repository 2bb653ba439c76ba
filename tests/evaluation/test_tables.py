from dataclasses import replace

from slr_core.evaluation.statistics import summarize
from slr_core.evaluation.tables import difficulty_table, method_table
from tests.evaluation.asked import outcome

LOOP = summarize([outcome(), outcome("1:b", correct=False, iterations=4)])
PLAIN = summarize([outcome(iterations=0, exit_reason="", added_parameters=0)])


def test_every_figure_of_a_method_stands_below_its_name():
    cot = replace(PLAIN, steps_hold=0.25)
    table = method_table({"slr": LOOP, "cot": cot}, {"cot": 0.03125})
    slr, other = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert slr == {
        "method": "slr",
        "accuracy": "0.500",
        "95 % interval": "0.095 to 0.905",
        "p (paired with slr)": "-",
        "valid steps": "-",
        "iterations": "3.50",
        "converged": "100.0%",
        "passes": "5.00",
        "tokens": "2.0",
        "MFLOPs": "1.0",
        "time (ms)": "10.0",
        "added parameters": "1,200",
    }
    assert (other["p (paired with slr)"], other["valid steps"], other["converged"]) == ("0.0312", "0.250", "-")
    assert other["added parameters"] == "0"


def test_what_no_row_has_is_no_column():
    table = method_table({"slr": replace(LOOP, flops=None, added_parameters=None)}, {})
    for absent in ("p (paired with slr)", "valid steps", "MFLOPs", "added parameters", "diverged"):
        assert absent not in table.columns
    assert "diverged" in method_table({"slr": replace(LOOP, diverged=0.5)}, {}).columns


def test_levels_are_rows_and_so_are_all_together():
    table = difficulty_table({2: LOOP, 3: PLAIN}, LOOP)
    assert [row[:3] for row in table.rows] == [("2", "2", "0.500"), ("3", "1", "1.000"), ("all", "2", "0.500")]
    assert difficulty_table({2: LOOP}).rows == table.rows[:1]
    assert difficulty_table({}).rows == ()
