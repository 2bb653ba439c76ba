from slr_core.training.callbacks import ResetOptimizer
from slr_core.training.trainer import train
from tests.training.recipe import DATA, recipe

STAGES = [{**DATA["stages"][0], "steps": 1}, {**DATA["stages"][1], "steps": 2}]


def test_the_optimizer_forgets_where_a_stage_asks_for_it(tmp_path, monkeypatch):
    cleared = []
    real = ResetOptimizer.on_step_begin

    def spy(self, args, state, control, **about):
        before = len(about["optimizer"].state)
        real(self, args, state, control, **about)
        if before and not about["optimizer"].state:
            cleared.append(state.global_step)

    monkeypatch.setattr(ResetOptimizer, "on_step_begin", spy)
    stages = [STAGES[0], {**STAGES[1], "reset_optimizer": True}, STAGES[1], {**STAGES[0], "reset_optimizer": True}]
    train(recipe(output_dir=tmp_path / "out", stages=stages))
    assert cleared == [1, 5]
