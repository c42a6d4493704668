"""Estimators, penalties and losses that `RLVRModule` can be set to, each against its formula row by row."""

import copy
from functools import partial

import pytest
import torch
from training import QUESTIONS, EveryStep, make_trainer, small_tokens
from transformers import AutoModelForCausalLM

from lit_specrl import (
    GAE,
    GRPO,
    AdvantageEstimator,
    EntropyTarget,
    KLPenalty,
    PassAtK,
    PromptDataModule,
    ReinforcePlusPlus,
    RLVRModule,
    SeparateCritic,
    SharedTrunkCritic,
)
from lit_specrl.algorithms.advantage_estimators import token_advantages
from lit_specrl.callbacks import RolloutCallback
from lit_specrl.data.order import even_chunks
from lit_specrl.experience import padded_rows
from lit_specrl.losses import DPPO, GMPO, NAMES, KLCoefficient, PolicyLoss
from lit_specrl.models.micro_batches import MicroBatch
from lit_specrl.models.policy import Policy
from lit_specrl.rewards import RewardFunction

NUM_GENERATIONS, MAX_LENGTH = 3, 8
SGD = torch.optim.SGD


class Spy(RolloutCallback):
    """Begins with a policy apart from its reference, and keeps what each step began with."""

    def __init__(self):
        self.metrics, self.starts = [], []

    def on_train_start(self, trainer, pl_module):
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in pl_module.policy.model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)

    def on_experience_end(self, trainer, pl_module, rollouts, experience):
        self.rollouts, self.experience = rollouts, experience
        self.starts.append(copy.deepcopy(pl_module.policy.model))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.metrics.append(dict(pl_module.step_metrics))


def grpo(model_folder, **options):
    defaults = {
        "num_generations": NUM_GENERATIONS,
        "max_completion_length": MAX_LENGTH,
        "max_grad_norm": 1e9,
        "importance_sampling": None,
        "optimizer": partial(SGD, lr=0.1),
    }
    return GRPO(model_folder, [small_tokens], **defaults | options)


def fit(module, data_file, *callbacks, batch_size=len(QUESTIONS), ckpt_path=None, **options):
    """Train; returns what the spy saw."""
    spy = Spy()
    data = PromptDataModule(data_file, batch_size=batch_size, max_prompt_length=128)
    make_trainer(spy, *callbacks, **options).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return spy


