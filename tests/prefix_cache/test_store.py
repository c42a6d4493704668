import dataclasses
import tracemalloc

import numpy as np
import pytest
import torch

from lit_specrl.prefix_cache.store import RolloutStore


def keys(store):
    return [(row.uid, row.sample) for row in store]


def store_of(rows, max_bytes=None):
    store = RolloutStore(max_bytes)
    store.put(rows)
    return store


def test_gives_back_what_was_put(cached, plain):
    store = store_of([cached("a", 1, [8, 2], step=4, reward=0.5, reward_values={"exact": 0.5, "format": None})])
    assert plain(store) == [
        {
            "uid": "a",
            "sample": 1,
            "token_ids": [8, 2],
            "previous_logprobs": np.float32([-0.2, -0.2]).tolist(),
            "generation_logprobs": np.float32([-0.1, -0.1]).tolist(),
            "finish_reason": "stop",
            "policy_version": 4,
            "step": 4,
            "num_reuses": 0,
            "num_equal": 0,
            "reward": 0.5,
            "reward_values": {"exact": 0.5, "format": None},
            "reference_logprobs": None,
            "data": "",
        }
    ]
    assert store.get("a", 1) is next(iter(store))
    assert (store.get("a", 0), store.get("b", 1), len(store)) == (None, None, 1)


def test_a_row_is_overwritten_by_the_next_with_its_uid_and_sample(cached):
    store = store_of([cached("a", 0, [1, 2, 3]), cached("b", 0, [4]), cached("a", 0, [5])])
    assert keys(store) == [("b", 0), ("a", 0)]
    assert store.get("a", 0).token_ids.tolist() == [5]
    assert store.num_evicted == 0
    assert store.num_bytes == store_of([cached("a", 0, [5]), cached("b", 0, [4])]).num_bytes


def test_rows_are_copies_in_compact_types(cached):
    """A view would keep the padded batch alive, and would change with it."""
    batch_ids, batch_logprobs = torch.tensor([[8, 2, 0]]), torch.tensor([[-0.5, -0.25, 0.0]])
    row = cached(
        "a", previous_logprobs=batch_logprobs[0, :2].numpy(), generation_logprobs=batch_logprobs[0, :2].numpy()
    )
    store = store_of([dataclasses.replace(row, token_ids=batch_ids[0, :2].numpy())])
    batch_ids += 1
    batch_logprobs += 1
    row = store.get("a", 0)
    assert (row.token_ids.tolist(), row.previous_logprobs.tolist()) == ([8, 2], [-0.5, -0.25])
    assert (row.token_ids.base, row.previous_logprobs.base) == (None, None)
    assert (row.token_ids.dtype, row.previous_logprobs.dtype) == (np.int32, np.float32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"previous_logprobs": np.zeros(3)}, "one entry per token, .*'previous_logprobs': .3,.*for uid 'bad'"),
        ({"reference_logprobs": np.zeros(1)}, "one entry per token"),
        ({"finish_reason": "eos"}, "finish_reason must be 'stop' or 'length', got 'eos'"),
    ],
)
def test_a_row_that_does_not_fit_together_is_refused_with_all_others(cached, fields, message):
    store = RolloutStore()
    with pytest.raises(ValueError, match=message):
        store.put([cached("good"), cached("bad", **fields)])
    assert (len(store), store.num_bytes) == (0, 0)


def test_the_oldest_step_makes_room_whatever_the_order_of_writing(cached):
    rows = [cached("a", step=2), cached("b", step=1), cached("c", step=1), cached("d", step=3)]
    store = store_of(rows, max_bytes=2 * store_of(rows[:1]).num_bytes)
    assert keys(store) == [("a", 0), ("d", 0)]
    assert (store.num_evicted, store.num_bytes) == (2, store.max_bytes)
    store.put([cached("e", step=3)])
    assert keys(store) == [("d", 0), ("e", 0)]
    store.put([cached("d", step=4)])
    assert (keys(store), store.num_evicted) == ([("e", 0), ("d", 0)], 3)


def test_a_row_larger_than_the_limit_is_not_kept(cached):
    store = store_of([cached("a", token_ids=range(1000))], max_bytes=2000)
    assert (len(store), store.num_bytes, store.num_evicted) == (0, 0, 1)


