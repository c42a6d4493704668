"""Which prompts an epoch visits: mixtures, curricula, skipped prompts; alone, through the loader and through a run."""

import warnings
from collections import Counter
from itertools import chain

import pytest
from training import EveryStep, History, grpo, make_trainer

from lit_specrl import PromptDataModule
from lit_specrl.algorithms.pass_rates import pass_rates
from lit_specrl.data import (
    Curriculum,
    FileSource,
    InOrder,
    Mixture,
    PromptLoader,
    PromptSchedule,
    PromptTemplate,
    Shuffled,
    SkipSolved,
)
from lit_specrl.data.schedule import ScheduledPrompt
from lit_specrl.types import PromptBatch, RolloutRequest, Rollouts, SamplingConfig


def prompts_of(**sizes):
    """`a=3` makes prompts a0, a1, a2 of source a, with their number as `level`."""
    return [
        ScheduledPrompt(f"{name}{number}", name, {"level": number}) for name, n in sizes.items() for number in range(n)
    ]


def uids(prompts):
    return [prompt.uid for prompt in prompts]


def batch_of(prompts):
    size = range(len(prompts))
    return PromptBatch(
        uids=uids(prompts),
        prompt_ids=[[n] for n in size],
        prompts=[f"prompt {n}" for n in size],
        answers=["5" for _ in size],
        sources=[prompt.source for prompt in prompts],
        columns=[dict(prompt.columns) for prompt in prompts],
    )


def epochs(schedule, prompts, count, seed=0):
    return [uids(schedule(prompts, epoch, seed)) for epoch in range(count)]


def test_orders_without_a_choice():
    prompts = prompts_of(a=40)
    assert epochs(InOrder(), prompts, 2) == [uids(prompts)] * 2
    first, second = epochs(Shuffled(), prompts, 2)
    assert sorted(first) == sorted(second) == sorted(uids(prompts))
    assert first != second


@pytest.mark.parametrize(
    ("weights", "sizes", "share"),
    [
        ({"a": 1, "b": 1}, {"a": 10, "b": 10}, {"a": 10, "b": 10}),
        ({"a": 1, "b": 2}, {"a": 10, "b": 100}, {"a": 10, "b": 20}),
        ({"a": 0.3, "b": 0.7}, {"a": 3, "b": 7}, {"a": 3, "b": 7}),  # 0.3 * 10 is not 3 in floating point
        ({"a": 5, "b": 1}, {"a": 100, "b": 4}, {"a": 20, "b": 4}),
        ({"a": 1000, "b": 1}, {"a": 10, "b": 10}, {"a": 10, "b": 1}),
    ],
)
def test_an_epoch_of_a_mixture_has_the_shares_and_no_prompt_twice(weights, sizes, share):
    for epoch in epochs(Mixture(weights), prompts_of(**sizes), 7):
        assert Counter(uid[0] for uid in epoch) == share
        assert len(set(epoch)) == len(epoch)


def test_sources_are_spread_evenly_over_an_epoch():
    (epoch,) = epochs(Mixture({"a": 1, "b": 3}), prompts_of(a=8, b=24), 1)
    for start in range(0, 32, 4):
        assert Counter(uid[0] for uid in epoch[start : start + 4]) == {"a": 1, "b": 3}


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_long_source_is_gone_through_before_it_comes_again(shuffle):
    seen = [uid for epoch in epochs(Mixture({"a": 1, "b": 1}, shuffle), prompts_of(a=4, b=12), 6) for uid in epoch]
    of_b = [uid for uid in seen if uid[0] == "b"]
    assert len(set(of_b[:12])) == len(set(of_b[12:])) == 12
    assert (of_b[:12] == of_b[12:]) is not shuffle


def test_parts_that_do_not_divide_a_source_repeat_nothing_within_an_epoch():
    visits = Counter()
    for epoch in epochs(Mixture({"a": 1, "b": 1}), prompts_of(a=5, b=7), 70):
        assert len(set(epoch)) == 10
        visits.update(uid for uid in epoch if uid[0] == "b")
    assert min(visits.values()) >= 35  # 50 each, had it no need to skip any