def row_logprobs(model, rollouts):
    """Of each row alone, without padding."""
    owners = [rollouts.prompts.prompt_ids[row // NUM_GENERATIONS] for row in range(rollouts.num_rows)]
    logprobs = []
    for prompt, response in zip(owners, rollouts.response_ids, strict=True):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logprobs.append(logits.log_softmax(-1)[torch.arange(len(response)), response])
    return logprobs


def update(model, loss, lr):
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= lr * parameter.grad


def assert_same_change(module, expected, start):
    changes, expected_changes = (
        {
            name: parameter.detach() - before.detach()
            for (name, parameter), before in zip(model.named_parameters(), start.parameters(), strict=True)
        }
        for model in (module.policy.model, expected)
    )
    torch.testing.assert_close(changes, expected_changes, rtol=1e-3, atol=2e-6)  # float32 weights of size 1
    assert max(float(change.abs().max()) for change in changes.values()) > 1e-3


# ---------------------------------------------------------------------------------------------------------- estimators


def mean(values):
    return sum(values) / len(values)


def deviation(values):
    return (sum((value - mean(values)) ** 2 for value in values) / (len(values) - 1)) ** 0.5


def rloo_advantages(groups):
    return [value - mean(group[:n] + group[n + 1 :]) for group in groups for n, value in enumerate(group)]


def normalized(values):
    return [(value - mean(values)) / (deviation(values) + 1e-4) for value in values]


def centred(groups):
    return [value - mean(group) for group in groups for value in group]


def over_batch_deviation(groups):
    whole = [value for group in groups for value in group]
    return [value / (deviation(whole) + 1e-4) for value in centred(groups)]


def lead(group):
    best, second = sorted(group, reverse=True)[:2]
    return [(value == best) * (best - second) / (deviation(group) + 1e-4) for value in group]


ESTIMATORS = {
    "pass@k": (
        {"advantage_estimator": "grpo_passk"},
        lambda groups: [value for group in groups for value in lead(group)],
    ),
    "RLOO": ({"advantage_estimator": "rloo", "scale_rewards": "none"}, rloo_advantages),
    "RLOO, normalized": (
        {"advantage_estimator": "rloo", "scale_rewards": "batch"},
        lambda groups: normalized(rloo_advantages(groups)),
    ),
    "Dr. GRPO": ({"loss_type": "dr_grpo", "scale_rewards": "none"}, centred),
    "batch deviation": ({"scale_rewards": "batch"}, over_batch_deviation),
}


@pytest.mark.parametrize("case", ESTIMATORS)
@pytest.mark.parametrize("beta", [0.0, 0.2], ids=["reward", "reward minus KL"])
@pytest.mark.parametrize("kl_estimator", ["k1", "k3"])
def test_a_step_follows_the_formula_of_the_estimator(model_folder, data_file, case, beta, kl_estimator):
    """On-policy, so that the ratios are 1. The penalty is beta times the sum over the row, before groups are
    compared."""
    options, advantages_of = ESTIMATORS[case]
    module = grpo(model_folder, beta=beta, kl=KLPenalty(kl_estimator, in_reward=True), **options)
    spy = fit(module, data_file)
    reference, model = AutoModelForCausalLM.from_pretrained(model_folder), copy.deepcopy(spy.starts[0])
    with torch.no_grad():
        old, initial = row_logprobs(model, spy.rollouts), row_logprobs(reference, spy.rollouts)
    kl = [mine - theirs for mine, theirs in zip(old, initial, strict=True)]
    if kl_estimator == "k3":
        kl = [(-difference).exp() + difference - 1 for difference in kl]
    rewards = [
        reward - beta * row.sum().item()
        for reward, row in zip(small_tokens(spy.rollouts.response_ids), kl, strict=True)
    ]
    groups = [rewards[start : start + NUM_GENERATIONS] for start in range(0, len(rewards), NUM_GENERATIONS)]
    logprobs = row_logprobs(model, spy.rollouts)
    losses = [-advantage * row.sum() for advantage, row in zip(advantages_of(groups), logprobs, strict=True)]
    denominator = len(losses) * MAX_LENGTH if case == "Dr. GRPO" else sum(map(len, logprobs))
    update(model, sum(losses) / denominator, lr=0.1)
    assert_same_change(module, model, spy.starts[0])
    if beta:
        assert spy.metrics[0]["actor/reward_kl_penalty"] == pytest.approx(
            mean([row.mean().item() for row in kl]), rel=1e-3
        )
        assert spy.metrics[0]["actor/reward_kl_penalty_coeff"] == beta
    assert spy.metrics[0]["reward"] == pytest.approx(mean(small_tokens(spy.rollouts.response_ids)))


def second_reward(completion_ids, **_):
    """Of a hundredth of the spread of `small_tokens`."""
    return [len(set(row)) / 100 for row in completion_ids]


def whitened(rows):
    values = torch.cat(rows)
    return [(row - values.mean()) * torch.rsqrt(values.var() + 1e-8) for row in rows]


def by_token(spy):
    """Of REINFORCE++: the reward less 0.2 times what is still to come of the KL."""
    rows = [row[mask] for row, mask in zip(spy.experience.kl_penalty, spy.experience.response_mask, strict=True)]
    to_come = [row.flip(0).cumsum(0).flip(0) for row in rows]
    return whitened([reward - kl for reward, kl in zip(small_tokens(spy.rollouts.response_ids), to_come, strict=True)])


def by_group(spy):
    groups = [
        small_tokens(spy.rollouts.response_ids)[start : start + NUM_GENERATIONS]
        for start in range(0, spy.rollouts.num_rows, NUM_GENERATIONS)
    ]
    lengths = map(len, spy.rollouts.response_ids)
    return whitened([torch.full((length,), value) for value, length in zip(centred(groups), lengths, strict=True)])


def weighed_by_length(spy):
    rewards, lengths = small_tokens(spy.rollouts.response_ids), list(map(len, spy.rollouts.response_ids))
    rows = []
    for start in range(0, spy.rollouts.num_rows, NUM_GENERATIONS):
        group = slice(start, start + NUM_GENERATIONS)
        pairs = list(zip(rewards[group], lengths[group], strict=True))
        baseline = sum(reward * length for reward, length in pairs) / sum(lengths[group])
        rows += [torch.full((length,), reward - baseline) for reward, length in pairs]
    return rows


def each_reward_for_itself(spy):
    total = torch.zeros(spy.rollouts.num_rows)
    for values, weight in zip(spy.rollouts.rewards.values(), (1.0, 3.0), strict=True):
        groups = torch.tensor(values).view(-1, NUM_GENERATIONS)
        total += weight * ((groups - groups.mean(-1, keepdim=True)) / (groups.std(-1, keepdim=True) + 1e-4)).flatten()
    rows = total / (total.std() + 1e-4)
    return [row.expand(length) for row, length in zip(rows, map(len, spy.rollouts.response_ids), strict=True)]


KL_IN_REWARD = {"beta": 0.2, "kl": KLPenalty("k1", in_reward=True)}


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("reinforce_plus_plus", KL_IN_REWARD, by_token),
        ("reinforce_plus_plus_baseline", {}, by_group),
        ("opo", {}, weighed_by_length),
        ("gdpo", {}, each_reward_for_itself),
    ],
)
def test_advantages_of_a_step_by_token(model_folder, data_file, name, options, expected):
    module = grpo(model_folder, advantage_estimator=name, **options)
    if name == "gdpo":
        rewards = [RewardFunction(small_tokens), RewardFunction(second_reward, weight=3.0)]
        module = GRPO(
            model_folder, rewards, advantage_estimator=name, num_generations=NUM_GENERATIONS, max_completion_length=8
        )
    spy = fit(module, data_file)
    experience = spy.experience
    assert experience.advantages.std() > 0.1
    found = [row[mask] for row, mask in zip(experience.advantages, experience.response_mask, strict=True)]
    torch.testing.assert_close(found, [row.float() for row in expected(spy)], rtol=1e-4, atol=1e-5)
    assert not experience.advantages[~experience.response_mask].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"advantage_estimator": "ppo"},
            "advantage_estimator must be one of 'grpo', 'rloo', 'gae', .*'gdpo', or .* by class_path, got 'ppo'",
        ),
        (
            {"advantage_estimator": "gdpo", "beta": 0.1, "kl": KLPenalty(in_reward=True)},
            "'gdpo' takes no KL penalty from the reward; leave in_reward out of kl",
        ),
        ({"advantage_estimator": "opo", "scale_rewards": "batch"}, "'opo' takes scale_rewards='group' or 'none', got"),
        (
            {"advantage_estimator": "opo", "num_generations": 1},
            "'opo' compares the rollouts .* or 'reinforce_plus_plus'",
        ),
        ({"advantage_estimator": "gae"}, r"'gae' needs a critic; 'gae' goes with critic=SeparateCritic\(\)"),
        ({"critic": SeparateCritic()}, "'grpo' does not use its critic; 'gae' goes with critic=.* and 'rloo', without"),
        (
            {"advantage_estimator": "rloo", "scale_rewards": "none", "critic": SharedTrunkCritic()},
            "'rloo' does not use its critic",
        ),
        ({"advantage_estimator": GAE()}, r"advantage_estimator=GAE needs a critic"),
        (
            {"num_generations": 1},
            "'grpo' compares the rollouts .*, got num_generations=1; use at least 2, or .*'gae' with",
        ),
        (
            {"num_generations": 1, "advantage_estimator": "rloo", "scale_rewards": "none"},
            "'rloo' compares the rollouts of a prompt, got num_generations=1; use at least 2, or .*'gae' with a critic",
        ),
        ({"advantage_estimator": "rloo"}, "'rloo' takes scale_rewards='none' or 'batch', got 'group'"),
        ({"scale_rewards": "row"}, "scale_rewards must be 'group', 'batch' or 'none', got 'row'"),
        ({"kl": KLPenalty(in_reward=True, target=0.1)}, "the KL target 0.1 needs a positive beta to begin with, got 0"),
        ({"kl": KLPenalty(in_reward=True, target=-1.0), "beta": 0.1}, "the KL target must be positive, got -1.0"),
        ({"delta": 2.0, "clip_ratio_c": 3.0}, "delta and clip_ratio_c both bound the loss of negative advantages"),
        ({"loss_type": "cispo"}, "surrogate='cispo' needs epsilon_high"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        grpo("no model is loaded", **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(GAE, gamma=1.1), r"gamma must lie in \[0, 1\], got 1.1"),
        (partial(GAE, lam=-0.1), r"lam must lie in \[0, 1\], got -0.1"),
        (partial(KLPenalty, target=0.1), "target=0.1 adapts a KL penalty in the reward; set in_reward=True"),
        (
            partial(KLPenalty, bias_correction=True, in_reward=True),
            "bias_correction mends .* leave it or in_reward out",
        ),
        (partial(ReinforcePlusPlus, gamma=2.0), r"gamma must lie in \[0, 1\], got 2.0"),
        (partial(PassAtK, "row"), "scale_rewards must be 'group', 'batch' or 'none', got 'row'"),
        (partial(EntropyTarget, target=0.0), "target and delta must be positive, got 0.0"),
        (partial(EntropyTarget, initial=2.0), "0 <= minimum <= initial <= maximum, got minimum=0.0, initial=2.0"),
        (partial(KLPenalty, "k9"), "the KL estimator must be one of k1, .*, got 'k9'"),
    ],
)
def test_a_part_refuses_what_it_cannot_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------------------------------------------- penalty


