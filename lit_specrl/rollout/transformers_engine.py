"""Generation with the policy module itself: no second copy of the weights, any device, no extra package."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from lit_specrl.masking import pad_left
from lit_specrl.policy import Policy
from lit_specrl.rollout.engine import ProgressListener, ProgressMeter, RolloutEngine
from lit_specrl.types import FinishReason, RolloutRequest, Rollouts, SamplingConfig

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
        self.stop_token_ids = torch.tensor(sorted(stop_token_ids), dtype=torch.long)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.policy_version = version  # the policy's own weights are the ones that generate

    @torch.no_grad()
    def generate(self, request: RolloutRequest, on_progress: ProgressListener | None = None) -> Rollouts:
        self._check_version(request)
        assert self.policy is not None
        meter = ProgressMeter(request.num_rows, on_progress)
        responses: list[_Response] = []
        was_training = self.policy.training
        self.policy.eval()  # gradient checkpointing, where it is on, would switch the cache off
        try:
            for start in range(0, request.num_rows, self.max_rows):
                rows = range(start, min(start + self.max_rows, request.num_rows))
                responses += self._generate_rows(request, rows, meter)
        finally:
            self.policy.train(was_training)
        return Rollouts(
            request=request,
            response_ids=[response.token_ids for response in responses],
            sampling_logprobs=[response.logprobs for response in responses],
            finish_reasons=[response.finish_reason for response in responses],
            policy_version=request.policy_version,
            elapsed_s=meter.elapsed_s,
        )

    def shutdown(self) -> None:
        self.policy = self.policy_version = None

    def _generate_rows(self, request: RolloutRequest, rows: range, meter: ProgressMeter) -> list[_Response]:
        assert self.policy is not None
        model, device, sampling = self.policy.model, self.policy.device, request.sampling
        stop_token_ids = self.stop_token_ids.to(device)
        responses = [_Response() for _ in rows]
        uniforms = _row_uniforms([request.seeds[row] for row in rows], sampling.max_completion_length)  # [n, R]

        prompts = sorted({request.prompt_index(row) for row in rows})
        prompt_ids, mask = pad_left([request.prompts.prompt_ids[index] for index in prompts])  # [b, P]
        mask = mask.to(device)
        prefill = model(
            input_ids=prompt_ids.to(device),
            attention_mask=mask.long(),
            position_ids=(mask.long().cumsum(-1) - 1).clamp_min(0),
            use_cache=True,
            logits_to_keep=1,
        )
        spread = torch.tensor([prompts.index(request.prompt_index(row)) for row in rows], device=device)  # [n]
        cache = prefill.past_key_values
        cache.batch_select_indices(spread)
        logits, mask = prefill.logits[spread, -1], mask[spread]  # [n, V], [n, P]
        positions = mask.long().sum(-1)  # [n]
        slots = torch.arange(len(rows), device=device)  # response that each cache row belongs to
        active = torch.ones_like(slots, dtype=torch.bool)

        for step in range(sampling.max_completion_length):
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
            last_step = step + 1 == sampling.max_completion_length
            meter.advance(int(active.sum()), int(active.sum()) if last_step else int((active & stopped).sum()))
            active &= ~stopped
            if last_step or not active.any():
                break
            if active.float().mean() < _COMPACT_BELOW:
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


@dataclass
class _Response:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason = "length"


def _row_uniforms(seeds: list[int], length: int) -> Tensor:
    """One uniform number per row and token, [n, length] float64: a row's draws do not depend on its neighbours."""
    return torch.stack(
        [torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    )


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
