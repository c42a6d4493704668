"""The solver on published tables, and the schedule on engines whose truth is known."""

from dataclasses import replace

import numpy as np
import pytest

from lit_specrl.checkpoints.content import loadable
from lit_specrl.drafting.scheduler.length_schedule import DecodeStep, LengthSchedule, speed_gains

# ReSpec, Fig. 7: speed-up of a 7B model by (steps, top-k, draft tokens); the first column stands for no speculation
RESPEC = {
    1: [1.237, 1.358, 1.270, 1.191, 1.307, 1.323, 1.145, 1.358, 1.411],
    2: [1.200, 1.249, 1.319, 1.273, 1.351, 1.372, 1.240, 1.230, 1.464],
    4: [1.114, 1.230, 1.236, 1.156, 1.335, 1.241, 1.231, 1.229, 1.246],
    8: [1.175, 1.251, 1.144, 1.255, 1.114, 1.113, 1.063, 1.206, 1.135],
    16: [1.301, 1.239, 1.129, 1.383, 1.361, 1.115, 1.204, 1.369, 1.129],
    32: [1.114, 0.957, 0.795, 1.113, 1.003, 0.852, 0.968, 1.009, 0.755],
    64: [0.843, 0.735, 0.536, 0.837, 0.801, 0.555, 0.786, 0.634, 0.448],
}
VLLM_ACCEPTED = [0.681, 0.391, 0.204, 0.101, 0.051]
VLLM_MS = {  # at K = 0, 1, 3, 5; batch 4 lies between its neighbours
    1: (6.52, 7.37, 8.84, 10.33),
    16: (6.90, 7.85, 9.52, 11.20),
    64: (7.77, 9.66, 13.50, 16.83),
    256: (14.49, 27.14, 41.85, 57.40),
}


def test_respecs_table_gives_the_best_column_of_each_row_and_off_at_64():
    speedup = np.array([[1.0, *row] for row in RESPEC.values()])
    assert speed_gains(1 / speedup, np.ones(10)).argmax(-1).tolist() == [9, 9, 5, 4, 4, 1, 0]


def test_vllms_profile_gives_its_published_lengths():
    emitted = np.array([1 + sum(VLLM_ACCEPTED[:length]) for length in (0, 1, 3, 5)])
    table = np.array([VLLM_MS[1], np.mean([VLLM_MS[1], VLLM_MS[16]], axis=0), VLLM_MS[16], VLLM_MS[64], VLLM_MS[256]])
    assert [(0, 1, 3, 5)[index] for index in speed_gains(table, emitted).argmax(-1)] == [3, 3, 3, 1, 0]


def test_the_schedule_finds_the_same_from_timed_steps():
    schedule = LengthSchedule(max_length=5)
    schedule.acceptance().observe([10000] * 5, [round(10000 * chance) for chance in VLLM_ACCEPTED])
    schedule.profile(
        [
            DecodeStep(num_active=batch, length=length, seconds=ms / 1000, num_tokens=batch)
            for batch, row in VLLM_MS.items()
            for length, ms in zip((0, 1, 3, 5), row, strict=True)
            for _ in range(8)
        ]
    )
    measured = [0, 1, 3, 5]
    best = schedule.gains([1, 4, 16, 64, 256])[:, measured].argmax(-1)
    assert [measured[index] for index in best] == [3, 3, 3, 1, 0]
    assert schedule.length(1) >= 3 and (schedule.length(64), schedule.length(256)) == (1, 0)


# ------------------------------------------------------------------------------------------------------------
# simulation


class Engine:
    """An engine whose step times and acceptance are known, with 5 % of noise and one step in fifty disturbed."""

    def __init__(self, seed=0, drafter_s=0.0015, conditional=0.8):
        self.random = np.random.default_rng(seed)
        self.drafter_s, self.conditional = drafter_s, conditional

    def seconds(self, batch, length):
        tokens = batch * (length + 1)
        return 0.006 + max(0.004, 1.5e-4 * tokens) + (0.0005 + self.drafter_s * length if length else 0)

    def emitted(self, length):
        return sum(self.conditional**k for k in range(length + 1))

    def rate(self, batch, length):
        """Expected tokens per second."""
        return batch * self.emitted(length) / self.seconds(batch, length)

    def step(self, batch, length):
        hits = (self.random.random((batch, length)) < self.conditional).cumprod(axis=1).sum(axis=0)
        seconds = self.seconds(batch, length) * np.exp(0.05 * self.random.standard_normal())
        seconds *= 10 if self.random.random() < 0.02 else 1
        return DecodeStep(
            num_active=batch,
            length=length,
            seconds=float(seconds),
            num_tokens=batch + int(hits.sum()),
            drafted=[batch] * length,
            accepted=hits.tolist(),
        )