def test_a_penalty_without_weight_loads_no_reference_and_costs_no_pass(model_folder, data_file, monkeypatch):
    built = []
    build = Policy.build
    monkeypatch.setattr(Policy, "build", lambda *inputs, **options: built.append(inputs) or build(*inputs, **options))
    spy = fit(grpo(model_folder, kl=KLPenalty(in_reward=True)), data_file)
    assert len(built) == 1
    assert not {"timing_s/ref", "timing_s/old_log_prob", "kl", "actor/reward_kl_penalty"} & set(spy.metrics[0])
    fit(grpo(model_folder, kl=KLPenalty(in_reward=True), beta=0.1), data_file)
    assert len(built) == 3


def test_a_penalty_in_the_reward_is_not_in_the_loss_besides(model_folder, data_file):
    """Its weight goes into the advantages, which callbacks may change; without them nothing is left to learn from."""

    class NoAdvantages(RolloutCallback):
        def on_experience_end(self, trainer, pl_module, rollouts, experience):
            experience.advantages = torch.zeros_like(experience.advantages)

    changes = []
    for kl_in_reward in (True, False):
        module = grpo(model_folder, beta=0.5, kl=KLPenalty(in_reward=kl_in_reward))
        spy = fit(module, data_file, NoAdvantages())
        pairs = zip(module.policy.model.parameters(), spy.starts[0].parameters(), strict=True)
        changes.append(max(float((after - before).abs().max()) for after, before in pairs))
    assert changes[0] == 0
    assert changes[1] > 1e-3


