"""Speculation inside a running vLLM: its length, its counts, and the weights of its drafter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import xxhash
from torch import Tensor

from lit_specrl.drafting.drafters import Drafter, LookUpDrafter
from lit_specrl.drafting.history import RolloutTexts
from lit_specrl.drafting.scheduler.length_schedule import DecodeStep
from lit_specrl.engines.vllm.proposers import LookUpProposer, RowLengths
from lit_specrl.engines.vllm.sampler import CPUSampler, RejectionCounter
from lit_specrl.engines.vllm.weights import repack_tied_head


class Speculation:
    """Sets the speculation length of a running engine, and counts accepted tokens.

    Args:
        llm: a `vllm.LLM` of vLLM 0.32 with a `speculative_config`, in this process.
        runner: its model runner.
        sampler: of its tokens.
        drafter: with which the engine was built.
    """

    def __init__(self, llm: Any, runner: Any, sampler: CPUSampler | RejectionCounter, drafter: Drafter) -> None:
        self._llm, self._sampler, self._drafter = llm, sampler, runner.drafter
        self._scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self._table: list[int] = self._scheduler.dynamic_sd_lookup
        self._propose = runner.propose_draft_token_ids
        runner.propose_draft_token_ids = self._propose_if_wanted
        self._has_weights = not isinstance(self._drafter, LookUpProposer)
        self._has_gap = False  # the drafter lacks KV of tokens that the policy has
        self._forced_token: int | None = None
        if isinstance(self._drafter, LookUpProposer):
            assert isinstance(drafter, LookUpDrafter)
            self._drafter.drafter, self._drafter.batch = drafter, runner.input_batch
        self.longest = max(self._table)
        self.length = self._previous_length = self.longest

    @property
    def num_running(self) -> int:
        """Requests that the engine has begun with and not finished."""
        return len(self._scheduler.running)

    def set_length(self, length: int) -> None:
        """Tokens to draft for each row in the next step; they are tested in the step after it."""
        if not 0 <= length <= self.longest:
            raise ValueError(f"the engine drafts from 0 to {self.longest} tokens, got {length}")
        if length and self._has_gap:
            # policy and drafter compute running requests again, so that the drafter has the KV of all tokens
            self._llm.reset_prefix_cache(reset_running_requests=True)
            self._has_gap = False
        self._previous_length, self.length = self.length, length
        self._table[:] = [length] * len(self._table)
        if isinstance(self._drafter, LookUpProposer):
            self._drafter.length = length

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> str:
        """Replace weights of the drafter.

        Returns:
            Its fingerprint with the new weights.

        Raises:
            RuntimeError: the drafter has no weights.
        """
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload.inplace import reload_weights

        if not self._has_weights:
            raise RuntimeError(f"{type(self._drafter).__name__} has no weights that could be replaced")
        config, dtype = self._drafter.vllm_config, self._drafter.dtype
        converted = ((name, weight.to(dtype) if weight.is_floating_point() else weight) for name, weight in weights)
        with set_current_vllm_config(config):
            reload_weights(config, self._drafter.model, converted, None, True)
        repack_tied_head(self._drafter.model)
        self._llm.reset_prefix_cache()  # holds the former weights' keys and values
        return self.fingerprint()

    @torch.no_grad()
    def fingerprint(self) -> str:
        """Hash of the outputs of the drafter's layers for a fixed input.

        (Its parameters say nothing: on a CPU vLLM empties them when it packs them.)
        """
        from vllm.model_executor.layers.layernorm import RMSNorm
        from vllm.model_executor.layers.linear import LinearBase

        digest = xxhash.xxh3_128()
        for module in self._drafter.model.modules():
            if not isinstance(module, (LinearBase, RMSNorm)):
                continue
            width = module.hidden_size if isinstance(module, RMSNorm) else module.input_size
            width = getattr(module, "input_size_per_partition", width)  # of layers that are cut by their inputs
            probe = torch.linspace(-1, 1, width, dtype=self._drafter.dtype, device=self._drafter.device)[None]
            output = module(probe)
            output = output[0] if isinstance(output, tuple) else output
            digest.update(output.float().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    @contextmanager
    def force_token(self, token: int) -> Iterator[None]:
        """Draft this token in place of a drafter that looks tokens up, to measure the cost of rejection sampling."""
        self._forced_token = None if self._has_weights else token
        try:
            yield
        finally:
            self._forced_token = None

    def begin(self, texts: RolloutTexts, row_lengths: RowLengths | None = None) -> None:
        """A rollout begins; a drafter that looks tokens up may read these texts, and asks for row lengths."""
        if isinstance(self._drafter, LookUpProposer):
            self._drafter.begin(texts, row_lengths)

    def follow(self, request: str, row: int) -> None:
        """A request generates a row of the rollout."""
        if isinstance(self._drafter, LookUpProposer):
            self._drafter.follow(request, row)

    def forget(self) -> None:
        """All requests have ended. The KV prefix cache of their prompts may still lack the drafter's part."""
        if isinstance(self._drafter, LookUpProposer):
            self._drafter.forget()

    def end_step(self, num_active: int, num_tokens: int, seconds: float) -> DecodeStep:
        """The latest step of the engine, for the schedule."""
        drafted, accepted = self._sampler.drafted, self._sampler.accepted
        self._sampler.drafted, self._sampler.accepted = [], []
        is_steady = self.length == self._previous_length
        return DecodeStep(
            num_active=num_active,
            length=len(drafted),
            seconds=seconds,
            num_tokens=num_tokens,
            drafted=drafted,
            accepted=accepted,
            by_source=dict(self._drafter.by_source) if isinstance(self._drafter, LookUpProposer) else {},
            is_steady=is_steady,
        )

    def _propose_if_wanted(self, scheduler_output: Any, sampled_token_ids: Any, *arguments: Any) -> Any:
        num_rows = len(sampled_token_ids)
        if self._forced_token is not None:
            return [[self._forced_token] * self.length for _ in range(num_rows)]
        if self.length == 0 and self._has_weights:
            self._has_gap = True
            return [[] for _ in range(num_rows)]
        return self._propose(scheduler_output, sampled_token_ids, *arguments)
