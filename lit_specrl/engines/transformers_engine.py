"""Generation with the policy module itself: no second copy of the weights, any device, no extra package."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from lit_specrl.engines.base import Continuation, ProgressMeter, RolloutEngine
from lit_specrl.masking import pad_left
from lit_specrl.models.policy import Policy
from lit_specrl.seeds import row_uniforms
from lit_specrl.types import RolloutRequest, SamplingConfig

_COMPACT_BELOW = 0.75  # drop finished rows from the cache when fewer than this fraction of its rows is active


class TransformersEngine(RolloutEngine):
    """Batched sampling with the training model and a key-value cache.

    Slower than vLLM and free of its start-up, its memory and its kernels: sampled log-probs differ from the policy's only by the rounding
    of incremental decoding.

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
        stop_token_ids = torch.tensor(sorted(self.stop_token_ids), dtype=torch.long, device=device)
        responses = [Continuation() for _ in rows]
        uniforms = row_uniforms(
            [request.seeds[row] for row in rows], sampling.max_completion_length, "sampling"
        )  # [n, R]
        budgets = torch.tensor([sampling.max_completion_length - len(request.prefix(row)) for row in rows])  # [n]
        logits, cache, mask = self._prefill(request, rows)  # [n, V], n rows of keys and values, [n, L]
        positions = mask.long().sum(-1)  # [n]
        slots = torch.arange(len(rows), device=device)  # response that each cache row belongs to
        active = torch.ones_like(slots, dtype=torch.bool)
        budgets = budgets.to(device)

        for step in range(int(budgets.max())):
            tokens, logprobs = _sample(logits.float(), uniforms[slots.cpu(), step].to(device), sampling)  # [n], [n]
            stopped = torch.isin(tokens, stop_token_ids)
            for slot, token, logprob, is_active in zip(
                slots.tolist(), tokens.tolist(), logprobs.tolist(), active.tolist(), strict=True
            ):
                if is_active:
                    responses[slot].token_ids.append(token)
                    responses[slot].logprobs.append(logprob)
            for slot in slots[active & stopped].tolist():
                responses[slot].finish_reason = "stop"
            ended = stopped | (budgets[slots] == step + 1)
            meter.advance(int(active.sum()), int((active & ended).sum()))
            active &= ~ended
            if not active.any():
                break
            if self.policy.keeps_cache_by_row and active.float().mean() < _COMPACT_BELOW:
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
        return responses

    def _prefill(self, request: RolloutRequest, rows: list[int]) -> tuple[Tensor, Any, Tensor]:
        """Logits of the first token to sample, keys and values of prompt and prefix, and which of them are real.

        Each prompt is computed once for all of its rows, unless there are prefixes, or the model's cache cannot be repeated. Then every
        row is computed by itself: padding between prompt and continuation would take up the window of models that attend to the last
        tokens only.
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


def _sample(logits: Tensor, uniforms: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Tokens [n] drawn by inverting the cumulative distribution of each row, and their log-probs [n].

    Greedy decoding reports log-probs at temperature 1.
    """
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
    else:
        logits = logits / sampling.temperature
        if sampling.top_k is not None:
            logits = TopKLogitsWarper(min(sampling.top_k, logits.shape[-1]))(None, logits)
        if sampling.top_p < 1:
            logits = TopPLogitsWarper(sampling.top_p)(None, logits)
        cumulative = logits.softmax(-1).double().cumsum(-1)  # float32 sums lose the tail of a large vocabulary
        threshold = uniforms[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)
    return tokens, logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
