"""Losses, gradients, advantages and metrics are those of TRL 1.16.0 and verl 0.9.1 (`record_oracles.py`) to 1e-5."""

from types import SimpleNamespace

import pytest
import torch

from lit_specrl.advantages import (
    decoupled_advantages,
    frac_reward_zero_std,
    generalized_advantages,
    group_advantages,
    leave_one_out_advantages,
    pass_at_k_advantages,
)
from lit_specrl.algorithms.advantage_estimators import GPG, OPO, ReinforcePlusPlus, ReinforcePlusPlusBaseline
from lit_specrl.algorithms.entropy_bonus import EntropyCoefficient
from lit_specrl.algorithms.entropy_mask import TopEntropy
from lit_specrl.algorithms.objective import Objective, is_on_policy
from lit_specrl.experience import padded_rows
from lit_specrl.losses import (
    DPPO,
    DRO,
    GMPO,
    ImportanceSampling,
    KLPenalty,
    PolicyGradient,
    PolicyLoss,
    kl_penalty,
    named_loss,
    resolve_loss_type,
    token_weights,
    value_loss,
)
from lit_specrl.masking import masked_whiten
from lit_specrl.metrics import ValueStatistics
from lit_specrl.models.policy import TokenStatistics

MAX_COMPLETION_LENGTH = 7


def assert_equal(actual, expected, **kwargs):
    """Oracles hold seven digits."""
    torch.testing.assert_close(
        torch.as_tensor(actual).float(), torch.as_tensor(expected).float(), rtol=1e-5, atol=1e-5, **kwargs
    )


def policy_loss_of(loss_type, **kwargs):
    parts = resolve_loss_type(loss_type)
    return PolicyLoss(
        surrogate=parts.surrogate, importance_sampling_level=parts.importance_sampling_level, **kwargs
    ), parts.aggregation


TRL_LOSSES = {
    "grpo": ("grpo", {}),
    "grpo on policy": ("grpo", {}),
    "grpo with kl": ("grpo", {}),
    "grpo with corrected kl": ("grpo", {}),
    "grpo on policy with corrected kl": ("grpo", {}),
    "grpo with importance and kl": ("grpo", {}),
    "grpo two-sided": ("grpo", {"epsilon_high": 0.28, "delta": 1.5}),
    "dapo": ("dapo", {"epsilon_high": 0.28}),
    "bnpo": ("bnpo", {}),
    "dr_grpo": ("dr_grpo", {}),
    "cispo": ("cispo", {"epsilon_high": 1.3}),
    "gspo": ("gspo", {"epsilon": 0.1}),
    "luspo": ("luspo", {"epsilon": 0.1}),
}


@pytest.mark.parametrize("case", TRL_LOSSES)
def test_policy_losses_are_those_of_trl(case, oracles, inputs, loss_mask):
    loss_type, settings = TRL_LOSSES[case]
    expected = oracles["trl"]["losses"][case]
    policy_loss, aggregation = policy_loss_of(loss_type, **settings)
    policy_logprobs = inputs["policy_logprobs"].clone().requires_grad_()
    part = experience_of(inputs)
    part.advantages = inputs["row_advantages"][:, None].expand(8, 6)
    part.old_logprobs = None if "on policy" in case else inputs["old_logprobs"]
    part.reference_logprobs = inputs["reference_logprobs"] if "kl" in case else None
    objective = Objective(policy_loss, None, KLPenalty(bias_correction="corrected" in case), EntropyCoefficient(0.0))

    statistics = TokenStatistics(policy_logprobs, torch.zeros(8, 6))
    per_token_loss, found = objective(statistics, part, kl_coef=0.1)
    if "importance" in case:  # TRL leaves the penalty out of it
        surrogate, _ = policy_loss(policy_logprobs, part.old_logprobs, part.advantages, loss_mask)
        per_token_loss = per_token_loss + surrogate * (oracle_token_weights(inputs, loss_mask) - 1)
    if "kl" in case and "corrected" not in case:  # there TRL tells the weighted one
        assert_equal(found.kl_sum / loss_mask.sum(), expected["kl"])
    weights = token_weights(loss_mask, aggregation, max_completion_length=MAX_COMPLETION_LENGTH)
    loss = (per_token_loss * weights).sum()
    loss.backward()

    assert_equal(loss, expected["loss"])
    assert_equal(policy_logprobs.grad, expected["gradient"])
    if loss_type == "cispo":
        assert_equal(found.clipped.high_mean, expected["cispo_clip_ratio"])
    else:
        assert_equal(found.clipped.low_mean, expected["clip_ratio/low_mean"])
        assert_equal(found.clipped.high_mean, expected["clip_ratio/high_mean"])
        assert_equal(found.clipped.region_mean, expected["clip_ratio/region_mean"])


