"""Training on responses of several turns."""

import signal
from functools import partial
from typing import ClassVar

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from reuse_runs import Trace, fit, questions
from training import assert_identical, make_trainer, small_tokens, variety, weights_of

from lit_specrl import (
    GRPO,
    PPO,
    CalculatorEnvironment,
    Environment,
    EnvironmentReward,
    KLPenalty,
    NumericReward,
    Observation,
    Reward,
)
from lit_specrl.algorithms.closing import ClosingOnException
from lit_specrl.algorithms.evaluator import prediction_records
from lit_specrl.callbacks import PrefixCache, RolloutCallback
from lit_specrl.metrics import RolloutStatistics, TurnStatistics, merge
from lit_specrl.models.policy import Policy

GROUP = 4


class Echo(Environment):
    """Repeats the last character until a row has said enough; rewards each turn by its length."""

    closed: ClassVar[list] = []

    def __init__(self, turns: int = 3) -> None:
        self.turns = turns

    def step(self, text):
        self.turns -= 1
        return Observation(text[-1:] if self.turns else None, reward=len(text) / 10)

    def close(self):
        self.closed.append(self)


def grpo(model, rewards=(small_tokens,), **options):
    defaults = {
        "num_generations": GROUP,
        "max_completion_length": 40,
        "environment": Echo(),
        "optimizer": partial(torch.optim.SGD, lr=0.1),
    }
    return GRPO(model, list(rewards), **defaults | options)


def ppo(model, **options):
    options |= {"kl": KLPenalty("k1", in_reward=True), "optimizer": partial(torch.optim.SGD, lr=0.1), "lam": 0.9}
    return PPO(model, [small_tokens], num_generations=2, max_completion_length=40, environment=Echo(), **options)


class Garbage(RolloutCallback):
    """Replaces everything that stands at tokens of an environment, but the tokens."""

    def on_experience_end(self, trainer, pl_module, rollouts, experience):
        assert experience.observation_mask.any()
        if experience.kl_penalty is not None:
            assert not experience.kl_penalty[experience.observation_mask].any()
        for name in ("sampling_logprobs", "advantages", "old_logprobs", "reference_logprobs", "values", "returns"):
            values = getattr(experience, name)
            if values is not None:
                setattr(experience, name, values.masked_fill(experience.observation_mask, 1e4))


@pytest.mark.parametrize(
    "make",
    [
        partial(grpo, beta=0.1, entropy_coef=0.01, num_iterations=2),
        partial(grpo, loss_type="gspo", epsilon=3e-4, num_iterations=2),
        partial(ppo, beta=0.1),
    ],
    ids=["grpo", "gspo", "ppo"],
)
def test_what_stands_at_tokens_of_the_environment_does_not_matter(make, model_folder, tmp_path):
    """Log-probs, advantages, values and returns there: the weights and what the steps report are the same."""
    found = []
    for callbacks in ([], [Garbage()]):
        module = make(model_folder)
        trace = fit(module, questions(tmp_path), *callbacks)
        found.append((weights_of(module), trace.learned))
    assert_identical(found[0], found[1])
    before, after = Policy.build(model_folder).state_dict(), found[0][0]
    assert max(float((after[name] - weight).abs().max()) for name, weight in before.items()) > 1e-4


def test_the_critic_steps_over_them(model_folder, tmp_path):
    """Values there change neither advantages nor returns; at tokens of the policy they do."""

    class Spoiled(PPO):
        where = "observation_mask"

        def add_advantages(self, experience):
            experience.values = torch.rand(experience.values.shape, generator=torch.Generator().manual_seed(0))
            super().add_advantages(experience)
            kept = experience.advantages, experience.returns
            experience.values = experience.values.masked_fill(getattr(experience, self.where), 50.0)
            super().add_advantages(experience)
            self.same = all(map(torch.equal, kept, (experience.advantages, experience.returns)))
            assert not experience.advantages[~experience.policy_mask].any()

    for where, same in (("observation_mask", True), ("policy_mask", False)):
        module = Spoiled(model_folder, [small_tokens], num_generations=2, max_completion_length=40, environment=Echo())
        module.where = where
        fit(module, questions(tmp_path), max_steps=1)
        assert module.same is same


class Kept(RolloutCallback):
    def __init__(self):
        self.rollouts, self.experiences = [], []

    def on_experience_end(self, trainer, pl_module, rollouts, experience):
        self.rollouts.append(rollouts)
        self.experiences.append(experience)


