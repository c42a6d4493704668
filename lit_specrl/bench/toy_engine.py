"""Generation with the toy policy by a forward pass of few calls: of so small a model the calls are what takes time."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GPT2LMHeadModel

from lit_specrl.drafting.verification import draw
from lit_specrl.engines.base import Continuation, ProgressMeter, RolloutEngine
from lit_specrl.models.policy import Policy
from lit_specrl.seeds import row_uniforms
from lit_specrl.types import RolloutRequest


class ToyEngine(RolloutEngine):
    """Samples from a GPT-2 with its own weights, all rows at the same position: what is known is read, the rest drawn.

    It draws the same tokens as `TransformersEngine`, up to rounding. Temperature 1, on a CPU, for small models: no row
    leaves the batch before the last one has ended.
    """

    def __init__(self) -> None:
        self.policy: Policy | None = None

    def start(self, policy: Policy, model: str, max_length: int, stop_token_ids: Collection[int]) -> None:
        if not isinstance(policy.model, GPT2LMHeadModel) or policy.model.config.activation_function != "relu":
            raise ValueError(
                f"ToyEngine runs the policy of `lit-specrl bench toy-policy`, got {type(policy.model).__name__}; use "
                "TransformersEngine"
            )
        self.policy, self.stop_token_ids = policy, frozenset(stop_token_ids)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.policy_version = version  # the policy's own weights are the ones that generate

    def shutdown(self) -> None:
        self.policy = self.policy_version = None

    @torch.inference_mode()
    def continue_rows(self, request: RolloutRequest, rows: list[int], meter: ProgressMeter) -> list[Continuation]:
        assert self.policy is not None
        sampling = request.sampling
        if sampling.temperature != 1 or sampling.is_truncated:
            raise ValueError("ToyEngine samples at temperature 1 from the whole softmax; use TransformersEngine")
        prompts = [request.prompts.prompt_ids[request.prompt_index(row)] for row in rows]
        known = [prompt + request.prefix(row) for prompt, row in zip(prompts, rows, strict=True)]
        starts = torch.tensor([len(ids) for ids in known])  # [n]
        ends = torch.tensor([len(prompt) + sampling.max_completion_length for prompt in prompts])  # [n]
        tokens = torch.zeros(len(rows), int(ends.max()), dtype=torch.long)  # [n, T]
        for row, ids in enumerate(known):
            tokens[row, : len(ids)] = torch.tensor(ids)
        uniforms = row_uniforms([request.seeds[row] for row in rows], sampling.max_completion_length, "sampling")
        stop_ids = torch.tensor(sorted(self.stop_token_ids), dtype=torch.long)
        logprobs = torch.zeros(tokens.shape)
        stopped = torch.zeros(len(rows), dtype=torch.bool)
        steps = torch.arange(len(rows))
        network = _Network(cast(GPT2LMHeadModel, self.policy.model), *tokens.shape)
        first = int(starts.min())
        logits = network(tokens[:, :first], 0)  # [n, V]
        for position in range(first, tokens.shape[1]):
            draws = (starts <= position) & (ends > position) & ~stopped
            drawn, found = _sample(logits, uniforms[steps, (position - starts).clamp(min=0, max=uniforms.shape[1] - 1)])
            tokens[:, position] = torch.where(draws, drawn, tokens[:, position])
            logprobs[:, position] = found
            stopped |= draws & torch.isin(drawn, stop_ids)
            ends = torch.where(stopped & draws, position + 1, ends)
            if not bool((~stopped & (ends > position + 1)).any()):
                break
            logits = network(tokens[:, position : position + 1], position)
        meter.advance(int((ends - starts).sum()), len(rows))
        return [
            Continuation(ids[start:end], values[start:end], "stop" if stop else "length")
            for ids, values, start, end, stop in zip(
                *(tensor.tolist() for tensor in (tokens, logprobs, starts, ends, stopped)), strict=True
            )
        ]


class _Network:
    """The forward pass with keys and values of n rows of up to T tokens."""

    def __init__(self, model: GPT2LMHeadModel, num_rows: int, length: int) -> None:
        self._body: Any = model.transformer
        config = model.config
        self._heads = config.n_head
        self._cache = torch.zeros(
            config.n_layer, 2, num_rows, config.n_head, length, config.n_embd // config.n_head
        )  # [layers, 2, n, heads, T, d]

    def __call__(self, ids: Tensor, start: int) -> Tensor:
        """Logits [n, V] behind tokens [n, t] at the positions from `start` on."""
        stop = start + ids.shape[1]
        hidden = self._body.wte.weight[ids] + self._body.wpe.weight[start:stop]  # [n, t, H]
        for block, cache in zip(self._body.h, self._cache, strict=True):
            normed = block.ln_1(hidden)
            query, key, value = (
                part.unflatten(-1, (self._heads, -1)).transpose(1, 2)
                for part in block.attn.c_attn(normed).chunk(3, dim=-1)
            )  # [n, heads, t, d]
            cache[0, :, :, start:stop], cache[1, :, :, start:stop] = key, value
            attended = functional.scaled_dot_product_attention(
                query, cache[0, :, :, :stop], cache[1, :, :, :stop], is_causal=ids.shape[1] > 1
            )
            hidden = hidden + block.attn.c_proj(attended.transpose(1, 2).flatten(2))
            hidden = hidden + block.mlp.c_proj(block.mlp.c_fc(block.ln_2(hidden)).relu())
        return self._body.ln_f(hidden[:, -1]) @ self._body.wte.weight.T


def _sample(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [n] by inverting each cumulative distribution, and their log-probs [n], as in `TransformersEngine`."""
    logprobs = logits.log_softmax(-1)
    drawn = draw(logits.softmax(-1), uniforms)
    return drawn, logprobs.gather(-1, drawn[:, None]).squeeze(-1)
