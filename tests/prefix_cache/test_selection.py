"""Two prompts with two rows each; the second prompt's second row has no last response."""

from collections import Counter

import pytest

from lit_specrl.prefix_cache import BoundedShare, ReusePolicy
from lit_specrl.prefix_cache.reuse_policy import NO_RESPONSE, Offer
from lit_specrl.prefix_cache.row_data import data_digest
from lit_specrl.prefix_cache.selection import OfferCounts, Selector
from lit_specrl.prefix_cache.store import RolloutStore
from lit_specrl.types import PromptBatch, RolloutRequest, SamplingConfig


@pytest.fixture
def store(cached):
    store = RolloutStore()
    store.put(
        [
            cached("a", 0, [8] * 4, reward=1.0, num_equal=2),
            cached("a", 1, [8] * 6, reward=1.0, num_equal=2, num_reuses=2),
            cached("b", 0, [8] * 10, reward=0.0),
        ]
    )
    return store


@pytest.fixture
def request_():
    prompts = PromptBatch(["a", "b"], [[5], [6, 7]], ["", ""], [None, None], ["", ""])
    return RolloutRequest(prompts, SamplingConfig(2, 16), [11, 12, 13, 14], policy_version=4)


def test_without_a_policy_whole_responses_are_offered(store, request_):
    selection = Selector().select(request_, store, 1.0)
    assert selection.offers == [Offer(4, "whole"), Offer(6, "whole"), Offer(10, "whole"), NO_RESPONSE]
    assert [row and len(row) for row in selection.cached] == [4, 6, 10, None]
    assert selection.num_equal == [2, 2, 0, 0]


def test_what_is_not_offered_is_found_all_the_same(store, request_):
    selection = Selector(BoundedShare(0.2), max_reuses=2).select(request_, store, 1.0)
    assert selection.offers == [Offer(0, "share"), Offer(0, "max_reuses"), Offer(2, "share"), NO_RESPONSE]
    assert [row is not None for row in selection.found] == [True, True, True, False]
    assert [row is not None for row in selection.cached] == [False, False, True, False]
    assert selection.limits == [0, 0, 2, 0]


def test_control_rows_are_fresh_whatever_the_policy_says(store, request_):
    offers = Selector(control_fraction=0.5).select(request_, store, 1.0).offers
    assert offers == [Offer(0, "control"), Offer(6, "whole"), Offer(0, "control"), NO_RESPONSE]


def test_groups_are_withheld_as_a_whole(store, request_):
    offers = Selector().select(request_, store, 1e-9).offers
    assert offers == [*[Offer(0, "withheld")] * 3, NO_RESPONSE]


def test_a_policy_must_answer_for_every_row(store, request_):
    class Silent(ReusePolicy):
        def __call__(self, last, seeds):
            return []

    with pytest.raises(ValueError, match="Silent must make an offer for each of 2 rows, got 0"):
        Selector(Silent()).select(request_, store, 1.0)


def test_offers_are_counted_over_rows_that_have_a_response(store, request_):
    selector = Selector(BoundedShare(0.5), max_reuses=2)
    counts = selector.select(request_, store, 1.0).counts
    assert counts == OfferCounts(3, 20, 7, Counter({"share": 2, "max_reuses": 1}))
    assert (counts + counts).metrics() == {
        "prefix_cache/offered_fraction": 14 / 40,
        "prefix_cache/offers/max_reuses": 1 / 3,
        "prefix_cache/offers/share": 2 / 3,
    }
    assert OfferCounts().metrics() == {}


def test_rewards_under_other_columns_are_found_by_nobody(cached, request_):
    """Neither by the reuse policy nor by the rows; those of an older file, which tells no data, are."""
    request_.prompts.columns = [{"tests": [1]}, {"tests": [2]}]
    data = [data_digest(request_.prompts, index) for index in range(2)]
    known = {"reward": 1.0, "reward_values": {"exact": 1.0}, "num_equal": 2}
    store, seen = RolloutStore(), []
    store.put(
        [
            cached("a", 0, data=data[0], **known),
            cached("a", 1, data=data[1], **known),
            cached("b", 0, **known),
            cached("b", 1, data=data[0], **known),
        ]
    )

    class Watching(ReusePolicy):
        def __call__(self, last, seeds):
            seen.extend((row.reward, row.reward_values, row.num_equal) for row in last)
            return [Offer(len(row), "whole") for row in last]

    selection = Selector(Watching()).select(request_, store, 1.0)
    kept, dropped = (1.0, {"exact": 1.0}, 2), (None, None, 0)
    assert seen == [kept, dropped, kept, dropped]
    assert [(row.reward, row.reward_values, row.num_equal) for row in selection.cached] == seen