def experience_of(inputs):
    lengths = inputs["lengths"].int().tolist()
    experience = padded_rows([[1], [1]], [0] * 4 + [1] * 4, [[5] * length for length in lengths])
    experience.rewards = inputs["rewards"]
    return experience


def summed(policy_loss, inputs, loss_mask, change=lambda logprobs, advantages: (advantages, 1)):
    """Loss and gradient; `change` gives other advantages, and a factor of each token."""
    policy_logprobs = inputs["policy_logprobs"].clone().requires_grad_()
    advantages, factor = change(policy_logprobs.detach(), inputs["row_advantages"][:, None].expand(8, 6))
    per_token_loss, _ = policy_loss(policy_logprobs, inputs["old_logprobs"], advantages, loss_mask)
    loss = (per_token_loss * factor * token_weights(loss_mask, policy_loss.aggregation)).sum()
    loss.backward()
    return loss, policy_logprobs.grad


@pytest.mark.parametrize("name", ["sapo", "vespo"])
def test_soft_gates_are_those_of_trl(name, oracles, inputs, loss_mask):
    loss, gradient = summed(named_loss(name), inputs, loss_mask)
    assert_equal(loss, oracles["trl"]["losses"][name]["loss"])
    assert_equal(gradient, oracles["trl"]["losses"][name]["gradient"])


def test_the_undecided_tokens_are_those_of_trl(oracles, inputs, loss_mask):
    def undecided(logprobs, advantages):
        part = SimpleNamespace(entropy=-logprobs, loss_mask=loss_mask)
        return TopEntropy(0.3)(advantages, part)[0], 1

    loss, gradient = summed(named_loss("dapo"), inputs, loss_mask, undecided)
    assert_equal(loss, oracles["trl"]["losses"]["top entropy"]["loss"])
    assert_equal(gradient, oracles["trl"]["losses"]["top entropy"]["gradient"])


def test_rows_off_the_policy_are_those_of_trl(oracles, inputs, loss_mask):
    def on_policy(logprobs, advantages):
        part = SimpleNamespace(
            sampling_logprobs=inputs["sampling_logprobs"],
            old_logprobs=inputs["old_logprobs"],
            loss_mask=loss_mask,
            advantages=advantages,
        )
        kept = is_on_policy(logprobs, part, 0.1)
        assert 0 < kept[loss_mask].float().mean() < 1
        return advantages, kept

    loss, gradient = summed(named_loss("grpo"), inputs, loss_mask, on_policy)
    assert_equal(loss, oracles["trl"]["losses"]["off-policy mask"]["loss"])
    assert_equal(gradient, oracles["trl"]["losses"]["off-policy mask"]["gradient"])


def oracle_token_weights(inputs, loss_mask):
    sampling_logprobs = inputs["sampling_logprobs"].clone()
    sampling_logprobs[1, 0] = torch.nan  # TRL was given a log-prob that the engine did not know
    return ImportanceSampling("token_truncate", clip_max=1.2)(inputs["old_logprobs"], sampling_logprobs, loss_mask)[0]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "cispo"])
