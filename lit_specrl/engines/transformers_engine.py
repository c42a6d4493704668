"""Generation with the policy module itself: no second copy of the weights, any device, no extra package."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from lit_specrl.engines.base import Continuation, ProgressMeter, RolloutEngine
from lit_specrl.engines.truncation import min_p_logits, penalised_logits
from lit_specrl.masking import pad_left
from lit_specrl.models.policy import Policy
from lit_specrl.seeds import row_uniforms
from lit_specrl.types import RolloutRequest, SamplingConfig

_COMPACT_BELOW = 0.75  # drop finished rows from the cache when fewer than this fraction of its rows is active


class TransformersEngine(RolloutEngine):
    """Batched sampling with the training model and a key-value cache.

    Slower than vLLM, but without its start-up, its memory and its kernels: sampled log-probs differ from the policy's
    only by the rounding of incremental decoding.

    Args:
        max_rows: most responses decoded at once; further rows wait. Bounds the key-value cache.
    """

    def __init__(self, max_rows: int = 256):
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {max_rows}")
        self.max_rows = max_rows
        self.policy: Policy | None = None

    def start(self, policy: Policy, model: str, max_length: int, stop_token_ids: Collection[int]) -> None:
        self.policy = policy
        self.stop_token_ids = frozenset(stop_token_ids)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.policy_version = version  # the policy's own weights are the ones that generate

    def continue_rows(self, request: RolloutRequest, rows: list[int], meter: ProgressMeter) -> list[Continuation]:
        assert self.policy is not None
        responses: list[Continuation] = []
        with self.policy.evaluating():
            for start in range(0, len(rows), self.max_rows):
                responses += self._continue_batch(request, rows[start : start + self.max_rows], meter)
        return responses

    def shutdown(self) -> None:
        self.policy = self.policy_version = None

    def _continue_batch(self, request: RolloutRequest, rows: list[int], meter: ProgressMeter) -> list[Continuation]:
        assert self.policy is not None
        model, device, sampling = self.policy.model, self.policy.device, request.sampling
        stop_token_ids = torch.tensor(sorted(self.stop_ids(request)), dtype=torch.long, device=device)
        seeds = [request.seeds[row] for row in rows]
        uniforms = row_uniforms(seeds, sampling.max_completion_length, "sampling").to(device)  # [n, R]
        rooms = [sampling.max_completion_length - len(request.prefix(row)) for row in rows]
        budgets = torch.tensor(rooms, device=device)  # [n]
        logits, cache, mask = self._prefill(request, rows)  # [n, V], n rows of keys and values, [n, L]
        positions = mask.long().sum(-1)  # [n]
        slots = torch.arange(len(rows), device=device)  # response that each cache row belongs to
        active = torch.ones_like(slots, dtype=torch.bool)
        responses = _Responses(rows, max(rooms), device, meter)
        seen = None if sampling.repetition_penalty == 1 else self._seen_tokens(request, rows, logits)  # [n, V]
        interval = _steps_between_checks(device)

        for step in range(max(rooms)):
            logits = logits.float()
            if seen is not None:
                logits = penalised_logits(logits, seen[slots], sampling.repetition_penalty)
            tokens, logprobs = _sample(logits, uniforms[slots, step], sampling)  # [n], [n]
            if seen is not None:
                seen[slots, tokens] = True
            stopped = active & torch.isin(tokens, stop_token_ids)
            responses.write(step, slots, active, tokens, logprobs, stopped)
            active = active & ~stopped & (budgets[slots] > step + 1)
            if (step + 1) % interval == 0 or step + 1 == max(rooms):
                if request.text_end is not None:
                    active = active & ~_completes_text(request, rows, responses, slots, active, step + 1, interval)
                num_active = int(active.sum())
                responses.report(num_active, slots, active)
                if num_active == 0:
                    break
                if self.policy.keeps_cache_by_row and num_active < _COMPACT_BELOW * len(active):
                    keep = active.nonzero().squeeze(-1)
                    cache.batch_select_indices(keep)
                    slots, tokens, mask, positions = slots[keep], tokens[keep], mask[keep], positions[keep]
                    active = torch.ones_like(slots, dtype=torch.bool)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)  # [n, P + step + 1]
            logits = model(
                input_ids=tokens[:, None],
                attention_mask=mask.long(),
                position_ids=positions[:, None],
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
            positions = positions + 1
        return responses.read()

    def _prefill(self, request: RolloutRequest, rows: list[int]) -> tuple[Tensor, Any, Tensor]:
        """Logits of the first token to sample, keys and values of prompt and prefix, and their mask, False on padding.

        Each prompt is computed once for all of its rows, unless there are prefixes, or the model's cache cannot be
        repeated. Then every row is computed by itself: padding between prompt and continuation would take up the window
        of models that attend to the last tokens only.
        """
        assert self.policy is not None
        owners = [request.prompt_index(row) for row in rows]
        beginnings = [
            request.prompts.prompt_ids[owner] + request.prefix(row) for owner, row in zip(owners, rows, strict=True)
        ]
        spread = list(range(len(rows)))
        if self.policy.keeps_cache_by_row and not any(request.prefix(row) for row in rows):
            prompts = sorted(set(owners))
            beginnings = [request.prompts.prompt_ids[owner] for owner in prompts]
            spread = [prompts.index(owner) for owner in owners]
        device = self.policy.device
        ids, mask = pad_left(beginnings)  # [b, L]
        mask = mask.to(device)
        prefill = self.policy.model(
            input_ids=ids.to(device),
            attention_mask=mask.long(),
            position_ids=(mask.long().cumsum(-1) - 1).clamp_min(0),
            use_cache=True,
            logits_to_keep=1,
        )
        index = torch.tensor(spread, device=device)  # [n]
        cache = prefill.past_key_values
        if spread != list(range(len(beginnings))):
            cache.batch_select_indices(index)
        return prefill.logits[index, -1], cache, mask[index]

    def _seen_tokens(self, request: RolloutRequest, rows: list[int], logits: Tensor) -> Tensor:
        """[n, V] bool, True for tokens of prompt and prefix; like the logits [n, V]."""
        seen = torch.zeros_like(logits, dtype=torch.bool)
        for place, row in enumerate(rows):
            seen[place, request.prompts.prompt_ids[request.prompt_index(row)] + request.prefix(row)] = True
        return seen


def _completes_text(
    request: RolloutRequest,
    rows: list[int],
    responses: _Responses,
    slots: Tensor,
    active: Tensor,
    num_steps: int,
    interval: int,
) -> Tensor:
    """Which of the rows `slots` [m] have completed a stop string in the last `interval` steps, [m] bool."""
    assert request.text_end is not None
    found = [False] * len(slots)
    recent = responses.recent(slots, num_steps, request.text_end.reach + interval)
    for place, (slot, is_active) in enumerate(zip(slots.tolist(), active.tolist(), strict=True)):
        if is_active:
            text = (request.begun(rows[slot]) if len(recent[place]) == num_steps else []) + recent[place]
            found[place] = request.text_end(text, max(0, len(text) - interval)) is not None
    return torch.tensor(found, device=slots.device)


class _Responses:
    """Sampled tokens of n rows on the device, where they stay until all rows have ended, unless they are kept.

    Args:
        rows: [n] of the request.
        length: most tokens of a row, R.
        device: of the policy.
        meter: counts tokens and finished rows.
    """

    def __init__(self, rows: list[int], length: int, device: torch.device, meter: ProgressMeter) -> None:
        num_rows = len(rows)
        self._token_ids = torch.zeros(num_rows, length, dtype=torch.long, device=device)
        self._logprobs = torch.zeros(num_rows, length, device=device)
        self._lengths = torch.zeros(num_rows, dtype=torch.long, device=device)
        self._stopped = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self._meter, self._num_reported, self._num_active = meter, 0, num_rows
        self._rows, self._running = rows, set(range(num_rows))

    def write(
        self, step: int, slots: Tensor, active: Tensor, tokens: Tensor, logprobs: Tensor, stopped: Tensor
    ) -> None:
        """Enter the tokens [m] of a step, for the rows `slots` [m]; those that are not `active` have ended before."""
        self._token_ids[slots, step], self._logprobs[slots, step] = tokens, logprobs
        self._lengths[slots] += active.long()
        self._stopped[slots] |= stopped

    def recent(self, slots: Tensor, num_steps: int, length: int) -> list[list[int]]:
        """The latest tokens of the rows `slots` [m] after so many steps, at most `length`."""
        return self._token_ids[slots, max(0, num_steps - length) : num_steps].tolist()

    def report(self, num_active: int, slots: Tensor, active: Tensor) -> None:
        """Count the tokens, and the rows that have ended, since the last report; `num_active` rows go on, those of
        `slots` [m] that are `active` [m]."""
        num_tokens = int(self._lengths.sum())
        finished = {}
        if self._meter.keep is not None and num_active < self._num_active:
            still = set(slots[active].tolist())
            ended = sorted(self._running - still)
            self._running = still
            finished = {self._rows[i]: row for i, row in zip(ended, self.read(ended), strict=True)}
        self._meter.advance(num_tokens - self._num_reported, self._num_active - num_active, finished)
        self._num_reported, self._num_active = num_tokens, num_active

    def read(self, indices: list[int] | None = None) -> list[Continuation]:
        """Rows on the host, all or those at `indices`."""
        chosen = slice(None) if indices is None else indices
        tensors = self._token_ids, self._logprobs, self._lengths, self._stopped
        columns = [tensor[chosen].tolist() for tensor in tensors]
        return [
            Continuation(token_ids[:length], logprobs[:length], "stop" if stopped else "length")
            for token_ids, logprobs, length, stopped in zip(*columns, strict=True)
        ]


def _steps_between_checks(device: torch.device) -> int:
    """Steps after which the host looks which rows have ended; on a GPU it waits for the device each time."""
    return 1 if device.type == "cpu" else 16


def _sample(logits: Tensor, uniforms: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Tokens [n] drawn by inverting the cumulative distribution of each row, and their log-probs [n].

    Greedy decoding reports log-probs at temperature 1.
    """
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
    else:
        logits = logits / sampling.temperature
        if sampling.min_p:
            logits = min_p_logits(logits, sampling.min_p)
        if sampling.top_k is not None:
            logits = TopKLogitsWarper(min(sampling.top_k, logits.shape[-1]))(None, logits)
        if sampling.top_p < 1:
            logits = TopPLogitsWarper(sampling.top_p)(None, logits)
        cumulative = logits.softmax(-1).double().cumsum(-1)  # float32 sums lose the tail of a large vocabulary
        threshold = uniforms[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)
    return tokens, logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
