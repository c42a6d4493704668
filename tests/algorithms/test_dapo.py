"""DAPO in a real Trainer: which prompts it trains on, and what of them."""

import json
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader
from training import EveryStep, make_trainer, weights_of, without_clock

from lit_specrl import DAPO, GRPO, DynamicSampling, FormatReward, OverlongReward, PromptBatch, PromptDataModule
from lit_specrl.callbacks import RolloutCallback
from lit_specrl.losses import NAMES
from lit_specrl.models.policy import Policy

NUM_GENERATIONS, MAX_LENGTH = 4, 8
SGD = partial(torch.optim.SGD, lr=0.1)


@pytest.fixture
def data(tmp_path):
    """Prompts in this order, with their numbers as answers: `+` can have reward spread, `-` cannot, a blank is left
    out."""

    def data(marks, batch_size):
        rows = [
            {"question": f"Question {number}", "answer": str(number), "useful": mark == "+"}
            for number, mark in enumerate(marks)
            if mark != " "
        ]
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return PromptDataModule(str(path), batch_size=batch_size, max_prompt_length=64, shuffle=False)

    return data


def alternating(completions, useful, **columns):
    """0 and 1 in turn in useful groups, 1 for all rows of the others."""
    return [float(row % 2) if spread else 1.0 for row, spread in enumerate(useful)]


def small_tokens(completion_ids, useful, **columns):
    """Share of tokens below 64 in useful groups, a half for all rows of the others."""
    shares = [sum(token < 64 for token in ids) / len(ids) for ids in completion_ids]
    return [share if spread else 0.5 for share, spread in zip(shares, useful, strict=True)]


@pytest.mark.parametrize("reward", [alternating, "math.sqrt", FormatReward("a")])
def test_a_single_reward_needs_no_list(reward):
    names = [each.name for each in DAPO("model", reward).rewards.rewards]
    assert names in (["alternating", "overlong"], ["sqrt", "overlong"], ["format", "overlong"])


def dapo(model, rewards=(alternating,), **options):
    defaults = {
        "num_generations": NUM_GENERATIONS,
        "max_completion_length": MAX_LENGTH,
        "overlong_buffer": 0,
        "max_grad_norm": 1e9,
        "optimizer": SGD,
    }
    return DAPO(model, list(rewards), **defaults | options)