def test_shuffling_by_source():
    schedule = Mixture({"a": 1, "b": 1}, shuffle={"a": False})
    (epoch,) = epochs(schedule, prompts_of(a=20, b=20), 1)
    assert [uid for uid in epoch if uid[0] == "a"] == [f"a{n}" for n in range(20)]
    assert [uid for uid in epoch if uid[0] == "b"] != [f"b{n}" for n in range(20)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixture({}), "weights must be positive numbers"),
        (lambda: Mixture({"a": 0}), "weights must be positive numbers"),
        (lambda: Mixture({"a": float("nan")}), "weights must be positive numbers"),
        (lambda: Mixture({"a": 1}, {"b": False}), r"without a weight: \['b'\]"),
        (lambda: Mixture({"a": 1})(prompts_of(a=2, b=2), 0, 0), r"no weight for the sources \['b'\]"),
        (lambda: loaders(prompts_of(a=2), 2, Mixture({"a": 1, "c": 1})), r"no prompts of the sources \['c'\]"),
        (
            lambda: loaders(prompts_of(a=2), 2, SkipSolved(rest=Curriculum("x", rest=Mixture({"a": 1, "c": 1})))),
            r"no prompts of the sources \['c'\]",
        ),
        (lambda: Curriculum("length")(prompts_of(a=2), 0, 0), "no value in the column 'length'.*columns: level"),
        (lambda: Curriculum(num_epochs=0), "num_epochs must be at least 1"),
        (lambda: SkipSolved(0.5, 0.5), "low must be below high"),
        (lambda: SkipSolved(num_epochs=0), "num_epochs must be at least 1"),
        (lambda: PromptDataModule("gsm8k", shuffle=False, schedule=SkipSolved()), "both give an order"),
    ],
)
def test_what_cannot_be_scheduled_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_curriculum_sorts_by_the_column_and_then_shuffles():
    prompts = prompts_of(a=10)[::-1]
    schedule = Curriculum("level", num_epochs=2)
    first, second, third = epochs(schedule, prompts, 3)
    assert first == second == [f"a{n}" for n in range(10)]
    assert third not in (first, first[::-1])
    assert epochs(Curriculum("level", descending=True), prompts, 1) == [first[::-1]]


def test_equally_hard_prompts_are_shuffled_anew():
    prompts = [ScheduledPrompt(f"p{n}", "a", {"level": f"Level {n % 2}"}) for n in range(40)]
    first, second = epochs(Curriculum("level"), prompts, 2)
    assert first != second
    assert {int(uid[1:]) % 2 for uid in first[:20]} == {int(uid[1:]) % 2 for uid in second[:20]} == {0}


def test_values_that_do_not_compare_are_named():
    prompts = [ScheduledPrompt("x", "a", {"level": 1}), ScheduledPrompt("y", "a", {"level": "hard"})]
    with pytest.raises(ValueError, match=r"do not compare \(int, str\)"):
        Curriculum("level")(prompts, 0, 0)


def known(uid, rate, epoch):
    return ScheduledPrompt(uid, "a", {}, rate, epoch)


def test_a_curriculum_by_pass_rate_has_easy_prompts_first_and_new_ones_in_the_middle():
    prompts = [known("hard", 0.1, 0), known("new", None, None), known("easy", 0.9, 0)]
    assert epochs(Curriculum(), prompts, 1) == [["easy", "new", "hard"]]
    assert Curriculum().reads_pass_rates
    assert not Curriculum("level").reads_pass_rates
    assert Curriculum("level", rest=SkipSolved()).reads_pass_rates


def test_numbers_of_a_csv_file_are_compared_as_numbers():
    levels = ["1", "10", "2", "12", "3"]
    prompts = [ScheduledPrompt(level, "a", {"level": level}) for level in levels]
    assert epochs(Curriculum("level"), prompts, 1) == [["1", "2", "3", "10", "12"]]
    texts = [ScheduledPrompt(text, "a", {"level": text}) for text in ("Level 3", "Level 1", "2")]
    assert epochs(Curriculum("level"), texts, 1) == [["2", "Level 1", "Level 3"]]


@pytest.mark.parametrize("levels", [(1.0, float("nan")), ("1", "nan"), (1, None)])
def test_no_number_is_no_level(levels):
    prompts = [ScheduledPrompt(str(n), "a", {"level": level}) for n, level in enumerate(levels)]
    with pytest.raises(ValueError, match="has no value in the column 'level'"):
        Curriculum("level")(prompts, 0, 0)


@pytest.mark.parametrize("num_epochs", [1, 2, 3])
def test_solved_and_hopeless_prompts_sit_out_and_come_back(num_epochs):
    prompts = [known("solved", 1.0, 2), known("half", 0.5, 2), known("failed", 0.0, 2), known("new", None, None)]
    schedule = SkipSolved(num_epochs=num_epochs, rest=InOrder())
    for epoch in range(3, 3 + num_epochs):
        assert uids(schedule(prompts, epoch, 0)) == ["half", "new"]
    assert uids(schedule(prompts, 3 + num_epochs, 0)) == uids(prompts)
    assert uids(SkipSolved(low=-1, rest=InOrder())(prompts, 3, 0)) == ["half", "failed", "new"]


# -------------------------------------------------------------------------------------------------------------- loader


