"""Rollouts whose responses are known, replayed with the drafts that would have been made, by a clock of one's own."""

import numpy as np

from lit_specrl.drafting.drafts import Drafts
from lit_specrl.drafting.history import HistoryReader, RolloutTexts
from lit_specrl.drafting.scheduler.draft_chances import DraftChances
from lit_specrl.drafting.scheduler.length_schedule import DecodeStep, LengthSchedule

BATCHES, LENGTHS = np.array([1, 16, 64, 256]), np.array([0, 1, 3, 5])
PUBLISHED_MS = np.array(  # vLLM's profile of dynamic speculation, [batch, length]
    [[6.52, 7.37, 8.84, 10.33], [6.90, 7.85, 9.52, 11.20], [7.77, 9.66, 13.50, 16.83], [14.49, 27.14, 41.85, 57.40]]
)
DRAFTER_MS = 0.75  # a position, of the head that drafted there; what is looked up costs the GPU nothing


def gpu_seconds(num_rows, num_drafted):
    """Of a step on the GPU of that profile: linear between its points, in rows and in drafted tokens a row."""
    verified = PUBLISHED_MS - DRAFTER_MS * LENGTHS
    per_row = num_drafted / num_rows
    slope = (verified[:, 3] - verified[:, 2]) / 2
    at = [np.interp(per_row, LENGTHS, row) + s * max(0.0, per_row - 5) for row, s in zip(verified, slope, strict=True)]
    return float(np.interp(num_rows, BATCHES, at)) / 1000


class Replay:
    """A rollout whose responses are known.

    Args:
        prompts: by group.
        responses: of all rows.
        past: row -> its response of the last epoch.
        begin: tokens of each response that are there at first.
        seconds: (rows, drafted tokens) -> time of a step.
    """

    def __init__(self, prompts, responses, past=None, begin=None, seconds=gpu_seconds):
        size = len(responses) // len(prompts)
        room = max(map(len, responses))
        self.texts = RolloutTexts(prompts, size, past or {}, room)
        self.responses, self.seconds = responses, seconds
        self.begin = np.array(begin if begin is not None else [1] * len(responses))
        self.lengths = np.array([len(response) for response in responses])
        whole = [list(prompts[row // size]) + list(response) for row, response in enumerate(responses)]
        self.token_ids = np.zeros((len(whole), max(map(len, whole))), np.int32)
        for row, tokens in enumerate(whole):
            self.token_ids[row, : len(tokens)] = tokens
        self.prompt_lengths = np.array([len(prompts[row // size]) for row in range(len(whole))])

    def run(self, longest, choose, observe=None, chances=None, siblings=True):
        """Seconds, tokens and steps of a rollout.

        Args:
            longest: most tokens of a draft.
            choose: (chances [N, K], steps to come [N]) -> tokens to verify in each row.
            observe: receives every step.
        """
        reader = HistoryReader(self.texts, siblings)
        chances = chances or DraftChances()
        chances.start(np.arange(len(self.responses)) // self.texts.num_generations)
        said, elapsed, num_steps, row_steps = self.begin.copy(), 0.0, 0, 0
        while (rows := np.flatnonzero(said < self.lengths)).size:
            num_tokens = self.prompt_lengths[rows] + said[rows]
            drafts = reader.propose(rows, self.token_ids[rows], num_tokens, longest)
            steps = chances.remaining_steps(rows, drafts)
            drafts = drafts.cut(choose(chances.by_position(rows, drafts, longest), steps))
            accepted = self.accepted(rows, drafts, num_tokens)
            drafted = int(drafts.lengths.sum())
            took = self.seconds(len(rows), drafted)
            chances.observe(rows, drafts, accepted)
            emitted = np.minimum(accepted + 1, self.lengths[rows] - said[rows])
            said[rows] += emitted
            elapsed, num_steps, row_steps = elapsed + took, num_steps + 1, row_steps + len(rows)
            if observe:
                width = int(drafts.lengths.max(initial=0))
                counts = [[int((n > k).sum()) for k in range(width)] for n in (drafts.lengths, accepted)]
                observe(
                    DecodeStep(
                        num_active=len(rows),
                        length=width,
                        seconds=took,
                        num_tokens=int(emitted.sum()),
                        drafted=counts[0],
                        accepted=counts[1],
                    )
                )
        return elapsed, int((self.lengths - self.begin).sum()), num_steps, row_steps

    def accepted(self, rows, drafts: Drafts, num_tokens):
        columns = np.minimum(num_tokens[:, None] + np.arange(drafts.token_ids.shape[1]), self.token_ids.shape[1] - 1)
        right = drafts.token_ids == self.token_ids[rows[:, None], columns]
        right &= np.arange(drafts.token_ids.shape[1]) < drafts.lengths[:, None]
        return np.minimum(right.cumprod(-1).sum(-1), self.lengths[rows] - (num_tokens - self.prompt_lengths[rows]))


def profiled(longest, num_rows, seconds):
    """A schedule that has timed a few steps."""
    schedule = LengthSchedule(longest, per_row=True)
    batches = [*(4**power for power in range(8) if 4**power < num_rows), num_rows]
    schedule.profile(
        [
            DecodeStep(
                num_active=batch,
                length=length,
                seconds=seconds(batch, batch * length),
                num_tokens=batch,
                drafted=[batch] * length,
                accepted=[0] * length,
            )
            for batch in batches
            for length in (0, 1, longest)
            for _ in range(3)
        ]
    )
    return schedule


def per_row(replay, longest, schedule=None, chances=None, **options):
    """Seconds of a rollout under the solver for rows; a cold one, without."""
    schedule = schedule or profiled(longest, len(replay.responses), replay.seconds)

    return replay.run(longest, schedule.row_lengths, schedule.observe, chances, **options)


def single(replay, length, **options):
    """Seconds of a rollout with one length for all rows."""
    return replay.run(max(length, 1), lambda chance, steps: np.full(len(chance), length), **options)