def test_a_step_counts_what_the_policy_said(model_folder, tmp_path):
    """Lengths, tokens and the loss are of the policy's tokens; rewards are given turns, environments and their sum."""
    given = {}

    def look(completions, transcripts, turns, environments, environment_reward, **columns):
        given.update(turns=turns, environments=environments, reward=environment_reward)
        given.update(said=completions, whole=transcripts)
        assert not Echo.closed  # rewards may still ask them
        return [0.0] * len(completions)

    Echo.closed = []
    kept, module = Kept(), grpo(model_folder, [look, EnvironmentReward()])
    make_trainer(kept, max_steps=1).fit(module, datamodule=questions(tmp_path))
    (rollouts,), (experience,), metrics = kept.rollouts, kept.experiences, module.step_metrics
    lengths = [sum(not observed for observed in episode.observation_mask) for episode in rollouts.episodes]
    assert experience.loss_mask.sum(-1).tolist() == rollouts.policy_lengths == lengths
    assert metrics["completions/mean_length"] == pytest.approx(sum(lengths) / len(lengths))
    assert metrics["completions/max_length"] == max(lengths) < max(map(len, rollouts.response_ids))
    num_turns = [len(episode.turns) for episode in rollouts.episodes]
    assert metrics["environment/turns"] == pytest.approx(sum(num_turns) / len(num_turns)) and max(num_turns) == 3
    observed = sum(map(len, rollouts.response_ids)) - sum(lengths)
    assert metrics["environment/observation_tokens"] == pytest.approx(observed / len(lengths))
    assert metrics["environment/cut_by_length"] == pytest.approx(rollouts.finish_reasons.count("length") / len(lengths))
    assert given["turns"] == [episode.turns for episode in rollouts.episodes]
    rewards = [sum(len(text) / 10 for text in environment_turns(episode)) for episode in rollouts.episodes]
    assert given["reward"] == rollouts.rewards["environment"] == pytest.approx(rewards)
    assert given["environments"] == [episode.environment for episode in rollouts.episodes] == Echo.closed
    assert given["said"] == ["\n".join(turns) for turns in given["turns"]]
    assert given["whole"] == module.tokenizer.batch_decode(rollouts.response_ids, skip_special_tokens=True)


def test_an_answer_in_an_observation_is_none_of_the_policy(model_folder, tmp_path):
    """The environment writes the reference answer behind every turn."""

    class Tells(Echo):
        def step(self, text):
            self.turns -= 1
            return "5" if self.turns else None

    kept, module = Kept(), grpo(model_folder, [NumericReward(answer_format="number")], environment=Tells())
    data = questions(tmp_path)
    data.sources["validation"] = data.sources["train"]
    make_trainer(kept, max_steps=1).fit(module, datamodule=data)
    (rollouts,) = kept.rollouts
    assert sum("5" in text for text in rollouts.texts) > sum("5" in text for text in rollouts.said)
    rewards = NumericReward(answer_format="number")(["?"] * 8, rollouts.said, answer=["5"] * 8)
    assert rollouts.rewards["numeric"] == rewards


def environment_turns(episode):
    """Turns that it has heard: all but one that was cut."""
    return episode.turns[: 3 - episode.environment.turns]


def test_rounds_and_ranks_add_their_turns_up(model_folder, tmp_path):
    first, second = TurnStatistics(2, 4, 6, 1, 0), TurnStatistics(2, 2, 0, 0, 1)
    assert (first + second).metrics() == {
        "environment/turns": 1.5,
        "environment/observation_tokens": 1.5,
        "environment/cut_by_length": 0.25,
        "environment/cut_by_turns": 0.25,
    }
    kept = Kept()
    make_trainer(kept, max_steps=1).fit(grpo(model_folder), datamodule=questions(tmp_path))
    (rollouts,) = kept.rollouts
    half = rollouts.select_groups([1])
    assert half.episodes == rollouts.episodes[GROUP:] and (half + half).episodes == half.episodes * 2
    statistics = merge([RolloutStatistics.of(half, {}), RolloutStatistics.of(rollouts, {})])
    assert statistics.turns.num_rows == 3 * GROUP
    assert len(statistics.lengths) == 3 * GROUP


