"""Rollouts on the simulated GPU of `drain.py`: a length for each row against one for all."""

import numpy as np
import pytest
from drafting.drain import Replay, gpu_seconds, per_row, profiled, single

from lit_specrl.drafting.scheduler.draft_chances import DraftChances
from lit_specrl.drafting.scheduler.length_schedule import DecodeStep

LENGTHS = (0, 1, 2, 3, 4, 6, 8, 12, 16)


def rollout(num_rows, length, rates, seed=0, group=8):
    """Responses that repeat those of the last epoch but for a share of words, which differs from row to row."""
    generator = np.random.default_rng(seed)
    prompts = [generator.integers(1, 5000, 20).tolist() for _ in range(num_rows // group)]
    past, responses = {}, []
    for row in range(num_rows):
        past[row] = generator.integers(1, 5000, length)
        is_other = generator.random(length) < rates[row % len(rates)]
        responses.append(np.where(is_other, generator.integers(1, 5000, length), past[row]).tolist())
    return prompts, responses, past


def drain(num_rows, length, rates):
    """The rows have different parts of their responses to come."""
    prompts, responses, past = rollout(num_rows, length, rates)
    rest = (1 + np.arange(num_rows)) * length // num_rows
    order = np.random.default_rng(1).permutation(num_rows)  # of lengths and rates
    return Replay(prompts, responses, past, begin=np.maximum(1, length - rest[order]))


@pytest.mark.parametrize(("num_rows", "gain"), [(64, 0.98), (256, 1.02)])
def test_a_drain_against_the_best_single_length_in_hindsight(num_rows, gain):
    """Where a step with few rows costs nearly the same whatever it verifies, one length for all is as good."""
    replay = drain(num_rows, 200, rates=(0.02, 0.05, 0.1, 0.3, 0.6))
    best = min(single(replay, length)[0] for length in LENGTHS)
    assert per_row(replay, 16)[0] < best / gain


def test_nothing_is_lost_where_drafts_are_useless():
    """At 64 rows, at least 0.98 times as fast as without, drafts that are tried first included."""
    prompts, responses, past = rollout(64, 300, rates=(1.0,))
    generator = np.random.default_rng(2)  # few words, which repeat themselves in no order
    responses = [generator.integers(1, 30, 300).tolist() for _ in responses]
    replay = Replay(prompts, responses, past)
    assert single(replay, 0)[0] > 0.98 * per_row(replay, 4)[0]
    assert single(replay, 0)[0] < 0.9 * single(replay, 4)[0]


def test_long_drafts_are_taken_where_few_rows_are_left():
    widths = []
    replay = drain(8, 200, rates=(0.01,))
    schedule = profiled(32, 8, gpu_seconds)

    def choose(chances, steps):
        lengths = schedule.row_lengths(chances, steps)
        widths.append(int(lengths.max()))
        return lengths

    replay.run(32, choose, schedule.observe, DraftChances())
    assert max(widths) > 16


def test_speculation_is_not_off_where_there_is_only_nothing_to_look_up():
    """As in the first steps of a run; off it is where drafts were found that are not worth their price."""
    schedule = profiled(4, 8, gpu_seconds)
    for chance, is_off in [(0.0, False), (1e-4, True)]:
        for _ in range(200):
            schedule.row_lengths(np.full((8, 4), chance), np.full(8, 100.0))
            schedule.observe(DecodeStep(num_active=8, length=0, seconds=gpu_seconds(8, 0), num_tokens=8))
        assert schedule.is_off == is_off
