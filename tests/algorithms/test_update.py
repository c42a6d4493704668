"""What a training step does to the weights, against the formulas written down once more, row by row."""

import copy

import pytest
import torch
from reuse_runs import spread_but_why
from training import QUESTIONS, make_trainer, with_many_stops
from transformers import AutoModelForCausalLM

from lit_specrl import GRPO, PromptDataModule
from lit_specrl.callbacks import RolloutCallback
from lit_specrl.models.scorer import Scorer

NUM_GENERATIONS, MAX_LENGTH = 3, 8


@pytest.fixture(scope="module")
def model_folder(tiny_model, tmp_path_factory):
    return with_many_stops(tiny_model, tmp_path_factory.mktemp("update") / "model", end=18)


class Spy(RolloutCallback):
    """Makes the engine's log-probs wrong by a known amount, and keeps what the step trained on."""

    def on_rollout_end(self, trainer, pl_module, rollouts):
        for row, logprobs in enumerate(rollouts.sampling_logprobs):
            rollouts.sampling_logprobs[row] = [value + 0.03 * (row - 6) for value in logprobs]
        rollouts.sampling_logprobs[1][0] -= 2  # a ratio of at least 7, beyond the bound of 3

    def on_experience_end(self, trainer, pl_module, rollouts, experience):
        self.rollouts = rollouts
        self.start = copy.deepcopy(pl_module.policy.model)


def train(model_folder, data_file, lr, max_grad_norm=1e9, **settings):
    """One training step; returns the module and what its callback saw."""
    spy = Spy()
    module = GRPO(
        model_folder,
        [spread_but_why],
        num_generations=NUM_GENERATIONS,
        max_completion_length=MAX_LENGTH,
        max_grad_norm=max_grad_norm,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr),
        **settings,
    )
    data = PromptDataModule(data_file, batch_size=len(QUESTIONS), max_prompt_length=128)
    make_trainer(spy).fit(module, datamodule=data)
    return module, spy