@pytest.mark.parametrize("kl_target", [1e-3, 10.0], ids=["above the target", "below"])
def test_the_weight_of_the_penalty_follows_its_target_and_survives_a_checkpoint(
    model_folder, data_file, tmp_path, kl_target
):
    def module():
        return grpo(model_folder, beta=0.2, kl=KLPenalty(in_reward=True, target=kl_target, horizon=60))

    full = module()
    spy = fit(full, data_file, EveryStep(tmp_path), batch_size=2, max_epochs=2)
    expected = KLCoefficient(0.2, kl_target, 60)
    weights = []
    for metrics in spy.metrics:
        weights.append(expected.value)
        assert metrics["actor/reward_kl_penalty_coeff"] == pytest.approx(expected.value)
        expected.update(metrics["actor/reward_kl_penalty"], num_rows=2 * NUM_GENERATIONS)
    assert full.kl_coefficient.value == pytest.approx(expected.value)
    sign = 1 if kl_target == 1e-3 else -1
    assert weights == pytest.approx([0.2 * (1 + sign * 0.02) ** step for step in range(4)])
    resumed = module()
    fit(resumed, data_file, ckpt_path=tmp_path / "2.ckpt", batch_size=2, max_epochs=2)
    assert resumed.kl_coefficient.value == full.kl_coefficient.value


