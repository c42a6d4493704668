import warnings

import pytest

from lit_specrl.data.evaluation_loader import EvaluationLoader
from lit_specrl.data.loader import PromptLoader
from lit_specrl.types import SamplingConfig

ABC = "abcdefghij"


def uids_of(loader):
    return [batch.uids for batch in loader]


def forever(loader):
    """The uids of each batch, pass after pass."""
    while True:
        for batch in loader:
            yield batch.uids


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
        "messages": [],
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


def test_draws_come_out_of_the_stream_between_batches(make_prompts):
    loader = PromptLoader(make_prompts(ABC), 2, shuffle=False)
    batches = iter(loader)
    assert next(batches).uids == ["a", "b"]
    assert loader.draw(3).uids == ["c", "d", "e"]
    assert loader.draw(1).uids == ["f"]
    assert next(batches).uids == ["g", "h"]
    assert next(batches).uids == ["i", "j"]
    assert loader.draw(3).uids == ["a", "b", "c"]


def test_draws_before_the_first_batch_and_between_passes_move_the_stream(make_prompts):
    loader = PromptLoader(make_prompts("abcdef"), 2, shuffle=False)
    assert loader.draw(3).uids == ["a", "b", "c"]
    assert uids_of(loader) == [["d", "e"], ["a", "b"], ["c", "d"]]
    assert loader.draw(1).uids == ["e"]
    assert next(iter(loader)).uids == ["a", "b"]


def test_a_draw_carries_every_field_of_its_prompts(make_prompts):
    assert vars(PromptLoader(make_prompts("ab"), 1, shuffle=False).draw(1)) == {
        "uids": ["a"],
        "prompt_ids": [[0]],
        "prompts": ["prompt 0"],
        "answers": ["0"],
        "sources": ["letters"],
        "columns": [{"n": 0}],
        "messages": [],
        "sampling": None,
    }


def test_a_pass_has_as_many_batches_with_draws_as_without(make_prompts):
    loader = PromptLoader(make_prompts(ABC), 2, shuffle=False)
    assert [(batch.uids, loader.draw(3).uids) for batch in loader] == [
        (["a", "b"], ["c", "d", "e"]),
        (["f", "g"], ["h", "i", "j"]),
    ] * 2 + [(["a", "b"], ["c", "d", "e"])]


def test_prompts_too_few_for_a_batch_or_a_draw_sit_out_the_epoch(make_prompts):
    """Epochs: a d c b f e, a d f c b e, f c a b d e."""
    loader = PromptLoader(make_prompts("abcdef"), 2)
    batches = iter(loader)
    assert loader.draw(4).uids == ["a", "d", "c", "b"]
    assert loader.draw(4).uids == ["a", "d", "f", "c"]  # not f e a d
    assert loader.draw(1).uids == ["b"]
    assert next(batches).uids == ["f", "c"]  # not e f
    assert next(batches).uids == ["a", "b"]
    assert loader.draw(2).uids == ["d", "e"]


def test_ranks_draw_from_their_own_prompts(make_prompts):
    def batch_draw_batch_draw(rank):
        loader = PromptLoader(make_prompts(ABC), 4, shuffle=False, rank=rank, world_size=2)
        batches = iter(loader)
        return [next(batches).uids, loader.draw(1).uids, next(batches).uids, loader.draw(2).uids]

    assert batch_draw_batch_draw(rank=0) == [["a", "b"], ["c"], ["d", "e"], ["a", "b"]]
    assert batch_draw_batch_draw(rank=1) == [["f", "g"], ["h"], ["i", "j"], ["f", "g"]]


def test_ranks_with_unequally_many_prompts_begin_the_next_epoch_together(make_prompts):
    """Rank 0 owns five prompts, rank 1 six, of which three would be left for the second draw."""
    ranks = [PromptLoader(make_prompts(ABC + "k"), 2, shuffle=False, rank=r, world_size=2) for r in range(2)]
    assert [[loader.draw(3).uids for _ in range(2)] for loader in ranks] == [
        [["a", "b", "c"], ["a", "b", "c"]],
        [["f", "g", "h"], ["f", "g", "h"]],
    ]
    assert ranks[0].state_dict() == ranks[1].state_dict()


