"""Stop strings, and sampling of evaluation apart, in a run of the Trainer."""

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from training import GROUP, History, arithmetic, grpo, make_trainer

from lit_specrl.callbacks import PrefixCache, RolloutCallback, SpeculativeRollout
from lit_specrl.data import ArithmeticSource
from lit_specrl.drafting import NGramDrafter
from lit_specrl.engines import VLLMEngine
from lit_specrl.types import SamplingConfig

STOP = ["A", "B", "C", "D", "E", "F", "G"]  # of the tiny model's letters, so that some responses end by one


class Rows(RolloutCallback):
    """Every rollout of the run."""

    def __init__(self):
        self.training, self.evaluation = [], []

    def on_rollout_end(self, trainer, pl_module, rollouts):
        (self.training if trainer.training else self.evaluation).append(rollouts)


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """Two epochs, the second of which takes over all responses of the first."""
    rows, history = Rows(), History()
    module = grpo(
        tiny_model,
        stop=STOP,
        mask_truncated_completions=True,
        eval_sampling=SamplingConfig(1, 8, min_p=0.3, repetition_penalty=1.5),
    )
    trainer = make_trainer(
        PrefixCache(acceptance="full"),
        rows,
        history,
        max_epochs=2,
        default_root_dir=tmp_path_factory.mktemp("run"),
    )
    trainer.fit(module, datamodule=arithmetic(validation=ArithmeticSource(2, split="validation")))
    return rows, history, module


def test_responses_that_end_by_a_stop_string_are_finished(run):
    rows, history, module = run
    num_stopped = 0
    for rollouts, step in zip(rows.training, history.steps.values(), strict=True):
        for text, token_ids, reason in zip(rollouts.texts, rollouts.response_ids, rollouts.finish_reasons, strict=True):
            assert not set(text[:-1]) & set(STOP)
            by_text = text[-1:] in STOP
            num_stopped += by_text
            by_token = token_ids[-1] == module.tokenizer.eos_token_id
            assert reason == ("stop" if by_text or by_token else "length")
        share = rollouts.truncated.count(True) / rollouts.num_rows
        assert step["completions/clipped_ratio"] == pytest.approx(share)
    assert num_stopped > 10


def test_a_response_that_ended_by_a_stop_string_is_taken_over_whole(run):
    rows, _, _ = run
    first, second = rows.training[:4], rows.training[4:]

    def by_prompt(epoch):
        return {
            uid: (
                rollouts.response_ids[GROUP * place : GROUP * (place + 1)],
                rollouts.finish_reasons[GROUP * place : GROUP * (place + 1)],
            )
            for rollouts in epoch
            for place, uid in enumerate(rollouts.prompts.uids)
        }

    assert by_prompt(second) == by_prompt(first)
    assert sum(rollouts.num_generated_tokens for rollouts in second) == 0


def test_evaluation_samples_by_its_own_settings(run):
    rows, _, _ = run
    assert {rollouts.request.sampling.min_p for rollouts in rows.training} == {0.0}
    assert {rollouts.request.sampling.min_p for rollouts in rows.evaluation} == {0.3}
    assert all(rollouts.request.text_end is None for rollouts in rows.evaluation)


def test_min_p_does_not_go_with_a_drafter(tiny_model, tmp_path):
    module = grpo(tiny_model, eval_sampling=SamplingConfig(1, 8, min_p=0.3))
    trainer = make_trainer(SpeculativeRollout(VLLMEngine(), NGramDrafter(3)), default_root_dir=tmp_path)
    with pytest.raises(MisconfigurationException, match=r"does not verify drafts under min_p=0\.3; leave min_p"):
        trainer.fit(module, datamodule=arithmetic())
