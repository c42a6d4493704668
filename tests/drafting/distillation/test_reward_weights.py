import pytest
import torch

from lit_specrl.drafting.distillation.reward_weights import reward_weights

NAN, INF = float("nan"), float("inf")


def weigh(rewards, groups=None, **settings):
    groups = [0] * len(rewards) if groups is None else groups
    return reward_weights(torch.tensor(rewards, dtype=torch.float64), groups, **settings).tolist()


@pytest.mark.parametrize(
    ("rewards", "settings", "expected"),
    [
        pytest.param([0, 1], {"floor": 0.5}, [0.5 / 0.75, 1 / 0.75], id="the floor is a fraction of the highest"),
        pytest.param([-1, 0, 3], {"floor": 0.0}, [0.0, 0.6, 2.4], id="rewards of any range"),
        pytest.param([0, 1, 1, 1], {"floor": 0.0}, [0.0, 4 / 3, 4 / 3, 4 / 3], id="floor 0 is the normalised reward"),
        pytest.param([0, 5, 1], {"floor": 1.0}, [1.0, 1.0, 1.0], id="floor 1 is plain distillation"),
        pytest.param(
            [0, 0, 0, 1], {"floor": 0.0, "max_weight": 2.5}, [0.0, 0.0, 0.0, 2.5], id="cut after normalisation"
        ),
        pytest.param([0, 0, 0], {"floor": 0.0}, [1.0, 1.0, 1.0], id="equal rewards count in full, also the lowest"),
        pytest.param([-2, NAN, 2], {"floor": 0.0, "max_weight": 9}, [0.0, 0.0, 3.0], id="NaN counts as the lowest"),
        pytest.param([1, NAN], {"floor": 0.0}, [1.0, 1.0], id="NaN beside a single reward"),
        pytest.param([NAN, NAN], {"floor": 0.0}, [1.0, 1.0], id="nobody could score any"),
        pytest.param([], {}, [], id="no reward"),
    ],
)
def test_weights_of_a_batch(rewards, settings, expected):
    assert weigh(rewards, **settings) == pytest.approx(expected)


def test_defaults_are_those_of_the_docstring():
    assert weigh([0, 1, 0, 0, 0, 0, 0, 0, 0, 0]) == pytest.approx([0.1 / 0.19] + [4.0] + [0.1 / 0.19] * 8)


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        # before normalisation: 0, 1 | 0.5, 0, 1 | 1
        ("group", [0, 6 / 3.5, 3 / 3.5, 0, 6 / 3.5, 6 / 3.5]),
        # before normalisation, from 0 to 8: 0, 0.25 | 0.75, 0.5, 1 | 0.25
        ("batch", [0, 1.5 / 2.75, 4.5 / 2.75, 3 / 2.75, 6 / 2.75, 1.5 / 2.75]),
        ("none", [1, 1, 1, 1, 1, 1]),
    ],
)
@pytest.mark.parametrize("as_groups", [list, torch.tensor])
def test_rewards_are_compared_within_their_scope(scope, expected, as_groups):
    groups = as_groups([7, 7, 3, 3, 3, 5])
    assert weigh([0, 2, 6, 4, 8, 2], groups, scope=scope, floor=0.0) == pytest.approx(expected)


def test_a_group_without_any_score_counts_in_full_beside_others():
    assert weigh([NAN, NAN, 0, 1], [0, 0, 1, 1], scope="group", floor=0.0) == pytest.approx([4 / 3, 4 / 3, 0, 4 / 3])


def test_group_members_need_not_be_neighbours():
    assert weigh([0, 5, 1, 9], [0, 1, 0, 1], scope="group", floor=0.0) == pytest.approx([0, 0, 2, 2])


def test_weights_have_mean_one_unless_they_are_cut():
    rewards = torch.rand(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = reward_weights(rewards, torch.arange(64) // 8, scope="group", max_weight=100)
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.long, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_type_of_the_weights(dtype, expected):
    rewards = torch.tensor([0, 1], dtype=dtype)
    weights = reward_weights(rewards, [0, 0], floor=0.5)
    torch.testing.assert_close(weights, torch.tensor([0.5 / 0.75, 1 / 0.75], dtype=expected))
    assert rewards.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scope": "prompt"}, "scope must be 'group', 'batch' or 'none', got 'prompt'"),
        ({"floor": 1.5}, "floor must be between 0 and 1, got 1.5"),
        ({"floor": NAN}, "floor must be between 0 and 1, got nan"),
        ({"max_weight": 0.5}, "max_weight must be at least 1"),
        ({"groups": [0, 0, 0]}, r"one entry for each, got \[2\] and \[3\]"),
        ({"rewards": [0.0, INF]}, "rewards must be finite or NaN"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        weigh(**({"rewards": [0.0, 1.0]} | settings))