@pytest.mark.parametrize("num_prompts", [-1, 0, 6])
def test_a_draw_that_no_epoch_can_serve_is_refused_and_moves_nothing(make_prompts, num_prompts):
    loader = PromptLoader(make_prompts(ABC + "k"), 4, shuffle=False, rank=1, world_size=2)
    loader.draw(1)
    with pytest.raises(
        ValueError, match=rf"between 1 and 5, .* of a rank in an epoch, got {num_prompts}; draw fewer at a time or add"
    ):
        loader.draw(num_prompts)
    assert loader.draw(2).uids == ["g", "h"]


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
@pytest.mark.parametrize("stop_after", range(13))
def test_a_restored_loader_continues_after_the_draws_of_the_saved_one(make_prompts, stop_after, rank, world_size):
    def make():
        return PromptLoader(make_prompts(ABC), 2 * world_size, rank=rank, world_size=world_size)

    def follow(loader, steps):
        """The uids of each step: a draw of so many prompts, or the next batch."""
        batches = forever(loader)
        for num_prompts in steps:
            yield loader.draw(num_prompts).uids if num_prompts else next(batches)

    steps = [None, 3, 1, None, None, 2, None, 3, 3, None, 1, None, 4]
    expected = list(follow(make(), steps))
    saved = make()
    head = list(follow(saved, steps[:stop_after]))
    restored = make()
    restored.load_state_dict(saved.state_dict())
    assert head + list(follow(restored, steps[stop_after:])) == expected


def test_another_batch_size_continues_at_the_very_next_prompt(make_prompts):
    saved = PromptLoader(make_prompts(ABC), 2, shuffle=False)
    assert next(iter(saved)).uids == ["a", "b"]
    assert saved.draw(1).uids == ["c"]
    restored = PromptLoader(make_prompts(ABC), 3, shuffle=False)
    with pytest.warns(UserWarning, match=r"\(batch_size 2 -> 3\): the epoch continues after as many prompts"):
        restored.load_state_dict(saved.state_dict())
    assert uids_of(restored) == [["d", "e", "f"], ["g", "h", "i"], ["a", "b", "c"]]


@pytest.mark.filterwarnings("ignore:The order of prompts differs")
def test_another_number_of_ranks_continues_after_as_many_prompts_rounded_down(make_prompts):
    def make(rank, world_size):
        return PromptLoader(make_prompts(ABC), 2, shuffle=False, rank=rank, world_size=world_size)

    alone = make(rank=0, world_size=1)
    alone.draw(7)
    pair = [make(rank, world_size=2) for rank in range(2)]
    for loader in pair:
        loader.load_state_dict(alone.state_dict())
    assert [loader.draw(1).uids for loader in pair] == [["d"], ["i"]]
    alone.load_state_dict(pair[1].state_dict())
    assert alone.draw(1).uids == ["i"]


@pytest.mark.filterwarnings("ignore:The order of prompts differs")
def test_a_position_past_the_end_of_smaller_data_begins_the_next_epoch(make_prompts):
    """Epochs: a d c b f e, a d f c b e."""
    saved = PromptLoader(make_prompts(ABC), 2)
    saved.draw(8)
    restored = PromptLoader(make_prompts("abcdef"), 2)
    restored.load_state_dict(saved.state_dict())
    assert uids_of(restored) == [["a", "d"], ["f", "c"], ["b", "e"]]


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


def test_ranks_tell_which_prompts_are_theirs(make_prompts):
    """PrefixCache sorts the caches of a former run by it; it asked for a name that the loader did not have."""
    prompts = make_prompts(list("abcdefghij"))
    shares = [PromptLoader(prompts, batch_size=2, rank=rank, world_size=2).uids for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(prompts.uids)
    assert len(shares[0]) == len(shares[1]) == 5