def test_evaluation_takes_the_same_turns(model_folder, tmp_path):
    data = questions(tmp_path)
    data.sources["validation"] = data.sources["predict"] = data.sources["train"]
    trace, module = Trace(), grpo(model_folder)
    trainer = make_trainer(trace)
    trainer.validate(module, datamodule=data, verbose=False)
    assert module.evaluation["val_accuracy"] > 0
    records = [record for batch in trainer.predict(module, datamodule=data) for record in batch]
    assert 3 in {len(episode.turns) for rollouts in trace.evaluation for episode in rollouts.episodes}
    assert records == [
        record for rollouts in trace.evaluation[2:] for record in prediction_records(rollouts.prompts, rollouts)
    ]
    assert all(record["completion_length"] >= len(record["turns"]) for record in records)


def test_the_first_turn_is_reused(model_folder, tmp_path):
    """Everything is kept of it, and nothing of what follows; rewards are asked where a row has further turns."""
    module, cache = grpo(model_folder, optimizer=partial(torch.optim.SGD, lr=0.0)), PrefixCache(acceptance="full")
    trace = fit(module, questions(tmp_path), cache, max_epochs=2)
    (first,), _, (second,), _ = trace.rounds
    firsts = [ids[: episode.first_turn_length] for ids, episode in zip(first.response_ids, first.episodes, strict=True)]
    assert second.request.prefixes == firsts
    assert [ids[: len(own)] for ids, own in zip(second.response_ids, firsts, strict=True)] == firsts
    assert second.response_ids != first.response_ids
    kept = {(row.uid, row.sample): row for row in cache.store}
    for row, episode in enumerate(second.episodes):
        cached = kept[second.prompts.uids[row // GROUP], row % GROUP]
        assert cached.token_ids.tolist() == second.response_ids[row][: episode.first_turn_length]
        assert (cached.reward_values is None) == (len(episode.turns) > 1)
        assert not torch.from_numpy(cached.previous_logprobs).isnan().any()
        known = second.known[row]
        assert known is None or len(episode.turns) == 1
    assert any(len(episode.turns) > 1 for episode in second.episodes)
    metrics = trace.metrics[2]
    assert metrics["prefix_cache/saved_tokens"] == sum(map(len, firsts))
    assert metrics["prefix_cache/reuse_fraction"] == pytest.approx(sum(map(len, firsts)) / sum(second.policy_lengths))


def test_a_resumed_run_is_the_uninterrupted_one(model_folder, tmp_path):
    """Environments live within a step; the prefix cache of first turns is in the checkpoint."""
    whole = grpo(model_folder)
    trace = fit(whole, questions(tmp_path), PrefixCache(1.5), max_epochs=3)
    saver = ModelCheckpoint(tmp_path / "saved", save_last=True)
    fit(grpo(model_folder), questions(tmp_path), PrefixCache(1.5), saver, max_epochs=2)
    resumed = grpo(model_folder)
    rest = fit(resumed, questions(tmp_path), PrefixCache(1.5), ckpt_path=saver.last_model_path, max_epochs=3)
    assert_identical(weights_of(resumed), weights_of(whole))
    assert rest.tokens == trace.tokens[4:]
    assert rest.of_cache("saved_tokens")[0] > 0


def test_dynamic_sampling_draws_whole_episodes(model_folder, tmp_path):
    kept = Kept()
    module = GRPO(
        model_folder,
        [variety],
        num_generations=2,
        max_completion_length=40,
        environment=Echo(),
        dynamic_sampling=True,
    )
    make_trainer(kept, max_steps=1).fit(module, datamodule=questions(tmp_path))
    assert [len(episode.observation_mask) for episode in kept.rollouts[0].episodes] == list(
        map(len, kept.rollouts[0].response_ids)
    )


def test_what_is_no_environment_is_refused(tiny_model):
    with pytest.raises(TypeError, match=r"environment must be an Environment, got <class .*Echo'>; give an instance"):
        grpo(tiny_model, environment=Echo)
    with pytest.raises(ValueError, match="reward 'environment' is what an environment gives; set environment"):
        grpo(tiny_model, [EnvironmentReward()], environment=None)
    with pytest.raises(ValueError, match="max_turns must be at least 1, got 0"):
        grpo(tiny_model, max_turns=0)


def test_kept_rewards_belong_to_an_environment(tiny_model):
    """Those of a checkpoint are asked again where its environment had other settings."""
    modules = [grpo(tiny_model, environment=Echo(2)), grpo(tiny_model, environment=Echo(3))]
    modules += [grpo(tiny_model, environment=CalculatorEnvironment()), grpo(tiny_model, environment=None)]
    assert len({module.worker.scored_by for module in modules}) == 4
    assert modules[0].worker.scored_by == grpo(tiny_model, environment=Echo(2)).worker.scored_by


# ------------------------------------------------------------------------------------------------- ends before the time


class Game(Echo):
    """Counts the open ones."""

    opened: ClassVar[list] = []

    def reset(self, row):
        self.opened.append(self)


class BreaksLate(Game):
    def step(self, text):
        if self.turns == 2 and "Hi" in self.row["prompt"]:
            raise OSError("no connection")
        return super().step(text)

    def reset(self, row):
        self.row = row
        super().reset(row)


class Held(Reward):
    """Holds something between calls, and may raise."""

    def __init__(self, error=None):
        super().__init__(name="held")
        self.error, self.is_held = error, False

    def __call__(self, prompts, completions, **columns):
        self.is_held = True
        if self.error:
            raise self.error
        return small_tokens(**columns)

    def close(self):
        self.is_held = False


class EndsAt(RolloutCallback):
    """Raises at a hook."""

    def __init__(self, hook, error):
        def end(*arguments):
            raise error

        setattr(self, hook, end)


@pytest.mark.parametrize(
    ("environment", "error_of_reward", "callback", "expected"),
    [
        (BreaksLate(), None, None, (RuntimeError, "BreaksLate.step raised OSError: no connection; in row")),
        (Game(), ValueError("no"), None, (RuntimeError, "reward 'held' failed: ValueError: no")),
        (Game(), KeyboardInterrupt(), None, (SystemExit, "1")),
        (Game(), None, EndsAt("on_rollout_end", ValueError("no")), (ValueError, "no")),
        (Game(), None, EndsAt("on_experience_end", ValueError("no")), (ValueError, "no")),
        (Game(), None, EndsAt("on_experience_end", KeyboardInterrupt()), (SystemExit, "1")),
    ],
    ids=["environment", "reward", "Ctrl-C in a reward", "behind the rollout", "behind the rewards", "Ctrl-C"],
)
def test_a_run_that_is_ended_closes_what_it_holds(
    environment, error_of_reward, callback, expected, model_folder, tmp_path
):
    """Lightning calls no `teardown` then."""
    Game.opened.clear()
    Game.closed.clear()
    reward, interrupt = Held(error_of_reward), signal.getsignal(signal.SIGINT)
    module = grpo(model_folder, [reward], environment=environment)
    try:
        with pytest.raises(expected[0], match=expected[1]):
            make_trainer(*([callback] if callback else [])).fit(module, datamodule=questions(tmp_path))
    finally:
        signal.signal(signal.SIGINT, interrupt)  # which Lightning ignores from then on
    assert len(Game.opened) == 2 * GROUP
    assert Game.closed == Game.opened
    assert not reward.is_held
    assert module.engine.policy is None


def test_predictions_are_closed_by_an_error_behind_them(model_folder, tmp_path):
    """They have no rewards, behind which environments are closed otherwise."""
    Game.opened.clear()
    Game.closed.clear()
    data = questions(tmp_path)
    data.sources["predict"] = data.sources["train"]
    with pytest.raises(ValueError, match="no"):
        make_trainer(EndsAt("on_predict_batch_end", ValueError("no"))).predict(
            grpo(model_folder, environment=Game()), datamodule=data
        )
    assert Game.closed == Game.opened != []


def test_one_trainer_closes_for_run_after_run(model_folder, tmp_path):
    """Another callback of the kind would be told of by Lightning."""
    data = questions(tmp_path)
    data.sources["validation"] = data.sources["train"]
    trainer, module = make_trainer(), grpo(model_folder, environment=Game())
    found = []
    for _ in range(2):
        trainer.validate(module, datamodule=data, verbose=False)
        found += [callback for callback in trainer.callbacks if isinstance(callback, ClosingOnException)]
    assert len(found) == 2 and found[0] is found[1]


def test_everything_is_closed_where_closing_raises(model_folder, tmp_path):
    class Clings(Game):
        def close(self):
            super().close()
            raise OSError("still open")

    Game.opened.clear()
    Game.closed.clear()
    reward = Held()
    module = grpo(model_folder, [reward], environment=Clings())
    with pytest.raises(RuntimeError, match=r"Clings.close raised OSError: still open; in row 0 of the prompt"):
        make_trainer().fit(module, datamodule=questions(tmp_path))
    assert Game.closed == Game.opened
    assert not reward.is_held
    assert module.engine.policy is None


def test_an_environment_of_no_threads_is_refused(tiny_model):
    environment = Game()
    environment.num_threads = 0
    with pytest.raises(ValueError, match="num_threads must be at least 1, got 0"):
        grpo(tiny_model, environment=environment)