def test_losses_are_those_of_trl_accumulated_over_two_micro_batches(loss_type, oracles, inputs, loss_mask):
    expected = oracles["trl"]["losses in two micro-batches"][loss_type]
    policy_loss, aggregation = policy_loss_of(loss_type, epsilon_high=1.3 if loss_type == "cispo" else None)
    policy_logprobs = inputs["policy_logprobs"].clone().requires_grad_()
    total = torch.zeros(())
    for rows in torch.arange(8).chunk(2):
        per_token_loss, _ = policy_loss(
            policy_logprobs[rows],
            inputs["old_logprobs"][rows],
            inputs["row_advantages"][rows, None].expand(4, 6),
            loss_mask[rows],
        )
        weights = token_weights(
            loss_mask[rows],
            aggregation,
            num_tokens=loss_mask.sum(),
            num_sequences=8,
            max_completion_length=MAX_COMPLETION_LENGTH,
        )
        loss = (per_token_loss * weights).sum()
        loss.backward()
        total += loss.detach()

    assert_equal(total, expected["loss"])
    assert_equal(policy_logprobs.grad, expected["gradient"])


VERL_LOSSES = {
    "ppo": (PolicyLoss(clip_ratio_c=10.0), "token"),
    "dual clip": (PolicyLoss(clip_ratio_c=1.5), "token"),
    "dual clip inside the range": (PolicyLoss(clip_ratio_c=1.1), "token"),
    "dapo": (PolicyLoss(epsilon_high=0.28, clip_ratio_c=10.0), "token"),
    "sequence": (PolicyLoss(clip_ratio_c=10.0), "sequence"),
    "sequence_sum": (PolicyLoss(clip_ratio_c=10.0), "sequence_sum"),
    "fixed": (PolicyLoss(clip_ratio_c=10.0), "fixed"),
    "with importance": (PolicyLoss(clip_ratio_c=10.0), "token"),
    "gspo": (PolicyLoss(epsilon=0.1, importance_sampling_level="sequence"), "sequence"),
    "gspo by token": (PolicyLoss(epsilon=0.1, importance_sampling_level="sequence"), "token"),
    "cispo": (PolicyLoss(epsilon_high=1.3, surrogate="cispo"), "token"),
    "gpg": (PolicyGradient(), "token"),
    "dro": (DRO(beta=0.5), "token"),
    "geo_mean": (GMPO(0.2, 0.3), "sequence"),
    "dppo_tv": (DPPO("tv", 0.05, 0.02, clip_ratio_c=1.5), "token"),
    "dppo_kl": (DPPO("kl", 0.02, 0.01, clip_ratio_c=1.5), "token"),
}


@pytest.mark.parametrize("case", VERL_LOSSES)
def test_policy_losses_are_those_of_verl(case, oracles, inputs, loss_mask):
    policy_loss, aggregation = VERL_LOSSES[case]
    expected = oracles["verl"]["losses"][case]
    policy_logprobs = inputs["policy_logprobs"].clone().requires_grad_()
    by_row = case in ("gspo", "geo_mean")
    advantages = inputs["row_advantages"][:, None].expand(8, 6) if by_row else inputs["token_advantages"]
    num_sequences = len(loss_mask) if case == "geo_mean" else loss_mask.any(-1).sum()

    per_token_loss, clipped = policy_loss(policy_logprobs, inputs["old_logprobs"], advantages, loss_mask)
    if case == "with importance":
        per_token_loss = per_token_loss * oracles["verl"]["importance"]["token 1.2"]
    weights = token_weights(loss_mask, aggregation, num_sequences=num_sequences, max_completion_length=6)
    loss = (per_token_loss * weights).sum()
    loss.backward()

    assert_equal(loss, expected["loss"])
    assert_equal(policy_logprobs.grad, expected["gradient"])
    if isinstance(policy_loss, PolicyLoss):
        assert_equal(clipped.bound_mean, expected["actor/pg_clipfrac_lower"])
    if (
        isinstance(policy_loss, DPPO)
        or getattr(policy_loss, "importance_sampling_level", None) == "token" != case != "cispo"
    ):
        assert_equal(clipped.region_mean, expected["actor/pg_clipfrac"])


