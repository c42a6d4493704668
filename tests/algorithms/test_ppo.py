"""PPO in a real Trainer; its step against the formulas written down once more, row by row."""

import copy
from functools import partial

import lightning as L
import pytest
import torch
from training import QUESTIONS, EveryStep, make_trainer, small_tokens
from transformers import AutoModelForCausalLM

from lit_specrl import PPO, KLPenalty, PromptDataModule, SeparateCritic, SharedTrunkCritic
from lit_specrl.callbacks import RolloutCallback
from lit_specrl.models.scorer import Scorer

NUM_GENERATIONS, MAX_LENGTH = 3, 8
CRITICS = [SeparateCritic, SharedTrunkCritic]
SGD = torch.optim.SGD


def small_tokens_but_why(prompts, completion_ids, **columns):
    """The same, for all questions but "Why?"."""
    scores = small_tokens(completion_ids)
    return [None if "Why?" in prompt else score for prompt, score in zip(prompts, scores, strict=True)]


class Spy(RolloutCallback):
    """Begins with a policy apart from its reference and a critic that knows something; keeps what each step began
    with."""

    def on_train_start(self, trainer, pl_module):
        generator = torch.Generator().manual_seed(1)
        head = getattr(pl_module.critic, "head", None) or pl_module.policy.value_head
        with torch.no_grad():
            for parameter in pl_module.policy.model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
            for parameter in head.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)

    def on_experience_end(self, trainer, pl_module, rollouts, experience):
        self.rollouts = rollouts
        self.start = Learner(copy.deepcopy(pl_module.policy), copy.deepcopy(pl_module.critic))


def ppo(model_folder, critic, rewards=(small_tokens,), **options):
    defaults = {
        "num_generations": NUM_GENERATIONS,
        "max_completion_length": MAX_LENGTH,
        "max_grad_norm": 1e9,
        "optimizer": partial(SGD, lr=0.1),
    }
    return PPO(model_folder, list(rewards), critic, **defaults | options)


def questions(data_file, batch_size=len(QUESTIONS)):
    return PromptDataModule(data_file, batch_size=batch_size, max_prompt_length=128)


# ------------------------------------------------------------------------------------------------------------ one step


class Learner:
    """Policy and critic, computed row by row without padding."""

    def __init__(self, policy, critic):
        self.policy, self.critic = policy, critic
        separate = isinstance(critic, SeparateCritic)
        self.backbone, self.head = (
            (critic.backbone, critic.head) if separate else (policy.model.model, policy.value_head)
        )

    @property
    def policy_weights(self):
        return dict(self.policy.model.named_parameters())

    @property
    def critic_weights(self):
        return dict((self.critic if isinstance(self.critic, SeparateCritic) else self.head).named_parameters())

    def logprobs(self, prompt, response, temperature):
        return row_logprobs(self.policy.model, prompt, response, temperature)

    def values(self, prompt, response):
        hidden = self.backbone(torch.tensor([prompt + response])).last_hidden_state[0, len(prompt) - 1 : -1]
        return (hidden @ self.head.linear.weight.T + self.head.linear.bias).squeeze(-1)


def row_logprobs(model, prompt, response, temperature):
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1)[torch.arange(len(response)), response]


def discounted_sum(terms, factor):
    """Of each term and those after it, the later the more discounted."""
    return torch.stack([sum(factor**k * term for k, term in enumerate(terms[t:])) for t in range(len(terms))])