def loaders(prompts, batch_size, schedule, world_size=1, **options):
    return [
        PromptLoader(
            batch_of(prompts), batch_size, rank=rank, world_size=world_size, schedule=schedule, **options
        )
        for rank in range(world_size)
    ]  # fmt: skip


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_go_through_a_mixture_together(world_size):
    ranks = loaders(prompts_of(a=30, b=90), 6, Mixture({"a": 1, "b": 1}), world_size)
    assert {len(loader) for loader in ranks} == {10}
    for _ in range(4):
        for batches in zip(*ranks, strict=True):
            drawn = [uid for batch in batches for uid in batch.uids]
            assert len(set(drawn)) == 6
        assert len({loader.state_dict()["epoch"] for loader in ranks}) == 1


def test_prompts_that_are_solved_are_left_out_of_the_next_epoch():
    (loader,) = loaders(prompts_of(a=12), 3, SkipSolved(num_epochs=1))
    first = [batch.uids for batch in loader]
    assert sorted(uid for batch in first for uid in batch) == sorted(uids(prompts_of(a=12)))
    loader.record_pass_rates({f"a{n}": 1.0 for n in range(6)} | {f"a{n}": 0.5 for n in range(6, 12)})
    second = [batch.uids for batch in loader]
    unsolved = {f"a{n}" for n in range(6, 12)}
    assert set(second[0] + second[1]) == unsolved, "epoch 1"
    assert set(second[2] + second[3]) <= set(uids(prompts_of(a=12))), "a pass is as long as before"


def test_an_epoch_with_too_few_prompts_for_a_step_has_all_and_says_so():
    (loader,) = loaders(prompts_of(a=8), 4, SkipSolved(num_epochs=5))
    list(loader)
    loader.record_pass_rates({f"a{n}": 1.0 for n in range(7)})
    with pytest.warns(UserWarning, match="epoch 1: SkipSolved leaves 1 prompts for a rank, a step needs 4"):
        assert len({uid for batch in loader for uid in batch.uids}) == 8