@pytest.mark.parametrize("rewards", ["rewards", "ragged_rewards"])
@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_group_advantages_are_those_of_trl(scale_rewards, rewards, oracles, inputs):
    advantages = group_advantages(inputs[rewards], 4, scale_rewards)
    assert_equal(advantages, oracles["trl"]["advantages"][f"{scale_rewards} {rewards}"])
    if scale_rewards != "batch":
        expected = oracles["trl"]["frac_reward_zero_std"][f"{scale_rewards} {rewards}"]
        assert_equal(frac_reward_zero_std(inputs[rewards], 4), expected)


@pytest.mark.parametrize("rewards", ["rewards", "ragged_rewards"])
@pytest.mark.parametrize("normalize", [False, True])
def test_leave_one_out_advantages_are_those_of_trl(normalize, rewards, oracles, inputs):
    advantages = leave_one_out_advantages(inputs[rewards], 4, normalize=normalize)
    assert_equal(advantages, oracles["trl"]["leave_one_out"][f"{normalize} {rewards}"])


def test_advantages_are_those_of_verl(oracles, inputs):
    expected = oracles["verl"]
    assert_equal(group_advantages(inputs["rewards"], 4, epsilon=1e-6), expected["group_advantages"]["True"])
    assert_equal(group_advantages(inputs["rewards"], 4, "none"), expected["group_advantages"]["False"])
    assert_equal(leave_one_out_advantages(inputs["rewards"], 4), expected["leave_one_out"])


def test_decoupled_advantages_are_those_of_trl(oracles, inputs):
    advantages = decoupled_advantages(inputs["scores"], inputs["score_weights"], 4)
    assert_equal(advantages, oracles["trl"]["decoupled"])


def test_best_rows_are_those_of_verl(oracles, inputs):
    scaled = pass_at_k_advantages(inputs["rewards"], 4, epsilon=1e-6)
    assert_equal(scaled, oracles["verl"]["estimators"]["passk"][:, 0])
    plain = pass_at_k_advantages(inputs["rewards"], 4, "none")
    assert_equal(plain, oracles["verl"]["estimators"]["passk without scale"][:, 0])


@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        ("gpg", GPG()),
        ("opo", OPO()),
        ("reinforce_plus_plus", ReinforcePlusPlus(gamma=0.9)),
        ("reinforce_plus_plus_baseline", ReinforcePlusPlusBaseline()),
    ],
)
def test_estimators_are_those_of_verl(name, estimator, oracles, inputs, loss_mask):
    experience = experience_of(inputs)
    if name == "reinforce_plus_plus":
        experience.kl_penalty = -inputs["token_rewards"].masked_fill(~loss_mask, 0)
    advantages = estimator(experience, 4).view(8, -1).expand(8, 6)
    assert_equal(advantages[loss_mask], oracles["verl"]["estimators"][name][loss_mask])


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 1.0), (0.9, 0.8)])
def test_generalized_advantages_are_those_of_verl(gamma, gae_lambda, oracles, inputs, loss_mask):
    expected = oracles["verl"]["gae"][f"{gamma} {gae_lambda}"]
    advantages, returns = generalized_advantages(
        inputs["token_rewards"], inputs["values"], loss_mask, gamma, gae_lambda
    )
    assert_equal(masked_whiten(advantages, loss_mask)[loss_mask], expected["whitened advantages"][loss_mask])
    assert_equal(returns[loss_mask], expected["returns"][loss_mask])


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_is_that_of_verl(shift_mean, oracles, inputs, loss_mask):
    expected = oracles["verl"]["whiten"][str(shift_mean)]
    assert_equal(masked_whiten(inputs["values"], loss_mask, shift_mean)[loss_mask], expected[loss_mask])