def expected_step(
    learner,
    reference,
    rollouts,
    gamma=1.0,
    lam=1.0,
    whiten_advantages=True,
    beta=0.0,
    kl=KLPenalty("k1", in_reward=True),
    temperature=1.0,
    num_iterations=1,
    num_minibatches=1,
    masked=False,
):
    """Apply the updates of a step to the learner; returns what it should report. PPO, clipped at 0.2."""
    owners = [rollouts.prompts.prompt_ids[row // NUM_GENERATIONS] for row in range(rollouts.num_rows)]
    pairs = list(zip(owners, rollouts.response_ids, strict=True))
    rewards = rollouts.total_rewards
    counted = [
        row for row in range(len(pairs)) if rewards[row] is not None and not (masked and rollouts.truncated[row])
    ]
    with torch.no_grad():
        old = [learner.logprobs(*pair, temperature) for pair in pairs]
        from_reference = [row_logprobs(reference, *pair, temperature) for pair in pairs]
        old_values = [learner.values(*pair) for pair in pairs]
    advantages, returns = [], []
    for row in range(len(pairs)):
        token_rewards = torch.zeros(len(old[row]))
        if kl.in_reward:
            token_rewards -= beta * (old[row] - from_reference[row])
        token_rewards[-1] += rewards[row] or 0.0
        next_values = torch.cat([old_values[row][1:], torch.zeros(1)])
        deltas = token_rewards + gamma * next_values - old_values[row]
        advantages.append(discounted_sum(deltas, gamma * lam))
        returns.append(advantages[row] + old_values[row])
    if whiten_advantages:
        of_all = torch.cat([advantages[row] for row in counted])
        advantages = [(advantage - of_all.mean()) / of_all.std() for advantage in advantages]

    size = len(pairs) // num_minibatches
    value_losses, clipped = [], []
    for minibatch in [range(part * size, (part + 1) * size) for part in range(num_minibatches)] * num_iterations:
        rows = [row for row in minibatch if row in counted]
        num_tokens = sum(len(old[row]) for row in rows)
        policy_loss = value_loss = 0.0
        for row in rows:
            new = learner.logprobs(*pairs[row], temperature)
            ratio = (new - old[row]).exp()
            policy_loss -= torch.min(ratio * advantages[row], ratio.clamp(0.8, 1.2) * advantages[row]).sum()
            if not kl.in_reward:
                policy_loss += beta * (new - from_reference[row]).square().sum() / 2
            values = learner.values(*pairs[row])
            range_ = learner.critic.cliprange_value
            near = torch.maximum(torch.minimum(values, old_values[row] + range_), old_values[row] - range_)
            errors, near_errors = (values - returns[row]).square(), (near - returns[row]).square()
            value_loss += torch.max(errors, near_errors).sum() / 2
            clipped += (near_errors > errors).tolist()
        policy_loss, value_loss = policy_loss / num_tokens, value_loss / num_tokens
        value_losses += [value_loss.item()] * num_tokens
        policy_lr, critic_lr = 0.1, 0.05
        coefficient = getattr(learner.critic, "coefficient", 1.0)
        for weights in (learner.policy_weights, learner.critic_weights):
            for weight in weights.values():
                weight.grad = None
        (policy_loss + coefficient * value_loss).backward()
        with torch.no_grad():
            for weights, lr in [(learner.policy_weights, policy_lr), (learner.critic_weights, critic_lr)]:
                for weight in weights.values():
                    weight -= lr * weight.grad
    all_returns, all_values = (torch.cat([tensors[row] for row in counted]) for tensors in (returns, old_values))
    return {
        "critic/vf_loss": sum(value_losses) / len(value_losses),
        "critic/vf_clipfrac": sum(clipped) / len(clipped),
        "critic/values/mean": all_values.mean().item(),
        "critic/returns/mean": all_returns.mean().item(),
        "critic/vf_explained_var": 1 - ((all_returns - all_values).var() / (all_returns.var() + 1e-5)).item(),
    }


CASES = {
    "returns as they are": {},
    "discounted, traced": {"gamma": 0.9, "lam": 0.8},
    "not whitened": {"gamma": 0.9, "lam": 0.8, "whiten_advantages": False},
    "warm": {"temperature": 0.7},
    "KL in the reward": {"beta": 0.3, "gamma": 0.9, "lam": 0.8},
    "KL in the loss": {"beta": 0.3, "kl": KLPenalty("k2")},
    "several updates": {"num_iterations": 2, "num_minibatches": 2, "beta": 0.3, "lam": 0.8},
    "truncated rows masked": {"masked": True, "lam": 0.8},
    "unscored rows": {"rewards": (small_tokens_but_why,), "beta": 0.3, "lam": 0.8},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("critic_class", CRITICS)
@pytest.mark.parametrize("micro_batch_tokens", [10**6, 44], ids=["one micro-batch", "several"])
def test_a_step_changes_the_weights_by_the_gradient_of_the_formula(
    model_folder, data_file, monkeypatch, case, critic_class, micro_batch_tokens
):
    plans = []
    monkeypatch.setattr(
        Scorer, "plan", lambda *arguments, plan=Scorer.plan: plans.append(plan(*arguments)) or plans[-1]
    )
    settings = dict(CASES[case])
    masked, rewards = settings.pop("masked", False), settings.pop("rewards", (small_tokens,))
    critic = critic_class(optimizer=partial(SGD, lr=0.05), cliprange_value=0.05, max_grad_norm=1e9)
    module, spy = (
        ppo(
            model_folder,
            critic,
            rewards,
            importance_sampling=None,
            micro_batch_tokens=micro_batch_tokens,
            mask_truncated_completions=masked,
            **settings,
        ),
        Spy(),
    )
    make_trainer(spy).fit(module, datamodule=questions(data_file))

    reference = AutoModelForCausalLM.from_pretrained(model_folder)
    before = copy.deepcopy(spy.start)
    metrics = expected_step(spy.start, reference, spy.rollouts, masked=masked, **settings)
    after = Learner(module.policy, module.critic)
    for weights in ("policy_weights", "critic_weights"):
        changes, expected_changes = (
            {name: weight.detach() - getattr(before, weights)[name].detach() for name, weight in learner.items()}
            for learner in (getattr(after, weights), getattr(spy.start, weights))
        )
        torch.testing.assert_close(changes, expected_changes, rtol=1e-3, atol=2e-6)  # float32 weights of size 1
        assert max(float(change.abs().max()) for change in changes.values()) > 1e-3
    for name, value in metrics.items():
        assert module.step_metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name

    assert len({len(ids) for ids in spy.rollouts.response_ids}) > 2  # rows of many lengths, some of them cut
    assert 0 < sum(spy.rollouts.truncated) < spy.rollouts.num_rows
    assert (max(len(plan) for plan in plans) == 1) is (micro_batch_tokens == 10**6)
    if case == "several updates":
        assert 0.05 < metrics["critic/vf_clipfrac"] < 0.95
        assert module.step_metrics["clip_ratio/region_mean"] > 0


@pytest.mark.parametrize("critic_class", CRITICS)
def test_policy_and_critic_are_scaled_down_to_their_own_norms(model_folder, data_file, critic_class):
    critic = critic_class(optimizer=partial(SGD, lr=1.0), max_grad_norm=0.01)
    module, spy = ppo(model_folder, critic, max_grad_norm=0.02, optimizer=partial(SGD, lr=1.0)), Spy()
    make_trainer(spy).fit(module, datamodule=questions(data_file))
    after = Learner(module.policy, module.critic)
    for weights, norm in [("policy_weights", 0.02), ("critic_weights", 0.01)]:
        before, now = getattr(spy.start, weights), getattr(after, weights)
        change = torch.cat([(now[name] - before[name]).detach().flatten() for name in now])
        assert change.norm().item() == pytest.approx(norm, rel=1e-3)
    assert module.step_metrics["actor/grad_norm"] > 0.02
    assert module.step_metrics["critic/grad_norm"] > 0.01


# ---------------------------------------------------------------------------------------------------------- whole runs


class History(L.Callback):
    """Weights and counts after every step."""

    def __init__(self):
        self.policy_weights, self.critic_weights, self.metrics, self.policy_updates = [], [], [], []
        self.trunk_has_gradient = []

    def on_train_start(self, trainer, pl_module):
        self.remember(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.remember(pl_module)
        self.metrics.append(dict(pl_module.step_metrics))
        self.policy_updates.append((pl_module.policy_version, trainer.global_step))
        gradients = [parameter.grad for parameter in pl_module.policy.model.parameters()]
        self.trunk_has_gradient.append(any(gradient is not None and bool(gradient.any()) for gradient in gradients))

    def remember(self, pl_module):
        learner = Learner(pl_module.policy, pl_module.critic)
        self.policy_weights.append({name: weight.detach().clone() for name, weight in learner.policy_weights.items()})
        self.critic_weights.append({name: weight.detach().clone() for name, weight in learner.critic_weights.items()})

    @property
    def learned(self):
        """The metrics without what the clock says."""
        return [
            {
                name: value
                for name, value in metrics.items()
                if not name.startswith("timing_s/") and not name.endswith("_per_s")
            }
            for metrics in self.metrics
        ]


def changed(before, after):
    """Names of the weights that differ in any bit."""
    return {name for name in after if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("critic_class", CRITICS)
def test_in_the_warm_up_the_critic_learns_and_the_policy_does_not(model_folder, data_file, critic_class):
    """Four steps of two updates, the first two of them warm-up; what Lightning counts are updates of the policy."""
    critic, history = critic_class(optimizer=partial(SGD, lr=0.05), warmup_steps=2), History()
    module = ppo(model_folder, critic, num_minibatches=2)
    make_trainer(history, max_epochs=2).fit(module, datamodule=questions(data_file, batch_size=2))
    policy, critics = history.policy_weights, history.critic_weights
    assert [bool(changed(policy[step], policy[step + 1])) for step in range(4)] == [False, False, True, True]
    assert [bool(changed(critics[step], critics[step + 1])) for step in range(4)] == [True] * 4
    assert history.policy_updates == [(0, 0), (0, 0), (2, 2), (4, 4)]
    assert history.trunk_has_gradient == [False, False, True, True]  # nothing is computed that nobody applies
    assert changed(policy[2], policy[3]) == set(policy[0])
    assert ["actor/grad_norm" in metrics for metrics in history.metrics] == [False, False, True, True]
    assert all(metrics["critic/grad_norm"] > 0 for metrics in history.metrics)


@pytest.mark.parametrize("critic_class", CRITICS)
def test_optimizer_and_schedule_of_the_critic_are_its_own(model_folder, data_file, critic_class):
    """Rates change once a step, however many updates it has and whether the policy warms up or not."""
    decay = torch.optim.lr_scheduler.ExponentialLR
    critic = critic_class(
        optimizer=partial(torch.optim.Adagrad, lr=1e-2), lr_scheduler=partial(decay, gamma=0.1), warmup_steps=1
    )
    module, history = ppo(model_folder, critic, num_minibatches=2, lr_scheduler=partial(decay, gamma=0.5)), History()
    make_trainer(history, max_epochs=2).fit(module, datamodule=questions(data_file, batch_size=2))
    rates = [[metrics[f"{name}/lr"] for metrics in history.metrics] for name in ("actor", "critic")]
    assert rates[0] == pytest.approx([0.1, 0.05, 0.025, 0.0125])
    assert rates[1] == pytest.approx([1e-2, 1e-3, 1e-4, 1e-5])
    of_policy, of_critic = module.optimizers(use_pl_optimizer=False)
    assert (type(of_policy), type(of_critic)) == (SGD, torch.optim.Adagrad)
    owned = [
        {id(weight) for group in each.param_groups for weight in group["params"]} for each in (of_policy, of_critic)
    ]
    learner = Learner(module.policy, module.critic)
    assert owned == [
        {id(weight) for weight in weights.values()} for weights in (learner.policy_weights, learner.critic_weights)
    ]


@pytest.mark.parametrize("critic_class", CRITICS)
def test_a_critic_that_has_a_schedule_alone_keeps_the_rate_of_the_policy(model_folder, data_file, critic_class):
    critic = critic_class(lr_scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.1))
    module, history = ppo(model_folder, critic), History()
    make_trainer(history).fit(module, datamodule=questions(data_file, batch_size=2))
    assert [metrics["actor/lr"] for metrics in history.metrics] == [0.1, 0.1]
    assert [metrics["critic/lr"] for metrics in history.metrics] == pytest.approx([1e-5, 1e-6])


def test_metrics_of_the_critic_are_there(model_folder, data_file):
    names = {f"critic/{name}" for name in ("vf_loss", "vf_clipfrac", "vf_explained_var", "grad_norm", "lr")}
    names |= {"critic/values/mean", "critic/returns/mean", "loss", "actor/grad_norm"}
    separate, shared = (ppo(model_folder, critic_class()) for critic_class in CRITICS)
    for module in (separate, shared):
        make_trainer().fit(module, datamodule=questions(data_file))
        assert names <= set(module.step_metrics)
    assert {"timing_s/values", "timing_s/update_critic"} <= set(separate.step_metrics)
    assert not {"timing_s/values", "timing_s/update_critic"} & set(shared.step_metrics)


@pytest.mark.parametrize("critic_class", CRITICS)
def test_resumed_run_equals_the_uninterrupted_one(model_folder, data_file, tmp_path, critic_class):
    """Six steps in three epochs, resumed inside the warm-up, after it inside an epoch, and at the end of one."""
    adam, decay = torch.optim.AdamW, torch.optim.lr_scheduler.ExponentialLR

    def run(*callbacks, ckpt_path=None):
        critic = critic_class(optimizer=partial(adam, lr=1e-3), lr_scheduler=partial(decay, gamma=0.8), warmup_steps=2)
        module, history = (
            ppo(
                model_folder,
                critic,
                optimizer=partial(adam, lr=2e-3),
                lr_scheduler=partial(decay, gamma=0.9),
                num_minibatches=2,
                beta=0.1,
                kl=KLPenalty("k1", in_reward=True, target=1e-3, horizon=100),
            ),
            History(),
        )
        trainer = make_trainer(history, *callbacks, max_epochs=3)
        trainer.fit(module, datamodule=questions(data_file, batch_size=2), ckpt_path=ckpt_path)
        return module, history

    full, history = run(EveryStep(tmp_path))
    prices = [metrics["actor/reward_kl_penalty_coeff"] for metrics in history.metrics]
    assert prices[0] == 0.1 and prices[2] != prices[5]
    for step in (1, 3, 4):
        resumed, rest = run(ckpt_path=tmp_path / f"{step}.ckpt")
        assert rest.learned == history.learned[step:]
        for weights in ("policy_weights", "critic_weights"):
            assert not changed(getattr(history, weights)[-1], getattr(rest, weights)[-1])
        for mine, theirs in zip(resumed.optimizers(), full.optimizers(), strict=True):
            torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=0, atol=0)
        assert resumed.kl_coefficient.value == full.kl_coefficient.value
        assert resumed.policy_version == resumed.trainer.global_step == 8


@pytest.mark.parametrize("critic_class", CRITICS)
def test_an_easy_reward_is_learned(model_folder, data_file, critic_class):
    """The share of tokens below 64 is about a half at the beginning and would stay there without learning."""
    critic = critic_class(optimizer=partial(torch.optim.AdamW, lr=3e-3), warmup_steps=2)
    module = ppo(
        model_folder, critic, num_minibatches=2, optimizer=partial(torch.optim.AdamW, lr=3e-3), max_grad_norm=1.0
    )
    history = History()
    make_trainer(history, max_epochs=24).fit(module, datamodule=questions(data_file))
    rewards = [metrics["reward"] for metrics in history.metrics]
    assert sum(rewards[:3]) / 3 < 0.65
    assert sum(rewards[-3:]) / 3 > 0.8
    assert history.metrics[-1]["critic/vf_loss"] < history.metrics[0]["critic/vf_loss"]
