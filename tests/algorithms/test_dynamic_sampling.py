from math import nan

import pytest
import torch

from lit_specrl.algorithms.dynamic_sampling import GroupSelection, groups_to_draw, groups_with_spread
from lit_specrl.types import PromptBatch, RolloutRequest, Rollouts, SamplingConfig


@pytest.mark.parametrize(
    ("rewards", "num_generations", "expected"),
    [
        ([0, 1, 1, 1, 0, 0], 2, [True, False, False]),
        ([0, 0, 1, 2, 2, 2], 3, [True, False]),
        ([-1, -2, -3, -3], 2, [True, False]),
        ([nan, 1, 1, 0, nan, 1], 3, [False, True]),
        ([nan, 1, nan, nan, 0, 1], 2, [False, False, True]),
        ([nan, -1, -1, 1, nan, 1], 3, [False, False]),
        ([nan] * 4, 4, [False]),
        ([0, 1], 1, [False, False]),
        ([0.3] * 8, 8, [False]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_group_has_spread_when_two_scored_rows_differ(rewards, num_generations, expected):
    assert groups_with_spread(torch.tensor(rewards, dtype=torch.float32), num_generations).tolist() == expected


def rollouts_of(**groups):
    """Two rows for each name; its rewards are what the name is given."""
    names = list(groups)
    rewards = [reward for group in groups.values() for reward in group]
    return Rollouts(
        request=RolloutRequest(
            PromptBatch(
                uids=names,
                prompt_ids=[[5]] * len(names),
                prompts=names,
                answers=[None] * len(names),
                sources=["test"] * len(names),
            ),
            SamplingConfig(2, 4),
            seeds=list(range(len(rewards))),
            policy_version=0,
        ),
        response_ids=[[6]] * len(rewards),
        sampling_logprobs=[[-1.0]] * len(rewards),
        finish_reasons=["stop"] * len(rewards),
        policy_version=0,
        elapsed_s=1.0,
        total_rewards=rewards,
    )


def counts(rounds, generated, dropped, surplus, missing):
    return {
        "dynamic_sampling/rounds": rounds,
        "dynamic_sampling/generated_groups": generated,
        "dynamic_sampling/dropped_groups": dropped,
        "dynamic_sampling/surplus_groups": surplus,
        "dynamic_sampling/missing_groups": missing,
    }


EQUAL, SPREAD = (1.0, 1.0), (0.0, 1.0)


def test_one_round_is_enough_when_every_group_has_spread():
    rollouts = rollouts_of(a=SPREAD, b=(1.0, 0.5))
    selection = GroupSelection(num_groups=2)
    selection.add(rollouts)
    assert selection.num_missing == 0
    assert selection.result() == rollouts.select_groups([0, 1])
    assert selection.metrics() == counts(rounds=1, generated=2, dropped=0, surplus=0, missing=0)


def test_later_rounds_replace_groups_without_spread():
    selection = GroupSelection(num_groups=3)
    selection.add(rollouts_of(a=EQUAL, b=SPREAD, c=(None, 1.0)))
    assert (selection.num_generated, selection.num_useful, selection.num_missing) == (3, 1, 2)
    assert selection.metrics() == counts(rounds=1, generated=3, dropped=0, surplus=0, missing=2)
    selection.add(rollouts_of(d=(0.25, 0.75), e=EQUAL, f=(1.0, 0.0), g=SPREAD))
    assert (selection.num_generated, selection.num_useful, selection.num_missing) == (7, 4, 0)
    result = selection.result()
    assert result.prompts.uids == ["b", "d", "f"]
    assert result.total_rewards == [0.0, 1.0, 0.25, 0.75, 1.0, 0.0]
    assert result.elapsed_s == 2
    assert selection.metrics() == counts(rounds=2, generated=7, dropped=3, surplus=1, missing=0)


def test_groups_without_spread_fill_up_where_too_few_have_it():
    selection = GroupSelection(num_groups=3)
    selection.add(rollouts_of(a=EQUAL, b=EQUAL, c=(None, None)))
    selection.add(rollouts_of(d=EQUAL))
    selection.add(rollouts_of(e=SPREAD))
    assert selection.num_missing == 2
    assert selection.result().prompts.uids == ["a", "b", "e"]
    assert selection.metrics() == counts(rounds=3, generated=5, dropped=2, surplus=0, missing=2)


def test_without_any_spread_the_first_groups_are_the_result():
    selection = GroupSelection(num_groups=2)
    for name in "abc":
        selection.add(rollouts_of(**{name: EQUAL, f"{name}'": EQUAL}))
    assert selection.result().prompts.uids == ["a", "a'"]
    assert selection.metrics() == counts(rounds=3, generated=6, dropped=4, surplus=0, missing=2)


@pytest.mark.parametrize(
    ("num_missing", "num_useful", "num_generated", "limit", "expected"),
    [
        (3, 5, 10, 8, 6),  # half of them are useful
        (3, 5, 10, 4, 4),  # no more than the limit
        (2, 2, 3, 8, 3),
        (1, 2, 3, 8, 2),  # one and a half, rounded up
        (1, 0, 16, 8, 4),  # none was useful: as if a quarter were
        (1, 1, 16, 8, 4),
        (3, 0, 16, 8, 8),
        (2, 8, 8, 8, 2),  # all are
    ],
)
def test_a_round_draws_as_many_as_are_expected_to_bring_what_is_missing(
    num_missing, num_useful, num_generated, limit, expected
):
    assert groups_to_draw(num_missing, num_useful, num_generated, limit) == expected


def test_the_number_to_draw_is_rounded_once():
    """`21 / (7 / 10)` is 30.000000000000004, and one prompt too many was drawn."""
    assert groups_to_draw(num_missing=21, num_useful=7, num_generated=10, limit=100) == 30