class Rounds(RolloutCallback):
    """By step: the prompts of each round of generation by number, those trained on, and what was reported."""

    def __init__(self):
        self.generated, self.trained, self.rollouts, self.experiences, self.metrics = [], [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.generated.append([])
        self.rollouts.append([])

    def on_rollout_end(self, trainer, pl_module, rollouts):
        self.generated[-1].append(numbers(rollouts))
        self.rollouts[-1].append(rollouts)

    def on_experience_end(self, trainer, pl_module, rollouts, experience):
        self.trained.append(numbers(rollouts))
        self.experiences.append((rollouts, experience))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.metrics.append(without_clock(pl_module.step_metrics))


def numbers(rollouts):
    return [int(number) for number in rollouts.prompts.answers]


def fit(module, data, *callbacks, ckpt_path=None, **options):
    """Train; returns what happened."""
    rounds = Rounds()
    make_trainer(rounds, *callbacks, **options).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return rounds


# ---------------------------------------------------------------------------------------------------- dynamic sampling


def test_groups_without_spread_are_replaced_by_the_prompts_that_come_next(model_folder, data):
    """Four groups wanted, in at most three rounds; as many prompts are drawn as the share of useful ones suggests.

    Step 2 finds all it needs. Step 3 lacks one of four, draws two, and both are useful. Step 4 runs out of rounds.
    """
    prompts = data("+--+-++-+++++++-++-----+--+---++", batch_size=4)
    rounds = fit(dapo(model_folder, dynamic_sampling=DynamicSampling(max_rounds=3)), prompts, limit_train_batches=4)
    assert rounds.generated == [
        [[0, 1, 2, 3], [4, 5, 6, 7]],
        [[8, 9, 10, 11]],
        [[12, 13, 14, 15], [16, 17]],
        [[18, 19, 20, 21], [22, 23, 24, 25], [26, 27, 28, 29]],
    ]
    assert rounds.trained == [[0, 3, 5, 6], [8, 9, 10, 11], [12, 13, 14, 16], [18, 19, 23, 26]]
    counts = ["rounds", "generated_groups", "dropped_groups", "surplus_groups", "missing_groups"]
    assert [[metrics[f"dynamic_sampling/{name}"] for name in counts] for metrics in rounds.metrics] == [
        [2, 8, 4, 0, 0],
        [1, 4, 0, 0, 0],
        [2, 6, 1, 1, 0],
        [3, 12, 8, 0, 2],
    ]


def test_rows_of_a_round_stay_with_their_prompts(model_folder, data):
    """Responses, rewards and log-probs of the groups trained on are those that were generated for them."""
    rounds = fit(dapo(model_folder, (small_tokens,)), data("-+-+++", batch_size=2), limit_train_batches=1)
    generated = {}
    for rollouts in rounds.rollouts[0]:
        for row in range(rollouts.num_rows):
            key = numbers(rollouts)[row // NUM_GENERATIONS], row % NUM_GENERATIONS
            generated[key] = rollouts.response_ids[row], rollouts.sampling_logprobs[row], rollouts.total_rewards[row]
    rollouts, experience = rounds.experiences[0]
    assert numbers(rollouts) == [1, 3]
    for row in range(rollouts.num_rows):
        ids, logprobs, reward = generated[numbers(rollouts)[row // NUM_GENERATIONS], row % NUM_GENERATIONS]
        length = len(ids)
        assert experience.response_ids[row, :length].tolist() == rollouts.response_ids[row] == ids
        torch.testing.assert_close(experience.sampling_logprobs[row, :length], torch.tensor(logprobs))
        assert experience.rewards[row].item() == pytest.approx(reward)


@pytest.mark.parametrize("max_generation_rounds", [1, 3])
def test_rounds_end_where_no_prompt_is_useful_and_nothing_is_learned(model_folder, data, max_generation_rounds):
    module = dapo(model_folder, dynamic_sampling=DynamicSampling(max_rounds=max_generation_rounds), beta=0.1)
    rounds = fit(module, data("-" * 8, batch_size=2), limit_train_batches=1)
    assert len(rounds.generated[0]) == max_generation_rounds
    assert rounds.trained == [[0, 1]]
    assert rounds.metrics[0]["dynamic_sampling/missing_groups"] == 2
    torch.testing.assert_close(weights_of(module), dict(Policy.build(model_folder).named_parameters()), rtol=0, atol=0)


@pytest.mark.parametrize("loss_type", NAMES)
def test_groups_that_stay_without_spread_do_not_dilute_the_gradient(model_folder, data, loss_type):
    """Two useful groups of four, and no round to replace the others: the update is that of the two alone."""
    options = {
        "loss_type": loss_type,
        "epsilon_high": 0.28,
        "beta": 0.1,
        "num_iterations": 2,
        "optimizer": partial(torch.optim.SGD, lr=0.01),
    }
    filled = dapo(model_folder, (small_tokens,), dynamic_sampling=DynamicSampling(max_rounds=1), **options)
    rounds = fit(filled, data("+--+", batch_size=4))
    assert rounds.trained == [[0, 1, 2, 3]]
    alone = GRPO(
        model_folder,
        [small_tokens],
        num_generations=NUM_GENERATIONS,
        max_completion_length=MAX_LENGTH,
        max_grad_norm=1e9,
        **options,
    )
    assert fit(alone, data("+  +", batch_size=2)).trained == [[0, 3]]
    # another batch is padded otherwise; "luspo" sums over tokens, so that its steps are the largest
    torch.testing.assert_close(weights_of(filled), weights_of(alone), rtol=0, atol=5e-6)


def test_without_dynamic_sampling_groups_without_spread_stay(model_folder, data):
    module = dapo(model_folder, (small_tokens,), dynamic_sampling=False)
    rounds = fit(module, data("+--+", batch_size=2))
    assert rounds.generated == [[[0, 1]], [[2, 3]]]
    assert not any(name.startswith("dynamic_sampling/") for name in rounds.metrics[0])


def test_rewards_and_lengths_are_reported_of_everything_that_was_generated(model_folder, data):
    """Eleven groups in three rounds; the four useful ones have mean 1/2 and deviation sqrt(1/3), the others 1 and 0."""
    rounds = fit(dapo(model_folder), data("+----++-+---", batch_size=4), limit_train_batches=1)
    assert rounds.generated == [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]]
    assert rounds.trained == [[0, 5, 6, 8]]
    lengths = [len(ids) for rollouts in rounds.rollouts[0] for ids in rollouts.response_ids]
    truncated = [cut for rollouts in rounds.rollouts[0] for cut in rollouts.truncated]
    metrics = rounds.metrics[0]
    assert metrics["reward"] == pytest.approx(9 / 11)
    assert metrics["rewards/alternating/mean"] == pytest.approx(9 / 11)
    assert metrics["reward_std"] == pytest.approx(4 / 11 / 3**0.5)
    assert metrics["frac_reward_zero_std"] == pytest.approx(7 / 11)
    assert metrics["completions/mean_length"] == pytest.approx(sum(lengths) / len(lengths))
    assert metrics["completions/min_length"] == min(lengths)
    assert metrics["completions/max_length"] == max(lengths)
    assert metrics["completions/clipped_ratio"] == pytest.approx(sum(truncated) / len(truncated))


def test_resumed_run_equals_the_uninterrupted_one(model_folder, data, tmp_path):
    """Eight steps in two passes over the data, in which the draws move the stream into its fourth epoch."""

    def run(*callbacks, ckpt_path=None):
        module = dapo(model_folder, (small_tokens,), optimizer=partial(torch.optim.AdamW, lr=1e-3), seed=3)
        prompts = data("+--+-++-+-", batch_size=2)
        rounds = fit(module, prompts, *callbacks, ckpt_path=ckpt_path, max_epochs=2, limit_train_batches=4)
        return module, rounds

    full, history = run(EveryStep(tmp_path))
    assert sum(len(step) > 1 for step in history.generated) >= 4
    for step in (1, 3, 4, 6):
        resumed, rest = run(ckpt_path=tmp_path / f"{step}.ckpt")
        assert rest.generated == history.generated[step:]
        assert rest.trained == history.trained[step:]
        assert rest.metrics == history.metrics[step:]
        torch.testing.assert_close(weights_of(resumed), weights_of(full), rtol=0, atol=0)


def test_a_loader_that_cannot_draw_is_refused(model_folder):
    batch = PromptBatch(uids=["a"], prompt_ids=[[5, 6]], prompts=["Hi"], answers=["5"], sources=["questions"])
    loader = DataLoader([batch], collate_fn=lambda batches: batches[0])
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    message = "dynamic_sampling draws fresh prompts from the training data, which DataLoader cannot give; train with a PromptD"
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(dapo(model_folder), train_dataloaders=loader)


def test_dynamic_sampling_of_single_rows_is_refused():
    with pytest.raises(ValueError, match="compares the rollouts of a prompt, got num_generations=1"):
        dapo("no model is loaded", num_generations=1)
    with pytest.raises(ValueError, match="max_rounds must be at least 1, got 0"):
        dapo("no model is loaded", dynamic_sampling=DynamicSampling(max_rounds=0))


# ----------------------------------------------------------------------------------------------------- overlong, clips


def overlong_rewards(module):
    return [reward for reward in module.rewards.rewards if isinstance(reward, OverlongReward)]


@pytest.mark.parametrize(("max_completion_length", "buffer"), [(100, 20), (256, 51), (3, 1)])
def test_overlong_responses_are_punished_over_the_last_fifth(max_completion_length, buffer):
    module = DAPO("no model is loaded", [alternating], max_completion_length=max_completion_length)
    (punishment,) = overlong_rewards(module)
    assert (punishment.max_completion_length, punishment.overlong_buffer) == (max_completion_length, buffer)
    assert punishment.weight == 1
    assert module.rewards.rewards[0].name == "alternating"  # the first reward decides what is correct in validation


def test_the_punishment_can_be_given_or_left_out():
    given = OverlongReward(50, 10, weight=0.5)
    assert overlong_rewards(DAPO("no model is loaded", [alternating, given])) == [given]
    assert overlong_rewards(DAPO("no model is loaded", [alternating], overlong_buffer=0)) == []
    (punishment,) = overlong_rewards(DAPO("no model is loaded", [alternating], overlong_buffer=7))
    assert punishment.overlong_buffer == 7
    rewards = [alternating]
    DAPO("no model is loaded", rewards)
    assert rewards == [alternating]  # the caller's list stays as it was


def test_the_punishment_is_part_of_the_reward(model_folder, data):
    """Responses of 8 tokens lose 1 with a buffer of 2, those of 7 lose a half."""
    rounds = fit(dapo(model_folder, overlong_buffer=2), data("++", batch_size=2))
    rollouts, _ = rounds.experiences[0]
    lengths = [len(ids) for ids in rollouts.response_ids]
    assert {7, 8} & set(lengths) and min(lengths) < 7
    cost = {7: 0.5, 8: 1.0}
    assert rollouts.total_rewards == [row % 2 - cost.get(length, 0.0) for row, length in enumerate(lengths)]


def test_defaults_are_those_of_the_paper():
    module = DAPO("no model is loaded", [alternating])
    loss = module.objective.policy_loss
    assert (loss.epsilon, loss.epsilon_high) == (0.2, 0.28)
    assert (loss.aggregation, module.dynamic_sampling, module.kl_coefficient.value) == ("token", DynamicSampling(), 0.0)
    assert not module.mask_truncated_completions
    assert DAPO("no model is loaded", [alternating], epsilon_high=0.4).objective.policy_loss.epsilon_high == 0.4


def test_truncated_rows_are_masked_besides_groups_without_spread(model_folder, data):
    module = dapo(model_folder, mask_truncated_completions=True, dynamic_sampling=DynamicSampling(max_rounds=1))
    rounds = fit(module, data("+-+-", batch_size=4))
    rollouts, experience = rounds.experiences[0]
    useful = [number % 2 == 0 for number in numbers(rollouts) for _ in range(NUM_GENERATIONS)]
    expected = [spread and not cut for spread, cut in zip(useful, rollouts.truncated, strict=True)]
    assert experience.loss_mask.any(-1).tolist() == expected
    assert {(spread, cut) for spread, cut in zip(useful, rollouts.truncated, strict=True)} >= {
        (True, True),
        (True, False),
    }
    whole = experience.response_mask & torch.tensor(expected)[:, None]
    torch.testing.assert_close(experience.loss_mask, whole)


def test_an_easy_reward_is_learned(model_folder, data):
    """The share of tokens below 64 is about a half at the beginning and would stay there without learning."""
    module = dapo(
        model_folder,
        (small_tokens,),
        overlong_buffer=None,
        num_minibatches=2,
        optimizer=partial(torch.optim.AdamW, lr=3e-3),
        max_grad_norm=1.0,
    )
    rounds = fit(module, data("+++-", batch_size=4), max_epochs=24)
    shares = [metrics["rewards/small_tokens/mean"] for metrics in rounds.metrics]
    assert sum(shares[:3]) / 3 < 0.6
    assert sum(shares[-3:]) / 3 > 0.75  # 0.875 when the three useful prompts reach 1
