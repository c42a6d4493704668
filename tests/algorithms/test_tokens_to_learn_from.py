"""Losses that leave tokens out, and a reference that moves, through real steps."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from training import EveryStep, History, arithmetic, assert_identical, grpo, make_trainer, variety, weights_of

from lit_specrl import FSDP2Strategy, KLPenalty, PrefixCache, SpeculativeRollout, VLLMEngine
from lit_specrl.algorithms.entropy_mask import TopEntropy
from lit_specrl.algorithms.objective import is_on_policy
from lit_specrl.callbacks.rollout_callback import RolloutCallback


class Seen(RolloutCallback):
    """The experience of each step, as the loss sees it."""

    def __init__(self):
        self.steps = []

    def on_experience_end(self, trainer, pl_module, rollouts, experience):
        self.steps.append(experience)


def run(model, *callbacks, checkpoint=None, max_epochs=1, **options):
    module, history = grpo(model, **options), History()
    trainer = make_trainer(history, *callbacks, max_epochs=max_epochs)
    trainer.fit(module, arithmetic(), ckpt_path=checkpoint)
    return module, history.steps


def largest_difference(module, other):
    old = weights_of(other)
    return max((weight - old[name]).abs().max() for name, weight in weights_of(module).items())


def test_the_surrogate_learns_from_the_undecided_tokens_alone(model_folder):
    seen = Seen()
    whole, steps = run(model_folder, seen, top_entropy_quantile=0.25)
    for step, experience in zip(steps.values(), seen.steps, strict=True):
        mask, kept = experience.loss_mask, experience.entropy >= step["entropy_threshold"]
        assert 0.2 < (kept & mask).sum() / mask.sum() < 0.35
        assert not experience.advantages[mask & ~kept].any()
        assert experience.advantages[mask & kept].any()
    parts, _ = run(model_folder, top_entropy_quantile=0.25, micro_batch_tokens=64)
    plain, _ = run(model_folder)
    torch.testing.assert_close(weights_of(parts), weights_of(whole), rtol=1e-3, atol=1e-5)
    assert largest_difference(plain, whole) > 1e-3


def test_all_tokens_by_default(model_folder):
    seen = Seen()
    _, steps = run(model_folder, seen)
    assert all("entropy_threshold" not in step for step in steps.values())
    assert all(experience.entropy is None for experience in seen.steps)


@pytest.mark.parametrize("threshold", [0.0, 1e9])
def test_rows_that_the_policy_has_left_do_not_push_it_on(model_folder, threshold):
    options = {"num_iterations": 3, "importance_sampling": None, "scale_rewards": "none"}
    masked, _ = run(model_folder, off_policy_mask_threshold=threshold, **options)
    plain, _ = run(model_folder, **options)
    assert (largest_difference(masked, plain) == 0) == (threshold == 1e9)


def test_reused_rows_that_the_policy_has_left_do_not_push_it_on_either():
    """The engine did not sample their tokens, so that only the log-probs at the start of the step are known."""
    part = SimpleNamespace(
        sampling_logprobs=torch.tensor([[torch.nan, torch.nan], [torch.nan, -1.0], [torch.nan, torch.nan]]),
        old_logprobs=torch.tensor([[-1.0, -1.0], [-1.0, -1.0], [-1.0, -1.0]]),
        loss_mask=torch.ones(3, 2, dtype=torch.bool),
        advantages=-torch.ones(3, 2),
    )
    now = torch.tensor([[-2.0, -2.0], [-2.0, -2.0], [-1.1, -1.1]])
    assert is_on_policy(now, part, 0.5).tolist() == [[False] * 2, [False] * 2, [True] * 2]
    part.old_logprobs = None  # one update: the policy is the one that the step began with
    assert is_on_policy(now, part, 0.5).tolist() == [[True] * 2, [True] * 2, [True] * 2]


def test_a_reference_that_is_copied_each_step_costs_no_penalty(model_folder):
    _, fixed = run(model_folder, beta=0.1)
    _, copied = run(model_folder, beta=0.1, kl=KLPenalty(sync_steps=1, mixup_alpha=1.0))
    assert fixed[4]["kl"] > 1e-4
    assert all(abs(step["kl"]) < 1e-6 for step in copied.values())


def test_a_moved_reference_scores_reused_rows_anew(model_folder):
    cache = PrefixCache(acceptance="full")
    _, steps = run(model_folder, cache, max_epochs=2, beta=0.1, kl=KLPenalty(sync_steps=1, mixup_alpha=1.0))
    assert steps[8]["prefix_cache/full_reuse_fraction"] == 1
    assert all(abs(step["kl"]) < 1e-6 for step in steps.values())


def test_a_resumed_run_has_the_reference_of_before(model_folder, tmp_path):
    options = {"beta": 0.1, "kl": KLPenalty(sync_steps=2, mixup_alpha=0.5)}
    whole, steps = run(model_folder, EveryStep(tmp_path), **options)
    resumed, again = run(model_folder, checkpoint=str(tmp_path / "3.ckpt"), **options)
    assert list(again) == [4]
    assert again[4]["kl"] == steps[4]["kl"]
    assert_identical(weights_of(resumed), weights_of(whole))
    assert_identical(resumed.scorer.reference_state(), whole.scorer.reference_state())


def test_a_moved_reference_that_a_resumed_run_leaves_is_told_of(model_folder, tmp_path):
    run(model_folder, EveryStep(tmp_path), beta=0.1, kl=KLPenalty(sync_steps=2))
    with pytest.warns(UserWarning, match="the checkpoint's reference had moved, and this run has no sync_steps"):
        run(model_folder, checkpoint=str(tmp_path / "3.ckpt"), beta=0.1)


@pytest.mark.parametrize(("options", "is_told"), [({"dtype": "bfloat16"}, True), ({}, False)])
def test_moves_that_half_precision_rounds_away_are_told_of(model_folder, options, is_told, recwarn):
    run(model_folder, beta=0.1, kl=KLPenalty(sync_steps=1, mixup_alpha=0.002), **options)
    found = [str(each.message) for each in recwarn if "the reference hardly moves" in str(each.message)]
    assert len(found) == is_told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl": KLPenalty(sync_steps=2)}, "beta=0 has none"),
        ({"kl": KLPenalty(sync_steps=2), "beta": 0.1, "lora": {"r": 2}}, "without adapters"),
        ({"top_entropy_quantile": 0.0}, r"must lie in \(0, 1\]"),
        ({"top_entropy_quantile": 1.5}, r"must lie in \(0, 1\]"),
        ({"off_policy_mask_threshold": -1.0}, "must not be negative"),
        ({"loss_type": "sapo", "delta": 2.0}, "loss_type='sapo' has none"),
    ],
)
def test_what_has_no_meaning_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        grpo("model", rewards=[variety], **options)


@pytest.mark.parametrize("options", [{"sync_steps": 0}, {"mixup_alpha": 0.0}, {"mixup_alpha": 1.1}])
def test_numbers_of_a_moving_reference(options):
    with pytest.raises(ValueError, match=r"sync_steps|mixup_alpha"):
        KLPenalty(**options)


def test_sharded_checkpoints_have_no_place_for_a_moved_reference(model_folder):
    module = grpo(model_folder, beta=0.1, kl=KLPenalty(sync_steps=2))
    with pytest.raises(MisconfigurationException, match="sharded ones have no place"):
        make_trainer(SpeculativeRollout(engine=VLLMEngine()), strategy=FSDP2Strategy()).fit(module, arithmetic())


def test_the_share_of_no_tokens():
    part = type("Part", (), {"entropy": torch.zeros(1, 2), "loss_mask": torch.zeros(1, 2, dtype=torch.bool)})
    advantages, metrics = TopEntropy(0.5)(torch.ones(1, 2), part)
    assert metrics == {"entropy_threshold": 0.0}
    assert advantages.tolist() == [[1, 1]]