def test_a_mixture_goes_on_without_a_source_that_is_solved():
    (loader,) = loaders(prompts_of(a=8, b=24), 4, SkipSolved(low=-1, num_epochs=50, rest=Mixture({"a": 1, "b": 3})))
    list(loader)
    loader.record_pass_rates({f"a{n}": 1.0 for n in range(8)})
    second = [uid for batch in loader for uid in batch.uids]
    assert {uid[0] for uid in second[: len(second) // 2]} == {"b"}
    loader.record_pass_rates({f"b{n}": 1.0 for n in range(24)})
    with pytest.warns(UserWarning, match="leaves 0 prompts for a rank, a step needs 4; pass rates do not count in it"):
        assert len([loader.draw(4) for _ in range(20)]) == 20


def test_every_rank_has_full_batches_where_parts_of_a_mixture_fall_unevenly():
    """Its prompts are shared out by chance: of the first epochs, a rank has 9, 5 and 10."""

    def ranks():
        return loaders(prompts_of(a=20, b=1000), 16, Mixture({"a": 1, "b": 1}), 2)

    def drawn(loaders):
        states, batches = [], []
        for _ in range(20):
            states.append([loader.state_dict() for loader in loaders])
            batches.append([loader.draw(8).uids for loader in loaders])
        return states, batches

    with pytest.warns(UserWarning, match="epoch 1: Mixture leaves 5 .* needs 8; it visits all prompts, shuffled"):
        states, batches = drawn(ranks())
    assert {len(set(uids)) for step in batches for uids in step} == {8}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for before, expected in zip(states, batches, strict=True):
            resumed = ranks()
            for loader, state in zip(resumed, before, strict=True):
                loader.load_state_dict(state)
            assert [loader.draw(8).uids for loader in resumed] == expected


def test_a_schedule_with_other_settings_is_another_order():
    prompts = [ScheduledPrompt(str(n), "a", {"x": n, "y": -n}) for n in range(6)]
    (first,) = loaders(prompts, 2, Curriculum("x"))
    (second,) = loaders(prompts, 2, Curriculum("y", rest=InOrder()))
    with pytest.warns(UserWarning, match=r"schedule \S*Curriculum\(column='x', .*\) -> \S*Curriculum\(column='y'"):
        second.load_state_dict(first.state_dict())
    (inner,) = loaders(prompts, 2, SkipSolved(rest=Curriculum("x")))
    (other,) = loaders(prompts, 2, SkipSolved(rest=Curriculum("y")))
    with pytest.warns(UserWarning, match="schedule"):
        other.load_state_dict(inner.state_dict())
    old = first.state_dict() | {"order": first.state_dict()["order"] | {"schedule": "Curriculum"}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first.load_state_dict(old)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    "schedule", [SkipSolved(num_epochs=2), Curriculum(), SkipSolved(rest=Mixture({"a": 1, "b": 2}))]
)
def test_a_resumed_stream_goes_on_as_before(schedule, world_size):
    prompts = prompts_of(a=9, b=18)
    rates = [{f"{name}{n}": (n * k) % 5 / 4 for name in "ab" for n in range(18)} for k in range(1, 7)]

    def stream(loaders):
        for rate in rates * 2:
            batches = [loader.draw(4 // world_size).uids for loader in loaders]
            for loader in loaders:
                loader.record_pass_rates({uid: rate[uid] for batch in batches for uid in batch})
            yield batches, [loader.state_dict() for loader in loaders]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = list(stream(loaders(prompts, 4, schedule, world_size)))
    for stop in (1, 4, 7):
        resumed = loaders(prompts, 4, schedule, world_size)
        for loader, state in zip(resumed, whole[stop][1], strict=True):
            loader.load_state_dict(state)
        shifted = iter((rates * 2)[stop + 1 :])
        for batches, _ in whole[stop + 1 :]:
            got = [loader.draw(4 // world_size).uids for loader in resumed]
            assert got == batches
            rate = next(shifted)
            for loader in resumed:
                loader.record_pass_rates({uid: rate[uid] for batch in got for uid in batch})


def test_a_checkpoint_without_pass_rates_can_be_resumed():
    (loader,) = loaders(prompts_of(a=6), 2, SkipSolved())
    state = loader.state_dict()
    del state["pass_rates"], state["epoch_pass_rates"], state["order"]["schedule"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader.load_state_dict(state)


def test_too_few_prompts_in_the_first_epoch():
    with pytest.raises(ValueError, match="2 prompts are fewer than one step of batch_size=4; add data"):
        loaders(prompts_of(a=1, b=50), 4, Mixture({"a": 1, "b": 1}))


# ----------------------------------------------------------------------------------------------------------------- run


class Odd(PromptSchedule):
    """A user's own: every second prompt, by its column."""

    def __call__(self, prompts, epoch, seed):
        return [prompt for prompt in prompts if prompt.columns["number"] % 2]


def right_where_even(completions, number, **columns):
    return [float(value % 2 == 0) for value in number]


@pytest.fixture
def numbers(tmp_path):
    path = tmp_path / "numbers.jsonl"
    path.write_text("".join(f'{{"question": "A {n}", "answer": "{n}", "number": {n}}}\n' for n in range(8)))
    return str(path)


def test_a_run_learns_by_its_schedule_and_goes_on_with_it(model_folder, numbers, tmp_path):
    def fit(schedule, folder, max_steps, checkpoint=None):
        plain = PromptTemplate(kind="plain")
        data = PromptDataModule(
            FileSource(numbers), template=plain, batch_size=2, max_prompt_length=64, schedule=schedule
        )
        history = History()
        trainer = make_trainer(
            history, EveryStep(tmp_path / folder), max_steps=max_steps, max_epochs=-1, default_root_dir=tmp_path
        )
        trainer.fit(grpo(model_folder, rewards=[right_where_even]), data, ckpt_path=checkpoint)
        loader = trainer.train_dataloader
        return {step: values["uids"] for step, values in history.steps.items()}, loader

    seen, loader = fit(SkipSolved(low=-1, num_epochs=9), "whole", 8)
    number = {prompt.uid: prompt.columns["number"] for prompt in loader._scheduled}
    by_step = [[number[uid] for uid in seen[step]] for step in sorted(seen)]
    assert sorted(chain(*by_step[:4])) == list(range(8))
    assert sorted(chain(*by_step[4:6])) == sorted(chain(*by_step[6:])) == [1, 3, 5, 7], "even ones are always right"
    again, _ = fit(SkipSolved(low=-1, num_epochs=9), "again", 8, str(tmp_path / "whole" / "5.ckpt"))
    assert again
    assert again == {step: seen[step] for step in again}
    own, loader = fit(Odd(), "own", 4)
    assert {number[uid] % 2 for batch in own.values() for uid in batch} == {1}


def test_pass_rates_are_of_the_prompts_in_the_data():
    """Also of those to which an environment has added its first words, and without rows that no reward applies to."""
    prompts = batch_of(prompts_of(a=3))
    prompts.uids[1] += "+0123456789abcdef"
    request = RolloutRequest(prompts, SamplingConfig(2), seeds=list(range(6)), policy_version=0)
    rollouts = Rollouts(request, [[1]] * 6, [[-0.1]] * 6, ["stop"] * 6, policy_version=0, elapsed_s=0.1)
    rollouts.rewards = {"first": [1.0, 0.0, 1.0, 1.0, None, None], "second": [0.0] * 6}
    assert pass_rates(rollouts) == {"a0": 0.5, "a1": 1.0}