@pytest.mark.parametrize("clips", [(None, 3.0), (0.9, 1.2)])
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_importance_weights_and_their_metrics_are_those_of_trl(mode, clips, oracles, inputs, loss_mask):
    expected = oracles["trl"]["importance"][f"{mode} {clips[0]} {clips[1]}"]
    sampling_logprobs = inputs["sampling_logprobs"].clone()
    sampling_logprobs[1, 0] = torch.nan
    correction = ImportanceSampling(mode, clip_min=clips[0], clip_max=clips[1])

    weights, mismatch = correction(inputs["old_logprobs"], sampling_logprobs, loss_mask)

    assert_equal(weights[loss_mask], expected["weights"][loss_mask])
    assert_equal(mismatch.ratio_min, expected["importance_sampling_ratio/min"])
    assert_equal(mismatch.ratio_mean, expected["importance_sampling_ratio/mean"])
    assert_equal(mismatch.ratio_max, expected["importance_sampling_ratio/max"])
    assert_equal(mismatch.difference_mean, expected["sampling_logp_difference/mean"])
    assert_equal(mismatch.difference_max, expected["sampling_logp_difference/max"])


@pytest.mark.parametrize(
    ("threshold", "mode", "clip_min"), [("1.2", "truncate", None), ("0.9_1.2", "mask", 0.9)], ids=["truncate", "mask"]
)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_are_those_of_verl(level, threshold, mode, clip_min, oracles, inputs, loss_mask):
    correction = ImportanceSampling(f"{level}_{mode}", clip_min=clip_min, clip_max=1.2)
    weights, _ = correction(inputs["old_logprobs"], inputs["sampling_logprobs"], loss_mask)
    assert_equal(weights, oracles["verl"]["importance"][f"{level} {threshold}"])


@pytest.mark.parametrize(
    "estimator", ["kl", "abs", "mse", "low_var_kl", "k1", "k2", "k3", "k1+", "abs+", "k2+", "k3+", "low_var_kl+"]
)
def test_kl_estimators_are_those_of_verl(estimator, oracles, inputs, loss_mask):
    expected = oracles["verl"]["kl"][estimator]
    policy_logprobs = inputs["policy_logprobs"].clone().requires_grad_()
    kl = kl_penalty(policy_logprobs, inputs["reference_logprobs"], loss_mask, estimator)
    kl.sum().backward()
    assert_equal(kl[loss_mask], expected["value"][loss_mask])
    assert_equal(policy_logprobs.grad[loss_mask], expected["gradient"][loss_mask])


@pytest.mark.parametrize("cliprange_value", [0.5, 0.1])
def test_value_loss_is_that_of_verl(cliprange_value, oracles, inputs, loss_mask):
    expected = oracles["verl"]["value_loss"][str(cliprange_value)]
    values = inputs["values"].clone().requires_grad_()
    per_token_loss, clipped = value_loss(values, inputs["old_values"], inputs["returns"], loss_mask, cliprange_value)
    loss = (per_token_loss * token_weights(loss_mask, "token")).sum()
    loss.backward()
    assert_equal(loss, expected["loss"])
    assert_equal(values.grad, expected["gradient"])
    assert_equal(clipped.clipped_mean, expected["clipped"])


@pytest.mark.parametrize("cut", [8, 3], ids=["one rank", "two ranks"])
def test_explained_variance_is_that_of_verl(cut, oracles, inputs, loss_mask):
    first, second = (
        ValueStatistics.of(inputs["values"][rows], inputs["returns"][rows], loss_mask[rows])
        for rows in (slice(cut), slice(cut, 8))
    )
    explained_variance = (first + second).metrics()["critic/vf_explained_var"]
    assert_equal(explained_variance, oracles["verl"]["explained_variance"])