def test_a_constant_weight_may_be_changed_on_resuming(model_folder, data_file, tmp_path):
    """Only an adapted weight is part of the run; a constant one is a setting."""
    fit(grpo(model_folder, beta=0.2, kl=KLPenalty(in_reward=True)), data_file, EveryStep(tmp_path))
    resumed = grpo(model_folder, beta=0.1, kl=KLPenalty(in_reward=True))
    spy = fit(resumed, data_file, ckpt_path=tmp_path / "1.ckpt", max_epochs=2)
    assert [metrics["actor/reward_kl_penalty_coeff"] for metrics in spy.metrics] == [0.1]


# -------------------------------------------------------------------------------------------------------------- losses


LOSSES = {
    "wider above": ({"epsilon_high": 0.28}, PolicyLoss(0.2, 0.28)),
    "delta": ({"delta": 1.25}, PolicyLoss(0.2, delta=1.25)),
    "dual clip": ({"clip_ratio_c": 1.3}, PolicyLoss(0.2, clip_ratio_c=1.3)),
    "GSPO": (
        {"loss_type": "gspo", "epsilon": 3e-3, "epsilon_high": 4e-3},
        PolicyLoss(3e-3, 4e-3, importance_sampling_level="sequence", aggregation="sequence"),
    ),
    "LUSPO": (
        {"loss_type": "luspo", "epsilon": 3e-3, "epsilon_high": 4e-3},
        PolicyLoss(3e-3, 4e-3, importance_sampling_level="sequence", aggregation="sequence_sum"),
    ),
    "GMPO": ({"loss_type": "geo_mean", "epsilon": 0.01}, GMPO(0.01)),
    "DPPO": ({"loss_type": "dppo_tv", "epsilon": 3e-4}, DPPO("tv", 3e-4)),
    "CISPO": ({"loss_type": "cispo", "epsilon_high": 1.1}, PolicyLoss(epsilon_high=1.1, surrogate="cispo")),
}


def loss_of_rows(per_row, loss_type):
    """Losses of tokens, row by row, brought into one number."""
    if loss_type in ("gspo", "geo_mean"):
        return sum(row.mean() for row in per_row) / len(per_row)
    if loss_type == "luspo":
        return sum(row.sum() for row in per_row) / len(per_row)
    return sum(row.sum() for row in per_row) / sum(map(len, per_row))


