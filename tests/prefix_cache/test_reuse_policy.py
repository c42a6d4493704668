"""What rows of a group are offered, on groups of four."""

import itertools

import pytest

from lit_specrl.prefix_cache import BoundedShare, BySignal, EveryResponse, KeepSuccesses, RenewInTurns, ReusePolicy
from lit_specrl.prefix_cache.reuse_policy import NO_RESPONSE, Offer, has_equal_rewards
from lit_specrl.seeds import rollout_seeds, row_uniforms

SEEDS = [31, 12, 77, 54]


@pytest.fixture
def group(cached):
    """Last responses with these rewards, ten tokens each; `None` for a row without one."""

    def build(rewards, length=10, **fields):
        return [
            None if reward == "none" else cached(sample=sample, token_ids=[8] * length, reward=reward, **fields)
            for sample, reward in enumerate(rewards)
        ]

    return build


def limits(offers):
    return [offer.num_tokens for offer in offers]


def test_every_response_is_offered_whole(group):
    assert EveryResponse()(group([1.0, 0.0, "none", None]), SEEDS) == [
        Offer(10, "whole"),
        Offer(10, "whole"),
        NO_RESPONSE,
        Offer(10, "whole"),
    ]


def test_a_share_is_cut_down_to_whole_tokens(group):
    last = [*group([1.0], length=9), *group([1.0], length=1), *group([1.0], length=10), None]
    assert BoundedShare(0.5)(last, SEEDS) == [Offer(4, "share"), Offer(0, "share"), Offer(5, "share"), NO_RESPONSE]


def test_a_drawn_share_is_uniform_below_its_bound_and_other_in_every_step(group):
    policy = BoundedShare(0.5, drawn=True)
    last = group([1.0] * 4, length=1000)
    uniforms = row_uniforms(SEEDS, 1, "share").squeeze(-1).tolist()
    assert limits(policy(last, SEEDS)) == [int(500 * uniform) for uniform in uniforms]
    steps = [limits(policy(last, rollout_seeds(0, f"train/{step}", ["a"], 4))) for step in range(500)]
    drawn = [length for step in steps for length in step]
    assert sum(drawn) / len(drawn) == pytest.approx(250, abs=4 * 500 / 12**0.5 / 2000**0.5)
    assert 0 <= min(drawn) < 5
    assert 495 < max(drawn) < 500


@pytest.mark.parametrize(
    ("rewards", "tolerance", "equal"),
    [
        ([1.0, 1.0, 1.0, 1.0], 0.0, True),
        ([1.0, 1.0, 0.0, 1.0], 0.0, False),
        ([1.0, "none", 1.0, "none"], 0.0, True),
        ([1.0, None, 1.0, 1.0], 0.0, False),  # nobody knows
        (["none"] * 4, 0.0, False),
        ([0.5, 0.5625, 0.5, 0.5], 0.0625, True),
        ([0.5, 0.625, 0.5, 0.5], 0.0625, False),
    ],
)
def test_equal_rewards(group, rewards, tolerance, equal):
    assert has_equal_rewards(group(rewards), tolerance) == equal


def test_equal_groups_are_reused_and_informative_ones_are_not(group):
    policy = BySignal(renewal=0.0)
    assert policy(group([1.0] * 4), SEEDS) == [Offer(10, "equal")] * 4
    assert policy(group([1.0, 0.0, "none", 1.0]), SEEDS) == [
        Offer(0, "informative"),
        Offer(0, "informative"),
        NO_RESPONSE,
        Offer(0, "informative"),
    ]


def test_informative_groups_may_reuse_a_share(group):
    policy = BySignal(informative=BoundedShare(0.3), equal=BoundedShare(0.8), renewal=0.0)
    assert policy(group([1.0, 0.0, 0.0, "none"]), SEEDS) == [*[Offer(3, "informative")] * 3, NO_RESPONSE]
    assert policy(group([1.0] * 4), SEEDS) == [Offer(8, "equal")] * 4


def test_equal_groups_are_renewed_as_a_whole_with_the_probability_that_was_given(group):
    policy, last = BySignal(renewal=0.25), group([0.0] * 4)
    chosen = [policy(last, rollout_seeds(0, f"train/{step}", ["a"], 4)) for step in range(2000)]
    renewed = [offers for offers in chosen if offers == [Offer(0, "renewed")] * 4]
    assert all(offers == [Offer(10, "equal")] * 4 for offers in chosen if offers not in renewed)
    assert len(renewed) / 2000 == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 2000) ** 0.5)


@pytest.mark.parametrize(("num_equal", "probability"), [(0, 4 / 9), (1, 4 / 9), (2, 4 / 13), (5, 4 / 25)])
def test_laplace_knows_how_likely_spread_is(group, num_equal, probability):
    """Of n G equal answers: the next G are equal, too, with probability (n G + 1) / (n G + G + 1)."""
    found = BySignal().renewal_probability(group([1.0] * 4, num_equal=num_equal))
    assert found == pytest.approx(probability)
    times = max(1, num_equal)
    assert found == pytest.approx(1 - (4 * times + 1) / (4 * times + 5))


