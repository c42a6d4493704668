"""Which rows go through the policy together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

_SHARING_GAIN = 0.9  # sharing prompts takes two passes; it must save a tenth of the tokens to be worth it


@dataclass(frozen=True)
class MicroBatch:
    """Rows that are computed in one forward pass."""

    rows: list[int]
    share_prompts: bool
    num_tokens: int
    """Tokens that the pass computes, padding included."""
    num_real_tokens: int
    """The same without padding."""
    is_dummy: bool = False
    """True for a pass whose result is dropped: another rank has one more, and sharded layers meet in every pass."""


def plan_micro_batches(
    prompt_index: Sequence[int],
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[int],
    max_tokens: int,
    can_share_prompts: bool = True,
) -> list[MicroBatch]:
    """Pack rows into micro-batches of at most `max_tokens` tokens, padding included.

    Rows are sorted by length, so that a micro-batch pads little. Where it saves a tenth of the tokens, the rows of a
    prompt stay together and the prompt is computed once for them. A row longer than `max_tokens` is a micro-batch of
    its own.

    Args:
        prompt_index: [N] the prompt of each row.
        prompt_lengths: [N] prompt tokens of each row.
        response_lengths: [N] response tokens of each row.
        max_tokens: the budget of one micro-batch.
        can_share_prompts: whether the policy is able to share prompts.

    Example:
        >>> plan = plan_micro_batches([0, 0, 1], [9, 9, 2], [3, 1, 8], max_tokens=24)
        >>> [(batch.rows, batch.share_prompts, batch.num_tokens) for batch in plan]
        [([2], False, 10), ([0, 1], True, 15)]
    """
    apart = _pack_rows(prompt_lengths, response_lengths, max_tokens)
    if not can_share_prompts:
        return apart
    together = _pack_groups(prompt_index, prompt_lengths, response_lengths, max_tokens)
    return together if _cost(together) < _SHARING_GAIN * _cost(apart) else apart


def _cost(plan: list[MicroBatch]) -> int:
    return sum(batch.num_tokens for batch in plan)


def _pack_rows(prompt_lengths: Sequence[int], response_lengths: Sequence[int], max_tokens: int) -> list[MicroBatch]:
    longest_first = sorted(range(len(prompt_lengths)), key=lambda row: -(prompt_lengths[row] + response_lengths[row]))
    batches: list[_Rows] = []
    for row in longest_first:
        size = 1, prompt_lengths[row], response_lengths[row]
        if not batches or batches[-1].num_tokens_with(1, *size) > max_tokens:
            batches.append(_Rows())
        batches[-1].add([row], *size)
    real_tokens = [sum(prompt_lengths[row] + response_lengths[row] for row in batch.rows) for batch in batches]
    return [
        MicroBatch(batch.rows, False, batch.num_tokens, real) for batch, real in zip(batches, real_tokens, strict=True)
    ]


def _pack_groups(
    prompt_index: Sequence[int], prompt_lengths: Sequence[int], response_lengths: Sequence[int], max_tokens: int
) -> list[MicroBatch]:
    groups: dict[int, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompt_index):
        groups[prompt].append(row)
    for rows in groups.values():
        rows.sort(key=lambda row: -response_lengths[row])
    batches: list[_Rows] = []
    for rows in sorted(groups.values(), key=lambda rows: -response_lengths[rows[0]]):
        prompt_length, longest = prompt_lengths[rows[0]], response_lengths[rows[0]]
        if batches and batches[-1].num_tokens_with(len(rows), 1, prompt_length, longest) <= max_tokens:
            batches[-1].add(rows, 1, prompt_length, longest)
            continue
        batches.append(_Rows())
        for row in rows:  # a group beyond the budget is cut
            if batches[-1].rows and batches[-1].num_tokens_with(1, 0, 0, response_lengths[row]) > max_tokens:
                batches.append(_Rows())
            is_first = not batches[-1].rows
            batches[-1].add([row], int(is_first), prompt_length, response_lengths[row])
    plan = []
    for batch in batches:
        prompts = {prompt_index[row]: prompt_lengths[row] for row in batch.rows}
        real_tokens = sum(prompts.values()) + sum(response_lengths[row] for row in batch.rows)
        plan.append(MicroBatch(batch.rows, len(prompts) < len(batch.rows), batch.num_tokens, real_tokens))
    return plan


@dataclass
class _Rows:
    """A micro-batch that grows; it knows its longest prompt and response, so that a row more is counted at once."""

    rows: list[int] = field(default_factory=list)
    num_prompts: int = 0
    longest_prompt: int = 0
    longest_response: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_tokens_with(0, 0, 0, 0)

    def num_tokens_with(self, num_rows: int, num_prompts: int, prompt_length: int, response_length: int) -> int:
        """Tokens that it would compute with further rows, whose longest prompt and response are given."""
        prompts = (self.num_prompts + num_prompts) * max(self.longest_prompt, prompt_length)
        return prompts + (len(self.rows) + num_rows) * max(self.longest_response, response_length)

    def add(self, rows: Sequence[int], num_prompts: int, prompt_length: int, response_length: int) -> None:
        self.rows.extend(rows)
        self.num_prompts += num_prompts
        self.longest_prompt = max(self.longest_prompt, prompt_length)
        self.longest_response = max(self.longest_response, response_length)
