import warnings

import pytest

from lit_specrl.data.evaluation_loader import EvaluationLoader
from lit_specrl.data.loader import PromptLoader
from lit_specrl.types import SamplingConfig

ABC = "abcdefghij"


def uids_of(loader):
    return [batch.uids for batch in loader]


def test_batches_carry_every_field_of_their_prompts(make_prompts):
    sampling = SamplingConfig(num_generations=2)
    batch = next(iter(EvaluationLoader(make_prompts("ab"), 2, sampling=sampling)))
    assert vars(batch) == {
        "uids": ["a", "b"],
        "prompt_ids": [[0], [1]],
        "prompts": ["prompt 0", "prompt 1"],
        "answers": ["0", "1"],
        "sources": ["letters", "letters"],
        "columns": [{"n": 0}, {"n": 1}],
        "sampling": sampling,
    }


def test_training_yields_full_batches_and_reports_the_rest(make_prompts):
    loader = PromptLoader(make_prompts(ABC), 4, shuffle=False)
    assert uids_of(loader) == [["a", "b", "c", "d"], ["e", "f", "g", "h"]]
    assert (len(loader), loader.num_left_over) == (2, 2)


def test_evaluation_yields_every_prompt_once_in_even_batches(make_prompts):
    loader = EvaluationLoader(make_prompts(ABC), 4)
    assert uids_of(loader) == [["a", "b", "c"], ["d", "e", "f"], ["g", "h", "i", "j"]]
    assert len(loader) == 3


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_prompts", [3, 5, 6, 7, 10])
@pytest.mark.parametrize("per_rank", [1, 2])
def test_evaluation_ranks_have_equally_many_batches_and_none_is_empty(make_prompts, world_size, num_prompts, per_rank):
    prompts = make_prompts(ABC[:num_prompts])
    batches = [
        uids_of(EvaluationLoader(prompts, per_rank * world_size, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    assert len({len(of_rank) for of_rank in batches}) == 1
    assert all(batch for of_rank in batches for batch in of_rank)
    assert sorted(uid for of_rank in batches for batch in of_rank for uid in batch) == list(ABC[:num_prompts])


def test_each_rank_draws_from_its_own_prompts(make_prompts):
    ranks = [PromptLoader(make_prompts(ABC), 4, shuffle=False, rank=r, world_size=2) for r in range(2)]
    assert [uids_of(loader) for loader in ranks] == [[["a", "b"], ["c", "d"]], [["f", "g"], ["h", "i"]]]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_order_of_the_data_does_not_matter_under_shuffling(make_prompts, world_size):
    def batches(uids):
        size = 2 * world_size
        return [
            uids_of(PromptLoader(make_prompts(uids), size, rank=r, world_size=world_size)) for r in range(world_size)
        ]

    assert batches(ABC) == batches(ABC[::-1])


def test_each_epoch_has_a_fresh_order(make_prompts):
    loader = PromptLoader(make_prompts("abcdef"), 2)
    assert [uids_of(loader) for _ in range(3)] == [
        [["a", "d"], ["c", "b"], ["f", "e"]],
        [["a", "d"], ["f", "c"], ["b", "e"]],
        [["f", "c"], ["a", "b"], ["d", "e"]],
    ]


def test_another_seed_gives_another_order(make_prompts):
    assert uids_of(PromptLoader(make_prompts("abcdef"), 2, seed=1)) == [["c", "e"], ["d", "b"], ["f", "a"]]


def test_without_shuffling_every_epoch_follows_the_data(make_prompts):
    loader = PromptLoader(make_prompts("cab"), 1, shuffle=False)
    assert [uids_of(loader) for _ in range(2)] == [[["c"], ["a"], ["b"]]] * 2


@pytest.mark.parametrize("stop_after", range(9))
def test_a_restored_loader_continues_where_the_saved_one_stopped(make_prompts, stop_after):
    def forever(loader):
        while True:
            for batch in loader:
                yield batch.uids

    whole = forever(PromptLoader(make_prompts(ABC), 3))
    expected = [next(whole) for _ in range(12)]

    saved = PromptLoader(make_prompts(ABC), 3)
    stream = forever(saved)
    head = [next(stream) for _ in range(stop_after)]
    restored = PromptLoader(make_prompts(ABC), 3)
    restored.load_state_dict(saved.state_dict())
    stream = forever(restored)
    assert head + [next(stream) for _ in range(12 - stop_after)] == expected


def test_an_abandoned_training_pass_is_continued_by_the_next(make_prompts):
    """Lightning cuts epochs short under `limit_train_batches`; no data must be lost by it."""
    loader = PromptLoader(make_prompts("abcdef"), 2, shuffle=False)
    assert next(iter(loader)).uids == ["a", "b"]
    assert uids_of(loader) == [["c", "d"], ["e", "f"], ["a", "b"]]


def test_an_abandoned_evaluation_pass_starts_over(make_prompts):
    """Lightning cuts validation short under `limit_val_batches` and in the sanity check."""
    loader = EvaluationLoader(make_prompts("abcd"), 2)
    next(iter(loader))
    assert uids_of(loader) == [["a", "b"], ["c", "d"]]


def test_restoring_into_other_settings_warns_and_names_them(make_prompts):
    state = PromptLoader(make_prompts(ABC), 2, seed=0).state_dict()
    with pytest.warns(
        UserWarning, match=r"order of prompts differs .*seed 0 -> 1, batch_size 2 -> 4, world_size 1 -> 2"
    ):
        PromptLoader(make_prompts(ABC), 4, seed=1, world_size=2).load_state_dict(state)
    with pytest.warns(UserWarning, match=r"num_prompts 10 -> 9"):
        PromptLoader(make_prompts(ABC[:-1]), 2).load_state_dict(state)


def test_restoring_into_reordered_data_is_silent(make_prompts):
    state = PromptLoader(make_prompts(ABC), 2).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PromptLoader(make_prompts(ABC[::-1]), 2).load_state_dict(state)


def test_a_batch_size_that_does_not_divide_is_refused(make_prompts):
    with pytest.raises(ValueError, match=r"batch_size=4 .* among 3 ranks; use a positive multiple of 3"):
        PromptLoader(make_prompts(ABC), 4, world_size=3)
    with pytest.raises(ValueError, match=r"batch_size=0 .* use a positive multiple of 1"):
        PromptLoader(make_prompts(ABC), 0)


def test_too_few_prompts_are_refused(make_prompts):
    with pytest.raises(ValueError, match=r"3 prompts are fewer than one step of batch_size=4; add data"):
        PromptLoader(make_prompts("abc"), 4)
    with pytest.raises(ValueError, match=r"1 prompts are fewer than 2 ranks; add data"):
        EvaluationLoader(make_prompts("a"), 2, world_size=2)
