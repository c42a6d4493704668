"""The journal of a rollout whose rows have several turns: each turn is a row of its own there."""

import pytest
from training import EveryStep, History, arithmetic, grpo, make_trainer

from lit_specrl import Environment, Observation, RolloutJournal
from lit_specrl.callbacks.rollout_callback import RolloutCallback


class Twice(Environment):
    """Asks for a second turn."""

    def __init__(self):
        self.num_turns = 0

    def step(self, text):
        self.num_turns += 1
        return Observation("go on") if self.num_turns < 2 else None


class Tokens(RolloutCallback):
    """Of each step; may end the run behind a rollout."""

    def __init__(self, last_step):
        self.seen, self.last_step = [], last_step

    def on_rollout_end(self, trainer, pl_module, rollouts):
        self.seen.append(rollouts.response_ids)

    def on_experience_end(self, trainer, pl_module, rollouts, experience):
        if pl_module.step == self.last_step:
            raise RuntimeError("interrupted")


def run(model, folder, last_step=None, checkpoint=None):
    tokens, history = Tokens(last_step), History()
    trainer = make_trainer(history, tokens, EveryStep(folder), RolloutJournal(), default_root_dir=folder)
    options = {"max_turns": 3, "max_completion_length": 40, "importance_sampling": None}
    trainer.fit(grpo(model, environment=Twice(), **options), arithmetic(), ckpt_path=checkpoint)
    return tokens.seen, history.steps


def test_turns_of_an_interrupted_rollout_are_taken(model_folder, tmp_path):
    whole, steps = run(model_folder, tmp_path / "whole")
    assert steps[3]["environment/turns"] > 1
    with pytest.raises(RuntimeError, match="interrupted"):
        run(model_folder, tmp_path / "cut", last_step=2)
    rest, again = run(model_folder, tmp_path / "cut", checkpoint=str(tmp_path / "cut" / "2.ckpt"))
    assert rest == whole[2:]
    assert again[3]["rollout_journal/taken_rows"] > 8 > again[4]["rollout_journal/taken_rows"] == 0