@pytest.mark.parametrize(("num_tokens", "optional"), [(1000, False), (10, False), (10, True)])
def test_counted_bytes_are_the_bytes_held(cached, num_tokens, optional):
    """With small rows too, where Python's bookkeeping is most of it.

    Within a tenth, for Python reuses up to 2000 freed tuples that were there before the tracing began.
    """
    num_rows, array = 1000, np.zeros(num_tokens)
    fields = {"reference_logprobs": array} if optional else {}
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    store = RolloutStore()
    for index in range(num_rows):
        fields |= {"reward": 1.0 + index, "reward_values": {"exact": 1.0 + index}, "data": f"{-index:016x}"}
        store.put([cached(f"{index:016x}", 0, [0] * num_tokens, 1000 + index, **fields)])
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert store.num_bytes == pytest.approx(held, rel=0.1)
    if num_tokens == 1000:
        assert store.num_bytes / (num_rows * num_tokens) < 13


def test_tensors_hold_the_whole_state(varied_rows, plain):
    store = store_of(varied_rows)
    store.num_evicted = 5
    tensors, metadata = store.to_tensors()
    assert {name: tensors[name].tolist() for name in ("token_ids", "reference_logprobs")} == {
        "token_ids": [8, 2, 8, 8, 8, 5],
        "reference_logprobs": [-1.5],
    }
    restored = RolloutStore.from_tensors(tensors, metadata, max_bytes=10**6)
    assert plain(restored) == plain(store)
    assert (restored.num_evicted, restored.num_bytes, restored.max_bytes) == (5, store.num_bytes, 10**6)


def test_an_empty_store_has_tensors_too():
    restored = RolloutStore.from_tensors(*RolloutStore().to_tensors())
    assert len(restored) == 0


def test_tensors_survive_a_checkpoint_that_loads_weights_only(varied_rows, plain, tmp_path):
    store = store_of(varied_rows)
    torch.save({"callbacks": {"PrefixCache": store.to_tensors()}}, tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert plain(RolloutStore.from_tensors(*checkpoint["callbacks"]["PrefixCache"])) == plain(store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "version 2 was expected, got 1"),
        ({"lengths": [2, 3, 0, 2]}, "do not add up to the 6 tokens"),
        ({"step": [1, 2]}, "all columns must have 4 rows"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(varied_rows, change, message):
    tensors, metadata = store_of(varied_rows).to_tensors()
    with pytest.raises(ValueError, match=message):
        RolloutStore.from_tensors(tensors, metadata | change)


def test_split_gives_each_rank_the_rows_it_owns_and_merge_joins_them(varied_rows, plain):
    store = store_of(varied_rows, max_bytes=10**6)
    store.num_evicted = 2
    stores = store.split(3, owner={"a": 2, "b-1": 0, "c": 0}.__getitem__)
    assert [keys(part) for part in stores] == [[("b-1", 0), ("c", 7)], [], [("a", 0), ("a", 1)]]
    assert [(part.num_evicted, part.max_bytes) for part in stores] == [(2, 10**6), (0, 10**6), (0, 10**6)]
    merged = RolloutStore.merge(stores)
    by_key = [sorted(plain(part), key=lambda row: (row["uid"], row["sample"])) for part in (merged, store)]
    assert by_key[0] == by_key[1]
    assert (merged.num_evicted, merged.num_bytes) == (2, store.num_bytes)


def test_merge_takes_the_row_of_the_latest_step(cached):
    older, newer = store_of([cached("a", token_ids=[1], step=1)]), store_of([cached("a", token_ids=[2], step=2)])
    for stores in ([older, newer], [newer, older]):
        merged = RolloutStore.merge(stores)
        assert [row.token_ids.tolist() for row in merged] == [[2]]


@pytest.mark.parametrize("rank", [-1, 2])
def test_split_refuses_a_rank_that_does_not_exist(cached, rank):
    with pytest.raises(ValueError, match=f"owner must return a rank from 0 to 1, got {rank} for uid 'a'"):
        store_of([cached("a")]).split(2, owner=lambda uid: rank)


def test_a_limit_must_be_positive():
    with pytest.raises(ValueError, match="max_bytes must be positive, got 0; leave it out for no limit"):
        RolloutStore(max_bytes=0)
