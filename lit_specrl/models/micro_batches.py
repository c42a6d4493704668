"""Which rows go through the policy together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

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
    def tokens(rows: list[int]) -> int:
        return len(rows) * (max(prompt_lengths[r] for r in rows) + max(response_lengths[r] for r in rows))

    longest_first = sorted(range(len(prompt_lengths)), key=lambda row: -(prompt_lengths[row] + response_lengths[row]))
    batches: list[list[int]] = []
    for row in longest_first:
        if batches and tokens([*batches[-1], row]) <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    real_tokens = [sum(prompt_lengths[row] + response_lengths[row] for row in rows) for rows in batches]
    return [MicroBatch(rows, False, tokens(rows), real) for rows, real in zip(batches, real_tokens, strict=True)]


def _pack_groups(
    prompt_index: Sequence[int], prompt_lengths: Sequence[int], response_lengths: Sequence[int], max_tokens: int
) -> list[MicroBatch]:
    def tokens(rows: list[int]) -> int:
        prompts = {prompt_index[row] for row in rows}
        longest_prompt = max(prompt_lengths[row] for row in rows)
        return len(prompts) * longest_prompt + len(rows) * max(response_lengths[row] for row in rows)

    def real_tokens(rows: list[int], prompts: dict[int, int]) -> int:
        return sum(prompts.values()) + sum(response_lengths[row] for row in rows)

    groups: dict[int, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompt_index):
        groups[prompt].append(row)
    for rows in groups.values():
        rows.sort(key=lambda row: -response_lengths[row])
    batches: list[list[int]] = []
    for rows in sorted(groups.values(), key=lambda rows: -response_lengths[rows[0]]):
        if batches and tokens([*batches[-1], *rows]) <= max_tokens:
            batches[-1].extend(rows)
            continue
        batches.append([])
        for row in rows:  # a group beyond the budget is cut
            if batches[-1] and tokens([*batches[-1], row]) > max_tokens:
                batches.append([])
            batches[-1].append(row)
    owned = [(rows, {prompt_index[row]: prompt_lengths[row] for row in rows}) for rows in batches]
    return [
        MicroBatch(rows, len(prompts) < len(rows), tokens(rows), real_tokens(rows, prompts)) for rows, prompts in owned
    ]