def test_successes_are_kept_and_failures_renewed(group):
    assert KeepSuccesses()(group([1.0, 0.0, None, "none"]), SEEDS) == [
        Offer(10, "success"),
        Offer(0, "failure"),
        Offer(0, "failure"),
        NO_RESPONSE,
    ]
    assert limits(KeepSuccesses()(group([1.0] * 4), SEEDS)) == [0] * 4  # no better than their group
    assert limits(KeepSuccesses(BoundedShare(0.5))(group([1.0, 0.0, 1.0, 0.0]), SEEDS)) == [5, 0, 5, 0]
    both = KeepSuccesses(BoundedShare(0.7), failures=BoundedShare(0.4))
    assert both(group([1.0, 0.0, "none", None]), SEEDS) == [
        Offer(7, "success"),
        Offer(4, "failure"),
        NO_RESPONSE,
        Offer(4, "failure"),
    ]


def test_rows_are_renewed_in_turns_the_oldest_first(cached):
    ages = [2, 0, 1, 2]
    last = [cached(token_ids=[8] * 10, num_reuses=age) for age in ages]
    assert RenewInTurns(0.25)(last, SEEDS) == [Offer(0, "renewed"), *[Offer(10, "whole")] * 3]  # 31 < 54
    assert limits(RenewInTurns(0.5)(last, SEEDS)) == [0, 10, 10, 0]
    assert limits(RenewInTurns(0.5, rest=BoundedShare(0.4))(last, SEEDS)) == [0, 4, 4, 0]


def test_rows_without_a_response_count_as_renewed(cached):
    last = [None, *(cached(token_ids=[8] * 10, num_reuses=age) for age in (0, 1, 2))]
    assert RenewInTurns(0.5)(last, SEEDS) == [NO_RESPONSE, Offer(10, "whole"), Offer(10, "whole"), Offer(0, "renewed")]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BoundedShare(0.0), r"max_reuse_fraction must lie in \(0, 1\], got 0.0; use acceptance='off'"),
        (lambda: BoundedShare(1.5), r"max_reuse_fraction must lie in \(0, 1\], got 1.5"),
        (lambda: BySignal(tolerance=-0.5), "tolerance must not be negative, got -0.5"),
        (lambda: BySignal(renewal=1.5), r"renewal must lie in \[0, 1\], got 1.5; leave it out for Laplace's rule"),
        (lambda: RenewInTurns(1.0), r"fresh_fraction must lie in \(0, 1\), got 1.0"),
    ],
)
def test_wrong_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("policy", [EveryResponse(), BoundedShare(), BySignal(), KeepSuccesses(), RenewInTurns()])
def test_policies_cope_with_groups_that_have_nothing(policy: ReusePolicy):
    assert policy([None] * 4, SEEDS) == [NO_RESPONSE] * 4


# What a policy that has not changed says in the end, where all that is offered is kept; by enumeration.
SAID = {"a": 0.3, "ab": 0.2, "bbb": 0.5}


def continued(kept):
    """Distribution of what begins with `kept`."""
    weights = {text: p for text, p in SAID.items() if text.startswith(kept)}
    return {text: p / sum(weights.values()) for text, p in weights.items()}


def said_again(policy, cached, num_reuses=(1, 0)):
    """[G] distribution of each row of a group of two, over all groups that the policy may have said before."""
    rows = [dict.fromkeys(SAID, 0.0) for _ in range(2)]
    for texts in itertools.product(SAID, repeat=2):
        probability = SAID[texts[0]] * SAID[texts[1]]
        last = [
            cached(sample=sample, token_ids=[8] * len(text), reward=float(len(text)), num_reuses=reuses)
            for sample, (text, reuses) in enumerate(zip(texts, num_reuses, strict=True))
        ]
        for row, (text, offer) in enumerate(zip(texts, policy(last, [5, 6]), strict=True)):
            # a response that is taken over whole is complete
            ends = {text: 1.0} if offer.num_tokens == len(text) else continued(text[: offer.num_tokens])
            for end, share in ends.items():
                rows[row][end] += probability * share
    return rows


@pytest.mark.parametrize(
    "policy",
    [EveryResponse(), RenewInTurns(0.5), BoundedShare(0.5), KeepSuccesses(), BySignal(renewal=0.0)],
    ids=lambda policy: type(policy).__name__,
)
def test_a_policy_is_exact_if_and_only_if_it_says_so(policy, cached):
    keeps_it = all(row == pytest.approx(SAID) for row in said_again(policy, cached))
    assert keeps_it == policy.is_exact


def test_a_policy_is_as_exact_as_what_it_offers():
    assert not RenewInTurns(0.5, BoundedShare(0.5)).is_exact