class Outcome:
    """What a run of rollouts cost in expectation, and what the best lengths would have cost."""

    def __init__(self):
        self.spent = self.best = self.plain = 0.0
        self.used = []

    @property
    def regret(self):
        return self.spent / self.best - 1


def rollouts(engine, schedule, count, change=lambda number, engine: None, size=32, max_length=4):
    """`count` times a batch that drains from `size` to 1, ten steps at each size."""
    outcome = Outcome()
    for number in range(count):
        change(number, engine)
        for batch in range(size, 0, -1):
            for _ in range(10):
                length = schedule.length(batch)
                schedule.observe(engine.step(batch, length))
                best = max(engine.rate(batch, candidate) for candidate in range(max_length + 1))
                expected_tokens = engine.rate(batch, length) * engine.seconds(batch, length)
                outcome.spent += engine.seconds(batch, length)
                outcome.best += expected_tokens / best
                outcome.plain += expected_tokens / engine.rate(batch, 0)
                outcome.used.append(length)
    return outcome


def profiled(engine, max_length=4, **options):
    schedule = LengthSchedule(max_length, **options)
    settings = [(batch, length) for batch in (1, 4, 16, 32) for length in (0, 1, max_length) for _ in range(3)]
    schedule.profile([engine.step(batch, length) for batch, length in settings])
    return schedule


@pytest.mark.parametrize("conditional", [0.9, 0.7, 0.4])
@pytest.mark.parametrize("seed", [0, 1])
def test_regret_against_the_best_lengths_in_hindsight_is_small(conditional, seed):
    engine = Engine(seed, conditional=conditional)
    assert rollouts(engine, profiled(engine), 4).regret < 0.05


def test_acceptance_that_drifts_is_followed():
    def decay(number, engine):
        engine.conditional = 0.9 * 0.93**number

    engine = Engine(conditional=0.9)
    assert rollouts(engine, profiled(engine), 15, decay).regret < 0.05


def test_an_engine_that_becomes_slower_is_followed():
    def slow_drafter(number, engine):
        engine.drafter_s = 0.0015 if number < 4 else 0.02

    engine = Engine(conditional=0.8)
    schedule = profiled(engine)
    assert rollouts(engine, schedule, 12, slow_drafter).regret < 0.05
    assert schedule.is_off


def test_a_useless_drafter_is_switched_off_and_costs_little():
    engine = Engine(conditional=0.02)
    schedule = profiled(engine)
    outcome = rollouts(engine, schedule, 4)
    assert schedule.is_off
    assert outcome.spent < outcome.plain / 0.97
    assert rollouts(engine, schedule, 4).spent < outcome.plain * 1.011


def test_a_drafter_that_has_improved_is_found_by_probing():
    def improve(number, engine):
        engine.conditional = 0.02 if number < 3 else 0.85

    engine = Engine()
    schedule = profiled(engine)
    outcome = rollouts(engine, schedule, 12, improve)
    assert not schedule.is_off
    assert outcome.regret < 0.05


def test_without_probing_it_stays_off():
    engine = Engine(conditional=0.02)
    schedule = profiled(engine, probe_fraction=0.0)
    rollouts(engine, schedule, 3)
    assert schedule.is_off
    engine.conditional = 0.85
    outcome = rollouts(engine, schedule, 2)
    assert set(outcome.used) == {0}


def test_drafts_that_lose_the_thread_are_made_early_and_not_late():
    """A history is followed closely at first; a full batch can afford long drafts then and none later."""

    class Straying(Engine):
        def rollouts(self, schedule, count):
            outcome = Outcome()
            for _ in range(count):
                for age in np.linspace(0, 255, 100):
                    self.conditional = 0.95 if age < 64 else 0.1
                    length = schedule.length(16, age)
                    schedule.observe(replace(self.step(16, length), age=age))
                    best = max(self.rate(16, candidate) for candidate in range(5))
                    outcome.spent += self.seconds(16, length)
                    outcome.best += self.rate(16, length) * self.seconds(16, length) / best
                    outcome.used.append(length)
            return outcome

    engine = Straying()
    schedule = profiled(engine)
    engine.rollouts(schedule, 2)
    outcome = engine.rollouts(schedule, 4)
    assert outcome.regret < 0.02
    assert min(outcome.used[:20]) >= 3 and np.mean(outcome.used[50:100]) < 0.3
    assert schedule.acceptance(0).by_position[0] > 0.9 > 0.5 > schedule.acceptance(200).by_position[0]


