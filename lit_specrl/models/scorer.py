"""Log-probs and values of given responses, many rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lit_specrl.distributed.collectives import max_over_ranks
from lit_specrl.experience import Experience, padded_rows
from lit_specrl.models.blockwise_logprobs import KeepScoring, block_logprobs
from lit_specrl.models.hidden_states import HiddenStates
from lit_specrl.models.micro_batches import MicroBatch, plan_micro_batches
from lit_specrl.models.policy import Policy, TokenStatistics, release
from lit_specrl.types import PromptBatch


class ForwardObserver(Protocol):
    """Looks into forward passes of the policy, as a drafter that learns from them does."""

    def layers(self, part: Experience) -> Sequence[int] | None:
        """Decoder layers whose inputs it is to see in the pass over these rows; `None` leaves the pass out."""

    def observe(self, part: Experience, states: HiddenStates, head: Tensor, temperature: float) -> None:
        """Called inside the pass.

        Args:
            part: rows of the pass.
            states: hidden states.
            head: [V, H] rows of the output head.
            temperature: softmax temperature of the log-probs.
        """


class Scorer:
    """Scores responses under policy, reference and critic, in micro-batches.

    Args:
        policy: the policy that is trained.
        reference: the policy before training; `None` where it is not needed, or where `policy` has adapters.
        temperature: softmax temperature of all log-probs.
        micro_batch_tokens: most tokens, padding included, in one forward and backward pass.
        is_sharded: the ranks meet in every layer of every pass.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        *,
        temperature: float,
        micro_batch_tokens: int,
        is_sharded: bool = False,
    ) -> None:
        self.policy, self.reference = policy, reference
        self.temperature, self.micro_batch_tokens, self.is_sharded = temperature, micro_batch_tokens, is_sharded
        self.observer: ForwardObserver | None = None
        """Looks into the passes of the updates."""

    @torch.no_grad()
    def token_statistics(
        self, experience: Experience, rows: list[int] | None = None, policy: Policy | None = None
    ) -> TokenStatistics:
        """Log-probs and entropies of response tokens, [N, R], and values where the policy has a value head.

        Args:
            experience: N rows.
            rows: rows to compute; the others are 0. `None` computes all.
            policy: whose; `None` for the policy that is trained.
        """
        policy = policy or self.policy
        logprobs, entropy, values = (torch.zeros_like(experience.sampling_logprobs) for _ in range(3))
        for micro_batch, row_numbers, part in self.micro_batches(experience, rows):
            statistics = self._forward(policy, part, micro_batch)
            cut = row_numbers, slice(part.response_ids.shape[1])
            logprobs[cut], entropy[cut] = statistics.logprobs, statistics.entropy
            if statistics.values is not None:
                values[cut] = statistics.values
        release(policy)
        return TokenStatistics(logprobs, entropy, None if policy.value_head is None else values)

    def record_old_logprobs(self, experience: Experience, every_row: bool = False) -> TokenStatistics:
        """Enter the log-probs of all response tokens under the policy that the step begins with, where not yet known.

        Args:
            experience: N rows, whose `old_logprobs` are filled in.
            every_row: compute the rows whose log-probs are known, too.

        Returns:
            What was computed.
        """
        assert experience.recorded_logprobs is not None
        rows = list(range(experience.num_rows)) if every_row else _unknown_rows(experience.recorded_logprobs)
        statistics = self.token_statistics(experience, rows)
        experience.recorded_logprobs[rows] = statistics.logprobs[rows]
        experience.old_logprobs = experience.recorded_logprobs
        return statistics

    def record_reference_logprobs(self, experience: Experience, every_row: bool = False) -> None:
        """Enter the log-probs of all response tokens under the reference, where they are not yet known.

        Args:
            experience: N rows, whose `reference_logprobs` are filled in.
            every_row: compute the rows whose log-probs are known, too: those of a reference that has moved since.
        """
        assert experience.reference_logprobs is not None
        rows = list(range(experience.num_rows)) if every_row else _unknown_rows(experience.reference_logprobs)
        if self.reference is None:
            with self.policy.adapters_disabled():
                found = self.token_statistics(experience, rows)
        else:
            reference = self.reference if self.is_sharded else self.reference.to(self.policy.device)
            found = self.token_statistics(experience, rows, reference)
        experience.reference_logprobs[rows] = found.logprobs[rows]

    @torch.no_grad()
    def move_reference(self, share: float) -> None:
        """Move the reference towards the policy.

        Args:
            share: of the policy's weights; 1 makes the two equal.
        """
        assert self.reference is not None
        for own, new in zip(self.reference.model.parameters(), self.policy.model.parameters(), strict=True):
            own.lerp_(new.to(own.device, own.dtype), share)

    def reference_state(self) -> dict[str, Tensor]:
        """Weights of the reference, on the host."""
        assert self.reference is not None
        return {name: weight.detach().cpu().clone() for name, weight in self.reference.model.named_parameters()}

    @torch.no_grad()
    def load_reference_state(self, state: dict[str, Tensor]) -> None:
        """Take over weights of an earlier reference."""
        assert self.reference is not None
        for name, weight in self.reference.model.named_parameters():
            weight.copy_(state[name])

    @torch.no_grad()
    def token_values(self, critic: nn.Module, experience: Experience) -> Tensor:
        """Values of all response tokens, [N, R], by a critic with passes of its own."""
        result = torch.zeros_like(experience.sampling_logprobs)
        for micro_batch, rows, part in self.micro_batches(experience):
            values = critic(*part.inputs, share_prompts=micro_batch.share_prompts, layout=part.layout)
            result[rows, : values.shape[1]] = values
        release(critic)
        return result

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
            keep_scoring: says after every block of a row's tokens whether scoring goes on; `None` scores all. Sharded
                policies, and those whose cache cannot be selected by row, score all.
            block_length: tokens of a block.

        Returns:
            [N] float32 tensors on the CPU, one entry per token, nats; NaN where scoring stopped early.
        """
        if not response_ids and not self.is_sharded:
            return []
        nothing = not response_ids  # sharded ranks meet in every pass, also those without rows
        experience = padded_rows(
            prompts.prompt_ids, [0] if nothing else prompt_index, [[0]] if nothing else response_ids
        ).to(self.policy.device)
        if keep_scoring is None or self.is_sharded or not self.policy.keeps_cache_by_row:
            logprobs = self.token_statistics(experience, [] if nothing else None).logprobs
        else:
            logprobs = self._logprobs_in_blocks(experience, keep_scoring, block_length)
        return [row[: len(ids)] for row, ids in zip(logprobs.cpu(), response_ids, strict=not nothing)]

    def _logprobs_in_blocks(self, experience: Experience, keep_scoring: KeepScoring, block_length: int) -> Tensor:
        result = torch.zeros_like(experience.sampling_logprobs)
        for _, rows, part in self.micro_batches(experience):

            def keep_scoring_part(local: Tensor, start: int, block: Tensor, rows: Tensor = rows) -> Tensor:
                return keep_scoring(rows[local], start, block)

            logprobs = block_logprobs(self.policy, part.inputs, keep_scoring_part, block_length, self.temperature)
            result[rows, : logprobs.shape[1]] = logprobs
        return result

    @torch.no_grad()
    def show(self, observer: ForwardObserver, experience: Experience) -> None:
        """Let an observer see the policy reading the given responses."""
        for micro_batch, _, part in self.micro_batches(experience):
            self._forward(self.policy, part, micro_batch, observer)
        release(self.policy)

    def training_forward(self, part: Experience, micro_batch: MicroBatch, is_observed: bool = True) -> TokenStatistics:
        """The forward pass of an update, with gradient; the observer sees it."""
        return self._forward(self.policy, part, micro_batch, self.observer if is_observed else None)

    def micro_batches(
        self,
        experience: Experience,
        rows: list[int] | None = None,
        told: Callable[[int, int], None] = lambda done, total: None,
    ) -> Iterator[tuple[MicroBatch, Tensor, Experience]]:
        """Micro-batches of the given rows, or of all, with the numbers of their rows, [n] long, and the rows.

        The numbers reach the device in one copy, before the first pass.

        Args:
            experience: of the step.
            rows: numbers of the rows.
            told: is called behind each micro-batch with how many are done, and of how many.
        """
        plan = self.plan(experience, rows)
        parts = experience.split([micro_batch.rows for micro_batch in plan])
        for done, (micro_batch, (row_numbers, part)) in enumerate(zip(plan, parts, strict=True), start=1):
            yield micro_batch, row_numbers, part
            told(done, len(plan))

    def plan(self, experience: Experience, rows: list[int] | None = None) -> list[MicroBatch]:
        """Micro-batches of the given rows, or of all.

        Sharded ranks, which meet in every layer of every pass, get equally many micro-batches, of one pass each.
        """
        plan = self._plan_rows(experience, list(range(experience.num_rows)) if rows is None else rows)
        if self.is_sharded:
            spare = plan[-1] if plan else self._plan_rows(experience, [0])[0]
            missing = max_over_ranks(len(plan), self.policy.device) - len(plan)
            plan += [replace(spare, is_dummy=True)] * missing
        return plan

    def _plan_rows(self, experience: Experience, rows: list[int]) -> list[MicroBatch]:
        layout = experience.layout
        owners = [layout.prompt_index[row] for row in rows]
        plan = plan_micro_batches(
            owners,
            [layout.prompt_lengths[owner] for owner in owners],
            [layout.response_lengths[row] for row in rows],
            self.micro_batch_tokens,
            self.policy.can_share_prompts and not self.is_sharded,  # a shared prompt takes a pass of its own
        )
        return [replace(part, rows=[rows[row] for row in part.rows]) for part in plan]

    def _forward(
        self, policy: Policy, part: Experience, micro_batch: MicroBatch, observer: ForwardObserver | None = None
    ) -> TokenStatistics:
        layers = None if observer is None or micro_batch.is_dummy else observer.layers(part)
        options: dict[str, Any] = {"layout": part.layout}
        if observer is not None and layers is not None:
            look = partial(_look, observer, part, self.temperature)
            options |= {"observe": look, "observed_layers": layers}
        return policy(*part.inputs, temperature=self.temperature, share_prompts=micro_batch.share_prompts, **options)


def _look(observer: ForwardObserver, part: Experience, temperature: float, states: HiddenStates, head: Tensor) -> None:
    observer.observe(part, states, head, temperature)


def _unknown_rows(logprobs: Tensor) -> list[int]:
    """Rows with NaN, which stands for log-probs that are not known; logprobs [N, R]."""
    return [row for row, is_unknown in enumerate(logprobs.isnan().any(-1).tolist()) if is_unknown]
