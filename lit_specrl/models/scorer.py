"""Log-probs and values of given responses, many rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lit_specrl.algorithms.rollout_module import RolloutModule
from lit_specrl.distributed.collectives import max_over_ranks
from lit_specrl.experience import padded_rows
from lit_specrl.models.blockwise_logprobs import KeepScoring, block_logprobs
from lit_specrl.models.capture import CaptureSpec, Student
from lit_specrl.models.critic import SeparateCritic
from lit_specrl.models.micro_batches import MicroBatch, plan_micro_batches
from lit_specrl.models.policy import Policy, TokenStatistics, release
from lit_specrl.types import Experience, PromptBatch, Rollouts


class ScoringModule(RolloutModule):
    """Scores responses under policy, reference and critic, in micro-batches.

    Args:
        micro_batch_tokens: most tokens, padding included, in one forward and backward pass.
        lora: arguments of peft's `LoraConfig`; the reference is then the policy without its adapters.
        options: arguments of `RolloutModule`.
    """

    def __init__(self, *, micro_batch_tokens: int, lora: dict[str, Any] | None, **options: Any) -> None:
        super().__init__(**options)
        self.micro_batch_tokens = micro_batch_tokens
        self.lora = lora
        self._frozen: list[Policy] = []  # the reference, kept out of checkpoints by not being a submodule

    @torch.no_grad()
    def token_statistics(
        self, policy: Policy | None, experience: Experience, rows: list[int] | None = None
    ) -> TokenStatistics:
        """Log-probs and entropies of response tokens, [N, R], and values where the policy has a value head.

        Args:
            policy: whose.
            experience: N rows.
            rows: rows to compute; the others are 0. `None` computes all.
        """
        assert policy is not None
        logprobs, entropy, values = (torch.zeros_like(experience.sampling_logprobs) for _ in range(3))
        for micro_batch in self._plan(experience, list(range(experience.num_rows)) if rows is None else rows):
            part = experience.select(micro_batch.rows)
            statistics = self._forward(policy, part, micro_batch)
            cut = micro_batch.rows, slice(part.response_ids.shape[1])
            logprobs[cut], entropy[cut] = statistics.logprobs, statistics.entropy
            if statistics.values is not None:
                values[cut] = statistics.values
        release(policy)
        return TokenStatistics(logprobs, entropy, None if policy.value_head is None else values)

    @torch.no_grad()
    def teach(self, student: Student, experience: Experience) -> None:
        """Let a drafter listen to the policy reading the given responses."""
        assert self.policy is not None
        for micro_batch in self._plan(experience, list(range(experience.num_rows))):
            part = experience.select(micro_batch.rows)
            teaching = student.asks(part) if micro_batch.counts else None
            taught = self._forward(self.policy, part, micro_batch, teaching).taught
            if taught:
                student.listens(part, taught)
        release(self.policy)

    @torch.no_grad()
    def response_logprobs(
        self,
        prompts: PromptBatch,
        prompt_index: Sequence[int],
        response_ids: Sequence[Sequence[int]],
        keep_scoring: KeepScoring | None = None,
        block_length: int = 128,
    ) -> list[Tensor]:
        """Log-probs of given responses under the current policy, by the forward pass that training uses.

        Args:
            prompts: B prompts.
            prompt_index: [N] the prompt of each response.
            response_ids: [N] ragged, none empty.
            keep_scoring: asked after every block of a row's tokens whether the rest is wanted; `None` wants all. Sharded policies, and
                those whose cache cannot be selected by row, compute all.
            block_length: tokens of a block.

        Returns:
            [N] float32 tensors on the CPU, one entry per token, nats; NaN where nobody wanted to know.
        """
        if not response_ids and not self.is_sharded:
            return []
        nothing = not response_ids  # sharded ranks meet in every pass, also those without rows
        experience = padded_rows(
            prompts.prompt_ids, [0] if nothing else prompt_index, [[0]] if nothing else response_ids
        ).to(self.device)
        assert self.policy is not None
        if keep_scoring is None or self.is_sharded or not self.policy.keeps_cache_by_row:
            logprobs = self.token_statistics(self.policy, experience, [] if nothing else None).logprobs
        else:
            logprobs = self._logprobs_in_blocks(experience, keep_scoring, block_length)
        return [row[: len(ids)] for row, ids in zip(logprobs.cpu(), response_ids, strict=not nothing)]

    def _logprobs_in_blocks(self, experience: Experience, keep_scoring: KeepScoring, block_length: int) -> Tensor:
        assert self.policy is not None
        result = torch.zeros_like(experience.sampling_logprobs)
        for micro_batch in self._plan(experience, list(range(experience.num_rows))):
            part = experience.select(micro_batch.rows)
            rows = torch.tensor(micro_batch.rows, device=self.device)

            def keep_scoring_part(local: Tensor, start: int, block: Tensor, rows: Tensor = rows) -> Tensor:
                return keep_scoring(rows[local], start, block)

            logprobs = block_logprobs(
                self.policy, *part.inputs, keep_scoring_part, block_length, self.sampling.temperature
            )
            result[micro_batch.rows, : logprobs.shape[1]] = logprobs
        return result

    @torch.no_grad()
    def token_values(self, critic: SeparateCritic, experience: Experience) -> Tensor:
        """The critic's values of all response tokens, [N, R]."""
        result = torch.zeros_like(experience.sampling_logprobs)
        for micro_batch in self._plan(experience, list(range(experience.num_rows))):
            part = experience.select(micro_batch.rows)
            values = self._values(critic, part, micro_batch)
            result[micro_batch.rows, : values.shape[1]] = values
        release(critic)
        return result

    def reference_logprobs(self, experience: Experience, rollouts: Rollouts) -> Tensor:
        """Log-probs of all response tokens under the initial policy, [N, R]; those that are known are not computed again."""
        known = [rollouts.known_row(row) for row in range(rollouts.num_rows)]
        rows = [row for row, found in enumerate(known) if found is None or found.reference_logprobs is None]
        if self.lora is None:
            reference = self._frozen[0] if self.is_sharded else self._frozen[0].to(self.device)
            result = self.token_statistics(reference, experience, rows).logprobs
        else:
            assert self.policy is not None
            with self.policy.adapters_disabled():
                result = self.token_statistics(self.policy, experience, rows).logprobs
        for row, found in enumerate(known):
            if found is not None and found.reference_logprobs is not None:
                logprobs = torch.as_tensor(found.reference_logprobs, dtype=torch.float32, device=self.device)
                result[row, : len(logprobs)] = logprobs
        return result

    @property
    def is_sharded(self) -> bool:
        return isinstance(self.trainer.strategy, ModelParallelStrategy)

    def _plan(self, experience: Experience, rows: list[int]) -> list[MicroBatch]:
        """Micro-batches of the given rows; sharded ranks, which meet in every layer of every pass, get equally many, of one pass each."""
        plan = self._plan_rows(experience, rows)
        if self.is_sharded:
            spare = plan[-1] if plan else self._plan_rows(experience, [0])[0]
            plan += [replace(spare, counts=False)] * (max_over_ranks(len(plan), self.device) - len(plan))
        return plan

    def _plan_rows(self, experience: Experience, rows: list[int]) -> list[MicroBatch]:
        assert self.policy is not None
        plan = plan_micro_batches(
            experience.prompt_index[rows].tolist(),
            experience.prompt_lengths[rows].tolist(),
            experience.response_lengths[rows].tolist(),
            self.micro_batch_tokens,
            self.policy.can_share_prompts and not self.is_sharded,  # a shared prompt takes a pass of its own
        )
        return [replace(part, rows=[rows[row] for row in part.rows]) for part in plan]

    def _forward(
        self, policy: Policy, part: Experience, micro_batch: MicroBatch, teaching: CaptureSpec | None = None
    ) -> TokenStatistics:
        return policy(
            *part.inputs,
            temperature=self.sampling.temperature,
            share_prompts=micro_batch.share_prompts,
            teaching=teaching,
        )

    def _values(self, critic: SeparateCritic, part: Experience, micro_batch: MicroBatch) -> Tensor:
        return critic(*part.inputs, share_prompts=micro_batch.share_prompts)
