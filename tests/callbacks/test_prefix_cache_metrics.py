"""PrefixCache in a real Trainer: its control group, its metrics and its warnings."""

import math
import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from reuse_runs import FROZEN, GROUP, STEPS, grpo, rows_of, spread_but_why
from training import small_tokens

from lit_specrl import GRPO, PPO, PromptDataModule
from lit_specrl.callbacks import PrefixCache, RolloutCallback
from lit_specrl.callbacks.prefix_cache import reward_outruns_accuracy
from lit_specrl.data import ArithmeticSource
from lit_specrl.prefix_cache import BoundedShare, BySignal
from lit_specrl.prefix_cache.lenience import AdaptiveLenience

EVERYTHING = math.inf  # a lenience
NUM_ROWS = 2 * GROUP  # of a step


# ------------------------------------------------------------------------------------------------------- control group


def control_rows(rollouts):
    return [row for row, prefix in enumerate(rollouts.request.prefixes) if not prefix]


@pytest.mark.parametrize(("fraction", "count"), [(0.25, 1), (0.01, 1), (0.5, 2), (0.7, 3)])
def test_some_rows_of_each_group_are_fresh_and_others_in_each_step(run, fraction, count):
    """The policy stands still, so that fresh rows are those of a run without the cache."""
    _, expected = run(optimizer=FROZEN, max_epochs=6)
    _, trace = run(PrefixCache(EVERYTHING, control_fraction=fraction), optimizer=FROZEN, max_epochs=6)
    chosen = {}
    for (rollouts,), (plain,) in zip(trace.rounds[STEPS:], expected.rounds[STEPS:], strict=True):
        rows = control_rows(rollouts)
        assert [sum(row // GROUP == group for row in rows) for group in range(2)] == [count, count]
        assert [rollouts.response_ids[row] for row in rows] == [plain.response_ids[row] for row in rows]
        for group, uid in enumerate(rollouts.prompts.uids):
            chosen.setdefault(uid, []).append([row % GROUP for row in rows if row // GROUP == group])
    assert all(len(set(map(tuple, samples))) > 1 for samples in chosen.values())
    assert trace.of_cache("hit_fraction")[STEPS:] == [1 - count / GROUP] * 5 * STEPS


def test_reward_gap_compares_reused_and_fresh_rows_of_the_same_group(run):
    _, trace = run(PrefixCache(EVERYTHING, control_fraction=0.5))
    for (rollouts,), metrics in zip(trace.rounds[STEPS:], trace.metrics[STEPS:], strict=True):
        fresh, gaps = control_rows(rollouts), []
        for group in range(2):
            rewards = {row: rollouts.total_rewards[row] for row in range(group * GROUP, (group + 1) * GROUP)}
            apart = [[reward for row, reward in rewards.items() if (row in fresh) is side] for side in (False, True)]
            gaps.append(sum(apart[0]) / 2 - sum(apart[1]) / 2)
        assert metrics["prefix_cache/reward_gap"] == pytest.approx(sum(gaps) / 2)
        assert abs(sum(gaps)) > 1e-3
    assert not any("prefix_cache/reward_gap" in metrics for metrics in trace.metrics[:STEPS])


def test_single_rows_are_fresh_now_and_then(run, model_folder):
    module = PPO(model_folder, [small_tokens], num_generations=1, max_completion_length=6, optimizer=FROZEN)
    _, trace = run(PrefixCache(control_fraction=0.4), module=module, max_epochs=16)
    hits = trace.of_cache("hit_fraction")[STEPS:]
    assert 0.4 < sum(hits) / len(hits) < 0.8


# ------------------------------------------------------------------------------------------------------------- metrics

NAMES = {
    f"prefix_cache/{name}"
    for name in (
        "hit_fraction",
        "reuse_fraction",
        "full_reuse_fraction",
        "verified_length_mean",
        "cached_length_mean",
        "generated_tokens",
        "saved_tokens",
        "reward_gap",
        "drift",
        "age",
        "bytes",
        "block_length",
        "kl",
        "lenience",
    )
} | {"timing_s/verify"}


def test_everything_is_logged_under_its_name(run, tmp_path):
    run(PrefixCache(control_fraction=0.25), trainer={"logger": CSVLogger(tmp_path, name="", version="run")})
    header, *lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    last = dict(zip(header.split(","), lines[-1].split(","), strict=True))
    assert {name for name in last if name.startswith("prefix_cache/")} == {name for name in NAMES if "/" in name} - {
        "timing_s/verify"
    }
    assert all(last[name] for name in NAMES)


def test_the_metrics_are_what_they_say(run):
    """Recorded log-probs of a step belong to the policy that it began with; everything follows from them and the
    tokens."""
    sizes, scores, cache = [], [], PrefixCache(lenience=1.2)

    class Observer(RolloutCallback):
        def on_train_batch_start(self, *arguments):
            sizes.append(sum(row.num_bytes for row in cache.store))

        def on_rollout_start(self, trainer, pl_module, request):
            """Today's log-probs of all that is cached, also of what will be rejected."""
            rows = {
                (uid, sample): (prompt, cache.store.get(uid, sample).token_ids.tolist())
                for prompt, uid in enumerate(request.prompts.uids)
                for sample in range(GROUP)
                if cache.store.get(uid, sample) is not None
            }
            scored = (
                pl_module.scorer.response_logprobs(request.prompts, *map(list, zip(*rows.values(), strict=True)))
                if rows
                else []
            )
            scores.append({key: row.tolist() for key, row in zip(rows, scored, strict=True)})

    _, trace = run(cache, Observer())
    known = {}  # (step, tokens, log-probs at the last visit, log-probs when generated) of each row
    for step, ((rollouts,), experience, metrics) in enumerate(
        zip(trace.rounds, trace.experiences, trace.metrics, strict=True)
    ):
        drafts, reused, drift, kl, ages, num_whole = [], [], [], [], [], 0
        update = {}
        for row, key in enumerate(rows_of(rollouts)):
            ids, length = rollouts.response_ids[row], len(rollouts.request.prefix(row))
            now = experience.recorded_logprobs[row, : len(ids)].tolist()
            generated = list(now)
            if key in known:
                last_step, draft, verified, of_draft = known[key]
                drafts.append(len(draft))
                ages.append(step - last_step)
                reused.append(length)
                num_whole += length == len(ids)
                drift += [abs(new - old) for new, old in zip(now[:length], of_draft, strict=False)]
                changes = [new - old for new, old in zip(scores[step][key], verified, strict=True)]
                kl += [math.exp(change) - change - 1 for change in changes]
                generated[:length] = of_draft[:length]
            update[key] = step, ids, now, generated
        num_tokens = rollouts.num_tokens
        expected = {
            "hit_fraction": len(drafts) / NUM_ROWS,
            "reuse_fraction": sum(reused) / num_tokens,
            "full_reuse_fraction": num_whole / NUM_ROWS,
            "generated_tokens": num_tokens - sum(reused),
            "saved_tokens": sum(reused),
            "bytes": sizes[step],
            "lenience": 1.2,
        }
        if known.keys() & update.keys():
            expected |= {
                "verified_length_mean": sum(reused) / len(drafts),
                "cached_length_mean": sum(drafts) / len(drafts),
                "age": sum(ages) / len(drafts),
                "drift": sum(drift) / len(drift),
                "kl": sum(kl) / len(kl),
            }
            assert 0 < sum(reused) < num_tokens and expected["kl"] > 1e-4
        for name, value in expected.items():
            assert metrics[f"prefix_cache/{name}"] == pytest.approx(value, rel=1e-3, abs=1e-6), (step, name)
        known |= update
    assert len(trace.rounds) == 3 * STEPS


@pytest.mark.parametrize("target", [0.1, 0.4])
def test_adaptive_lenience_follows_the_kl_that_is_reported(run, target):
    adaptive = AdaptiveLenience(target=target, min_fraction=0.3, smoothing=0)
    _, trace = run(PrefixCache(adaptive_lenience=adaptive), max_epochs=5)
    expected = 1.0, 0.3
    for metrics in trace.metrics:
        assert (metrics["prefix_cache/lenience"], metrics["prefix_cache/cached_fraction"]) == pytest.approx(expected)
        if "prefix_cache/kl" in metrics:
            allowance = target / metrics["prefix_cache/kl"]
            expected = min(max(allowance, 1.0), math.exp(0.5)), min(max(allowance, 0.3), 1.0)
    assert len(set(trace.of_cache("lenience" if target == 0.4 else "cached_fraction"))) > 2


def test_a_policy_that_moves_too_fast_reuses_in_few_groups(run):
    """Groups have drafts for all of their rows or for none; those without are neither verified nor cut."""
    adaptive = AdaptiveLenience(target=1e-9, min_fraction=0.5)
    _, trace = run(PrefixCache(adaptive_lenience=adaptive), max_epochs=8)
    hits = trace.of_cache("hit_fraction")[STEPS:]
    assert {0.0, 0.5} < set(hits) <= {0.0, 0.5, 1.0}
    assert sum(hits) / len(hits) == pytest.approx(0.5, abs=0.2)
    assert set(trace.of_cache("cached_fraction")) == {0.5}


@pytest.mark.parametrize(
    ("max_reuses", "expected"), [(1, [0, 1, 0, 1, 0, 1]), (2, [0, 1, 1, 0, 1, 1]), (None, [0, 1, 1, 1, 1, 1])]
)
def test_responses_are_renewed_after_so_many_reuses_in_the_same_epoch(run, max_reuses, expected):
    _, trace = run(PrefixCache(lenience=20.0, max_reuses=max_reuses), max_epochs=6)
    assert trace.of_cache("hit_fraction") == [float(hit) for hit in expected for _ in range(STEPS)]


def test_rows_are_counted_by_why_they_reuse(run, model_folder):
    """ "Why?" is always worth a half; the groups of the others have spread."""
    cache = PrefixCache(float("inf"), reuse_policy=BySignal(informative=BoundedShare(0.5), renewal=0.0))
    _, trace = run(cache, module=grpo(model_folder, rewards=[spread_but_why], optimizer=FROZEN), max_epochs=2)
    assert not any("offer" in name for metrics in trace.metrics[:STEPS] for name in metrics)  # nothing to offer yet
    offers = {}
    for metrics, rounds in zip(trace.metrics[STEPS:], trace.rounds[STEPS:], strict=True):
        found = {name.rpartition("/")[2]: value for name, value in metrics.items() if "/offers/" in name}
        equal = sum("Why?" in prompt for rollouts in rounds for prompt in rollouts.prompts.prompts) / 2
        assert found == {name: share for name, share in (("equal", equal), ("informative", 1 - equal)) if share}
        assert metrics["prefix_cache/full_reuse_fraction"] == equal
        assert (metrics["prefix_cache/offered_fraction"] > 0.5) == (equal > 0)
        offers |= found
    assert set(offers) == {"equal", "informative"}


def test_drift_bound_ends_what_lenience_would_keep(run):
    _, free = run(PrefixCache(lenience=20.0), max_epochs=6)
    _, bounded = run(PrefixCache(lenience=20.0, drift_bound=0.1), max_epochs=6)
    largest = [max(metrics.get("prefix_cache/drift", 0.0) for metrics in trace.metrics) for trace in (bounded, free)]
    assert largest[0] < largest[1]
    assert sum(bounded.of_cache("saved_tokens")) < sum(free.of_cache("saved_tokens"))


# ------------------------------------------------------------------------------------------------------------ warnings


@pytest.mark.parametrize(("max_reuses", "num_warnings"), [(None, 1), (2, 0)])
def test_responses_that_are_never_renewed_are_warned_about_once(run, max_reuses, num_warnings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, trace = run(PrefixCache(lenience=math.inf, max_reuses=max_reuses), max_epochs=1 + -(-12 // STEPS))
    assert trace.of_cache("reuse_fraction")[STEPS] == 1.0
    assert sum("kept more than 98 %" in str(warning.message) for warning in caught) == num_warnings


def test_drafts_of_which_nothing_is_kept_are_warned_about_once(run):
    """Five steps with drafts must be useless in succession; steps of the first epoch have none."""
    sgd = partial(torch.optim.SGD, lr=50.0)
    with pytest.warns(UserWarning, match="PrefixCache kept less than 2 % of the cached tokens in 5 steps") as caught:
        _, trace = run(PrefixCache(lenience=1e-6), optimizer=sgd, max_epochs=5)
    assert max(trace.of_cache("reuse_fraction")) < 0.02
    assert sum("PrefixCache kept less" in str(warning.message) for warning in caught) == 1


def test_useful_drafts_are_not_warned_about(run, recwarn):
    _, trace = run(PrefixCache(), max_epochs=5)
    assert min(trace.of_cache("reuse_fraction")[STEPS:]) > 0.02
    assert not [warning for warning in recwarn if "PrefixCache kept" in str(warning.message)]


@pytest.mark.parametrize(
    ("rewards", "accuracies", "outruns"),
    [
        ([0.5, 0.6, 0.7], [0.40, 0.38, 0.35], True),
        ([0.1, 0.5, 0.6, 0.7], [0.1, 0.40, 0.38, 0.35], True),  # the last three count
        ([0.6, 0.7], [0.38, 0.35], False),
        ([], [], False),
        ([0.5, 0.6, 0.6], [0.40, 0.38, 0.35], False),
        ([0.5, 0.4, 0.7], [0.40, 0.38, 0.35], False),
        ([0.5, 0.6, 0.7], [0.40, 0.38, 0.38], False),
        ([0.5, 0.6, 0.7, 0.8], [0.40, 0.38, 0.35, 0.36], False),
        ([0.7, 0.6, 0.5], [0.35, 0.38, 0.40], False),
    ],
)
def test_reward_outruns_accuracy_where_one_rises_and_the_other_falls_twice(rewards, accuracies, outruns):
    assert reward_outruns_accuracy(list(zip(rewards, accuracies, strict=True))) is outruns


@pytest.mark.parametrize(("slope", "num_warnings"), [(-0.1, 2), (0.1, 0)])
def test_rewards_that_rise_while_accuracy_falls_are_warned_about(run, model_folder, recwarn, slope, num_warnings):
    """A validation after each of seven steps; three make a warning, and then counting begins anew."""
    warnings.simplefilter("always")
    module = None

    def scripted(completions, **columns):
        training = module.trainer.training
        return [0.1 * module.step if training else 1 + slope * module.step] * len(completions)

    module = GRPO(model_folder, [scripted], num_generations=2, max_completion_length=4)
    data = PromptDataModule(
        ArithmeticSource(14),
        validation=ArithmeticSource(2, split="validation"),
        batch_size=2,
        max_prompt_length=64,
    )
    run(PrefixCache(), module=module, data=data, max_epochs=1, trainer={"val_check_interval": 1})
    found = [warning for warning in recwarn if "training reward rises while validation" in str(warning.message)]
    assert len(found) == num_warnings
