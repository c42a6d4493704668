import pytest

from lit_specrl.data.order import epoch_order, even_chunks, rank_share

UIDS = ["f", "b", "e", "a", "d", "c", "g"]


@pytest.mark.parametrize(
    ("world_size", "shares"), [(1, [UIDS]), (2, [["b", "a", "c"], ["f", "e", "d", "g"]]), (3, [["b", "a"], ["d", "c"], ["f", "e", "g"]])]
)  # fmt: skip
def test_ranks_share_all_prompts_evenly_by_uid(world_size, shares):
    assert [[UIDS[i] for i in rank_share(UIDS, rank, world_size)] for rank in range(world_size)] == shares


def test_ownership_does_not_depend_on_the_order_of_the_data():
    for rank in range(3):
        share = {UIDS[i] for i in rank_share(UIDS, rank, 3)}
        assert share == {UIDS[::-1][i] for i in rank_share(UIDS[::-1], rank, 3)}


def test_few_prompts_change_their_rank_when_data_is_added():
    def owner(uids):
        return {uids[i]: rank for rank in range(4) for i in rank_share(uids, rank, 4)}

    uids = [f"{n * 7919 % 1000:03d}" for n in range(1000)]
    before, after = owner(uids), owner([*uids, "0005", "0006"])
    assert sum(before[uid] != after[uid] for uid in uids) == 4


def test_leaving_prompts_out_keeps_the_order_of_the_others():
    whole = [UIDS[i] for i in epoch_order(UIDS, seed=3, epoch=5)]
    fewer = [uid for uid in UIDS if uid not in "ae"]
    assert [fewer[i] for i in epoch_order(fewer, seed=3, epoch=5)] == [uid for uid in whole if uid not in "ae"]


def test_over_many_epochs_every_prompt_visits_every_place_equally_often():
    uids = ["a", "b", "c", "d"]
    places = [[0] * 4 for _ in uids]
    for epoch in range(4000):
        for place, index in enumerate(epoch_order(uids, seed=0, epoch=epoch)):
            places[index][place] += 1
    # 1000 expected; the standard deviation is 27
    assert all(890 < count < 1110 for counts in places for count in counts)


def test_chunks_differ_by_at_most_one():
    assert even_chunks([0, 1, 2, 3, 4, 5, 6], 3) == [[0, 1], [2, 3], [4, 5, 6]]