@pytest.mark.parametrize("case", LOSSES)
def test_settings_of_the_loss_reach_the_updates(model_folder, data_file, case):
    """Three updates on the same rows, the later ones with ratios that are clipped."""
    options, policy_loss = LOSSES[case]
    loss_type = options.get("loss_type", "dapo")
    lr = {"luspo": 0.02, "gspo": 0.1}.get(loss_type, 0.4)
    module = grpo(model_folder, num_iterations=3, optimizer=partial(SGD, lr=lr), **options)
    assert module.objective.policy_loss == policy_loss
    spy = fit(module, data_file)
    model = copy.deepcopy(spy.starts[0])
    rewards = torch.tensor(small_tokens(spy.rollouts.response_ids)).view(-1, NUM_GENERATIONS)
    advantages = ((rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-4)).flatten()
    with torch.no_grad():
        old = row_logprobs(model, spy.rollouts)
    for _ in range(3):
        per_row = [
            policy_loss(new[None], before[None], advantage.expand(1, len(new)), torch.ones(1, len(new)).bool())[0][0]
            for new, before, advantage in zip(row_logprobs(model, spy.rollouts), old, advantages, strict=True)
        ]
        update(model, loss_of_rows(per_row, loss_type), lr)
    assert_same_change(module, model, spy.starts[0])
    clipped = "actor/pg_clipfrac_lower" if case in ("delta", "dual clip") else "clip_ratio/high_mean"
    assert spy.metrics[0][clipped] > 0


@pytest.mark.parametrize("loss_type", NAMES)
def test_the_gradient_is_the_same_for_any_number_of_micro_batches(model_folder, data_file, monkeypatch, loss_type):
    gradients = []
    for count in (1, 2, 8):
        plans = []

        def plan(prompt_index, *arguments, count=count, plans=plans):
            chunks = even_chunks(list(range(len(prompt_index))), count)
            plans.append([MicroBatch(rows, False, num_tokens=1, num_real_tokens=1) for rows in chunks])
            return plans[-1]

        monkeypatch.setattr("lit_specrl.models.scorer.plan_micro_batches", plan)
        module = grpo(model_folder, loss_type=loss_type, epsilon_high=0.2, beta=0.1, optimizer=partial(SGD, lr=1.0))
        spy = fit(module, data_file)
        assert {len(plan) for plan in plans} == {count}
        pairs = zip(module.policy.model.named_parameters(), spy.starts[0].parameters(), strict=True)
        gradients.append({name: before.detach() - after.detach() for (name, after), before in pairs})
        gradients[-1]["loss"] = torch.tensor(spy.metrics[0]["loss"])
    for others in gradients[1:]:
        torch.testing.assert_close(others, gradients[0], rtol=1e-4, atol=1e-5)
    assert max(float(gradient.abs().max()) for gradient in gradients[0].values()) > 1e-2


def test_the_algorithm_without_a_paper_is_the_module_itself(model_folder, data_file):
    """`GRPO` adds nothing to `RLVRModule`."""
    options = {
        "num_generations": NUM_GENERATIONS,
        "max_completion_length": MAX_LENGTH,
        "optimizer": partial(SGD, lr=0.1),
    }
    modules = [algorithm(model_folder, [small_tokens], **options) for algorithm in (GRPO, RLVRModule)]
    for module in modules:
        fit(module, data_file)
    first, second = (module.policy.state_dict() for module in modules)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("found", "got"),
    [(torch.zeros(4, 2), r"shape \(4, 2\)"), (torch.zeros(2, 2), r"shape \(2, 2\)"), ([0.0], "a list")],
)
def test_advantages_of_another_shape_are_told(found, got):
    class Own(AdvantageEstimator):
        def __call__(self, experience, num_generations):
            return found

    experience = padded_rows([[20]], [0] * 4, [[30, 31, 32]] * 4)
    with pytest.raises(ValueError, match=rf"Own must return .* shape \(4,\), one a row, or \(4, 3\), .* got {got}"):
        token_advantages(Own(), experience, 2)
