"""An entropy bonus whose weight follows a target, through real steps."""

import pytest
import torch
from training import EveryStep, History, arithmetic, assert_identical, grpo, make_trainer, variety, weights_of

from lit_specrl import PPO, EntropyTarget, KLPenalty, SharedTrunkCritic
from lit_specrl.algorithms.entropy_bonus import EntropyCoefficient

ALWAYS, NEVER = 1e9, 1e-9


def run(model, *callbacks, checkpoint=None, **options):
    module, history = grpo(model, **options), History()
    make_trainer(history, *callbacks).fit(module, arithmetic(), ckpt_path=checkpoint)
    return module, history.steps


def test_the_weight_rises_below_the_target_and_falls_above_it():
    coefficient = EntropyCoefficient(EntropyTarget(target=0.5, initial=0.1, maximum=0.12, delta=0.01))
    values = []
    for entropy in [0.4, 0.5, 0.3, 0.6, float("nan"), 0.4, 0.6, 0.6]:
        values.append(coefficient.value)
        coefficient.update(entropy)
    assert values == pytest.approx([0, 0.11, 0.12, 0.12, 0, 0, 0.12, 0])
    assert coefficient.state_dict() == pytest.approx([0.10, 0.6])


def test_a_constant_weight_stays():
    coefficient = EntropyCoefficient(0.25)
    coefficient.update(0.1)
    assert coefficient.value == 0.25
    with pytest.raises(ValueError, match="entropy_coef must be a finite number, got nan"):
        EntropyCoefficient(float("nan"))


def test_an_update_is_weighted_by_what_the_one_before_found(model_folder):
    module, steps = run(model_folder, entropy_coef=EntropyTarget(target=ALWAYS, initial=0.1, delta=0.01))
    assert [step["entropy_coef"] for step in steps.values()] == pytest.approx([0, 0.11, 0.12, 0.13])
    constant, same = run(model_folder, entropy_coef=0.1)
    assert "entropy_coef" not in same[4]
    plain, _ = run(model_folder)
    idle, _ = run(model_folder, entropy_coef=EntropyTarget(target=NEVER, initial=0.1, delta=0.01))
    torch.testing.assert_close(weights_of(idle), weights_of(plain), rtol=1e-3, atol=1e-5)
    for other in (plain, constant):
        with pytest.raises(AssertionError):
            torch.testing.assert_close(weights_of(module), weights_of(other), rtol=1e-3, atol=1e-5)


def test_the_weight_acts_as_a_constant_one_does(model_folder):
    """In the second of two updates of one step, behind a first without a bonus on either side."""
    held = EntropyTarget(target=ALWAYS, initial=0.2, minimum=0.2, maximum=0.2)
    adaptive = grpo(model_folder, entropy_coef=held)
    adaptive.objective.entropy.update(0.0)  # as if an update had come before
    make_trainer().fit(adaptive, arithmetic())
    constant, _ = run(model_folder, entropy_coef=0.2)
    assert_identical(weights_of(adaptive), weights_of(constant))


def test_the_weight_waits_while_the_critic_warms_up(model_folder):
    module = PPO(
        model_folder,
        [variety],
        critic=SharedTrunkCritic(warmup_steps=2),
        entropy_coef=EntropyTarget(target=ALWAYS, initial=0.1, delta=0.01),
        max_completion_length=12,
    )
    history = History()
    make_trainer(history).fit(module, arithmetic())
    assert [step.get("entropy_coef") for step in history.steps.values()] == [None, None, 0, pytest.approx(0.11)]


def test_a_resumed_run_goes_on_with_the_weight(model_folder, tmp_path):
    target = {"entropy_coef": EntropyTarget(target=ALWAYS, initial=0.1, delta=0.01)}
    whole, steps = run(model_folder, EveryStep(tmp_path), **target)
    resumed, again = run(model_folder, checkpoint=str(tmp_path / "3.ckpt"), **target)
    assert again[4]["entropy_coef"] == steps[4]["entropy_coef"] == pytest.approx(0.13)
    assert_identical(weights_of(resumed), weights_of(whole))


def test_a_corrected_penalty_has_another_gradient(model_folder):
    """On-policy, where every ratio is 1: the values are the same, the gradients are not."""
    options = {"beta": 0.5, "num_iterations": 2}
    plain, before = run(model_folder, kl=KLPenalty(), **options)
    corrected, after = run(model_folder, kl=KLPenalty(bias_correction=True), **options)
    assert before[1]["reward"] == after[1]["reward"]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(weights_of(corrected), weights_of(plain), rtol=1e-3, atol=1e-6)