def test_a_drafter_that_improves_where_it_does_not_pay_is_noticed_there():
    """At 32 requests nothing is drafted; a single one drafts on, and has no news of early tokens."""
    engine = Engine(conditional=0.3)
    schedule = profiled(engine)

    def early_and_late(count):
        used = []
        for _ in range(count):
            for batch, age in [(32, 10.0)] * 60 + [(1, 100.0)] * 60:
                length = schedule.length(batch, age)
                schedule.observe(replace(engine.step(batch, length), age=age))
                used.append(length)
        return used

    early_and_late(2)
    assert max(early_and_late(1)[:60]) <= 1
    engine.conditional = 0.95
    early_and_late(12)
    assert min(early_and_late(1)[:60]) >= 2


def test_what_it_takes_to_begin_again_is_counted_as_lost():
    """A draft model that has paused computes the running requests again: too dear to look after it as often as for one
    that has not."""

    def number_of_probes(catch_up_s):
        engine = Engine(conditional=0.02)
        schedule = profiled(engine)
        rollouts(engine, schedule, 2)
        used = []
        for _ in range(2000):
            length = schedule.length(8)
            step = engine.step(8, length)
            schedule.observe(replace(step, catch_up_s=catch_up_s if length else 0.0))
            used.append(length)
        return sum(map(bool, used))

    assert 0 < number_of_probes(0.1) < number_of_probes(0.0) / 3


def test_lengths_do_not_flap():
    """After it has learnt, a batch size changes its length in less than one solution out of twenty."""
    engine = Engine(conditional=0.7)
    schedule = profiled(engine)
    rollouts(engine, schedule, 3)
    before = schedule.num_switches
    rollouts(engine, schedule, 5)
    num_decisions = 5 * 16 * 32
    assert schedule.num_switches - before < 0.05 * num_decisions


def test_the_best_length_falls_with_the_batch():
    engine = Engine(conditional=0.75)
    schedule = profiled(engine)
    rollouts(engine, schedule, 3)
    assert schedule.length(1) >= 3 > schedule.length(32)


# ------------------------------------------------------------------------------------------------------------- the rest


def test_before_anything_is_solved_nothing_is_drafted():
    schedule = LengthSchedule(3)
    assert (schedule.length(1), schedule.is_off) == (0, True)


def test_batches_beyond_the_solved_ones_take_the_last_length():
    engine = Engine(conditional=0.95)
    schedule = profiled(engine)
    assert schedule.length(500) == schedule.length(32)


def test_state_survives():
    engine = Engine(conditional=0.02)
    schedule = profiled(engine)
    rollouts(engine, schedule, 2)
    copy = LengthSchedule(4)
    copy.load_state_dict(schedule.state_dict())
    assert copy.state_dict() == schedule.state_dict()
    for other in (schedule, copy):
        engine.random = np.random.default_rng(5)
        rollouts(engine, other, 1)
    assert copy.state_dict() == schedule.state_dict()
    assert [copy.length(batch) for batch in (1, 32)] == [schedule.length(batch) for batch in (1, 32)]
    shorter = LengthSchedule(2)
    state = schedule.state_dict()
    state["ages"][0]["lengths"] = [4, 1]
    shorter.load_state_dict(state)
    assert [shorter.length(1), shorter.length(2)] == [2, 1]


@pytest.mark.parametrize("seed", range(12))
def test_the_state_of_any_schedule_is_plain(seed):
    """Steps in which no draft paid left numbers of numpy, which `torch.load(..., weights_only=True)` refuses."""
    random = np.random.default_rng(seed)
    max_length = int(random.integers(1, 6))
    engine = Engine(seed, drafter_s=10 ** random.uniform(-4, 0), conditional=random.uniform(0, 1))
    schedule = profiled(engine, max_length, probe_fraction=random.choice([0.0, 0.5]))
    for _ in range(random.integers(0, 120)):
        batch, age = int(random.integers(1, 33)), random.uniform(0, 300)
        length = schedule.length(batch, age) if random.random() < 0.7 else int(random.integers(0, max_length + 1))
        step = engine.step(batch, length)
        schedule.observe(replace(step, age=age, is_steady=bool(random.random() < 0.8)))
    state = schedule.state_dict()
    assert loadable(state) is state  # nothing had to be changed
    copy = LengthSchedule(max_length)
    copy.load_state_dict(state)
    assert copy.state_dict() == state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_length must be at least 1 token"),
        ({"max_length": 2, "hysteresis": -0.1}, r"hysteresis must lie in \[0, 1\), got -0.1"),
        ({"max_length": 2, "probe_fraction": 1}, r"probe_fraction must lie in \[0, 1\), got 1"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        LengthSchedule(**options)