def all_distributions(model, rollouts, temperature):
    """Log-probs of all tokens at each place of each row, [R, V]."""
    owners = [rollouts.prompts.prompt_ids[row // NUM_GENERATIONS] for row in range(rollouts.num_rows)]
    return [
        (model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
        for prompt, response in zip(owners, rollouts.response_ids, strict=True)
    ]


def all_logprobs(distributions, rollouts):
    return [
        distribution[torch.arange(len(response)), response]
        for distribution, response in zip(distributions, rollouts.response_ids, strict=True)
    ]


def expected_updates(
    model,
    rollouts,
    lr,
    loss_type="dapo",
    temperature=1.0,
    beta=0.0,
    entropy_coef=0.0,
    num_iterations=1,
    num_minibatches=1,
    masked=False,
):
    """Apply the updates of a step to `model`; returns the mean of their losses. GRPO, clipped at 0.2, row by row."""
    with torch.no_grad():
        old = all_logprobs(
            all_distributions(model, rollouts, temperature), rollouts
        )  # also those of the reference: nothing was learned before
    rewards = torch.tensor(rollouts.rewards["spread_but_why"]).view(-1, NUM_GENERATIONS)
    advantages = ((rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-4)).flatten()
    takes_part = [not (masked and truncated) for truncated in rollouts.truncated]
    size = rollouts.num_rows // num_minibatches
    step_losses = []
    for rows in [range(part * size, (part + 1) * size) for part in range(num_minibatches)] * num_iterations:
        distributions = all_distributions(model, rollouts, temperature)
        new = all_logprobs(distributions, rollouts)
        losses = []
        for row in rows:
            ratio = (new[row] - old[row]).exp()
            surrogate = torch.min(ratio * advantages[row], ratio.clamp(0.8, 1.2) * advantages[row])
            mismatch = (old[row] - torch.tensor(rollouts.sampling_logprobs[row])).sum().exp()
            kl = (old[row] - new[row]).exp() - (old[row] - new[row]) - 1
            correction = mismatch if mismatch <= 3 else 0
            entropy = -(distributions[row].exp() * distributions[row]).sum(-1)
            losses.append((beta * kl - entropy_coef * entropy - correction * surrogate) * takes_part[row])
        if loss_type == "dapo":
            loss = sum(loss.sum() for loss in losses) / sum(len(old[row]) * takes_part[row] for row in rows)
        elif loss_type == "grpo":
            loss = sum(loss.mean() for loss in losses) / size
        elif loss_type == "dr_grpo":
            loss = sum(loss.sum() for loss in losses) / (size * MAX_LENGTH)
        step_losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= lr * parameter.grad
    return sum(step_losses) / len(step_losses)


CASES = {
    "dapo": {"lr": 1.0},
    "grpo, warm": {"lr": 1.0, "loss_type": "grpo", "temperature": 0.7},
    "dr_grpo, truncated rows masked": {"lr": 1.0, "loss_type": "dr_grpo", "masked": True},
    "two passes": {"lr": 0.1, "num_iterations": 2},
    "two passes with KL": {"lr": 0.1, "num_iterations": 2, "beta": 0.5},
    "entropy bonus": {"lr": 1.0, "entropy_coef": 0.3, "temperature": 0.7},
    "entropy bonus, truncated rows masked": {"lr": 1.0, "loss_type": "grpo", "entropy_coef": -0.3, "masked": True},
    "two minibatches": {"lr": 0.1, "num_minibatches": 2},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("micro_batch_tokens", "gradient_checkpointing"),
    [(10**6, False), (44, False), (1, True)],
    ids=["one micro-batch", "several, prompts shared", "one row each, checkpointed"],
)
def test_a_step_changes_the_weights_by_the_gradient_of_the_formula(
    model_folder, data_file, monkeypatch, case, micro_batch_tokens, gradient_checkpointing
):
    plans = []
    monkeypatch.setattr(
        "lit_specrl.models.scorer.Scorer.plan",
        lambda *arguments, plan=Scorer.plan: plans.append(plan(*arguments)) or plans[-1],
    )
    settings = dict(CASES[case])
    masked = settings.pop("masked", False)
    module, spy = train(
        model_folder,
        data_file,
        micro_batch_tokens=micro_batch_tokens,
        gradient_checkpointing=gradient_checkpointing,
        mask_truncated_completions=masked,
        **settings,
    )
    expected = AutoModelForCausalLM.from_pretrained(model_folder)
    start = {name: parameter.detach().clone() for name, parameter in expected.named_parameters()}
    loss = expected_updates(expected, spy.rollouts, masked=masked, **settings)

    lr = settings["lr"]
    changes, expected_changes = (
        {name: (parameter.detach() - start[name]) / lr for name, parameter in model.named_parameters()}
        for model in (module.policy.model, expected)
    )
    torch.testing.assert_close(changes, expected_changes, rtol=1e-3, atol=2e-5)  # float32 weights of size 1 and lr 0.1
    assert module.step_metrics["loss"] == pytest.approx(loss, abs=1e-5)
    assert max(float(change.abs().max()) for change in changes.values()) > 0.01

    lengths = {len(ids) for ids in spy.rollouts.response_ids}
    assert len(lengths) > 2  # rows of many lengths, some of them cut
    assert 0 < sum(spy.rollouts.truncated) < spy.rollouts.num_rows
    if micro_batch_tokens == 10**6:
        assert {len(plan) for plan in plans} == {1}
        assert all(micro_batch.share_prompts for plan in plans for micro_batch in plan)
    else:
        assert sum(len(plan) for plan in plans) >= 3
        assert any(micro_batch.share_prompts for plan in plans for micro_batch in plan) == (not gradient_checkpointing)


def test_what_an_update_reports_does_not_depend_on_micro_batches(model_folder, data_file):
    settings = {"lr": 0.1, "beta": 0.5, "num_iterations": 2}
    one, many = (
        train(model_folder, data_file, micro_batch_tokens=tokens, **settings)[0].step_metrics for tokens in (10**6, 44)
    )
    costs = [name for name in one if name.startswith(("timing_s/", "perf/"))]
    for name in set(one) - set(costs):
        assert many[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    assert {"loss", "kl", "entropy", "clip_ratio/high_mean", "actor/grad_norm"} <= set(one)
    assert one["kl"] > 0
    assert one["clip_ratio/region_mean"] > 0


def test_rows_without_advantage_are_not_computed(model_folder, data_file):
    """The three rows of "Why?" score the same; nothing of them enters the plan, unless a KL term or a bonus reaches
    them."""
    without, _ = train(model_folder, data_file, lr=1.0)
    with_kl, _ = train(model_folder, data_file, lr=1.0, beta=0.1)
    with_bonus, _ = train(model_folder, data_file, lr=1.0, entropy_coef=0.1)
    assert with_bonus.step_metrics["perf/rows_without_gradient"] == 0
    assert without.step_metrics["frac_reward_zero_std"] >= 0.25
    assert without.step_metrics["perf/rows_without_gradient"] >= 3
    assert with_kl.step_metrics["perf/rows_without_gradient"] == 0


def test_the_gradient_is_scaled_down_to_the_norm_asked_for(model_folder, data_file):
    free, _ = train(model_folder, data_file, lr=1.0)
    module, spy = train(model_folder, data_file, lr=1.0, max_grad_norm=0.25)
    change = torch.cat(
        [
            (after.detach() - before.detach()).flatten()
            for before, after in zip(spy.start.parameters(), module.policy.model.parameters(), strict=True)
        ]
    )
    assert change.norm().item() == pytest.approx(0.25, rel=1e-4)
    assert module.step_metrics["actor/grad_norm"] == pytest.approx(free.step_metrics["actor/grad_norm"])
    assert module.step_metrics["actor/grad_norm"] > 0.25
