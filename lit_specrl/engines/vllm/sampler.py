"""Sampling inside vLLM on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_specrl.drafting.verification import draw, rejection_sample
from lit_specrl.engines.truncation import min_p_logits, penalised_logits
from lit_specrl.seeds import token_uniforms

_SCORED_ROWS = 16  # log-probs are computed for so many tokens at a time


class CPUSampler:
    """Samples in place of vLLM 0.32's model runner on a CPU, with and without drafts. Exact, see `rejection_sample`.

    vLLM draws noise for the whole vocabulary of every row, in one thread. With drafts, at temperatures above 0, it
    samples from wrong distributions: it expands the temperatures to one per drafted token into an integer copy of the
    result, drops the copy, and divides the logits by uninitialised memory.

    The token at a place of a row depends on the row's seed and the place alone. Drafts that were not sampled change no
    token.

    Args:
        runner: the model runner.
        draft_vocabulary: [V'] long, ascending token ids that its drafter can draft; `None` for all.
    """

    def __init__(self, runner: Any, draft_vocabulary: Tensor | None = None) -> None:
        self._runner, self._draft_vocabulary = runner, draft_vocabulary
        self._next_positions: list[int] = []  # of the tokens that are drafted next
        self.drafted: list[int] = []
        """Of the latest step: rows that had a k-th drafted token, by position."""
        self.accepted: list[int] = []
        """Rows of which the k-th and all before it were accepted, by position."""

    def sample(self, logits: Tensor, metadata: Any) -> Any:
        """As `GPUModelRunner._sample`; logits [T + N, V] and the drafts of the step, or [N, V] and `None`."""
        from vllm.v1.outputs import LogprobsTensors, SamplerOutput

        batch = self._runner.input_batch
        sampling = batch.sampling_metadata
        num_rows = batch.num_reqs
        num_drafted = [0] * num_rows if metadata is None else metadata.num_draft_tokens
        drafts = torch.empty(0, dtype=torch.long) if metadata is None else metadata.draft_token_ids.long()
        probs = None if metadata is None else self._runner._get_spec_decode_draft_probs(metadata)
        rows = [row for row, count in enumerate(num_drafted) for _ in range(count + 1)]
        offsets = [offset for count in num_drafted for offset in range(count + 1)]
        seeds = _seeds(sampling, rows)
        starts = (batch.num_tokens_no_spec[:num_rows] - batch.num_prompt_tokens[:num_rows]).tolist()
        positions = [starts[row] + offset for row, offset in zip(rows, offsets, strict=True)]
        logits = logits.float()
        if not sampling.no_penalties:
            batch.update_async_output_token_ids()
            logits = _penalised(logits, batch, drafts.tolist(), num_drafted)
        emitted = rejection_sample(
            _processed(logits, sampling, torch.tensor(rows)),
            drafts,
            num_drafted,
            probs,
            token_uniforms(seeds, positions, "token"),
            None if probs is None else token_uniforms(seeds, positions, "acceptance"),
            None if sampling.all_random else _is_greedy(sampling, num_rows),
            self._draft_vocabulary,
        )
        num_emitted = (emitted.token_ids >= 0).sum(-1).tolist()
        self._next_positions = [start + count for start, count in zip(starts, num_emitted, strict=True)]
        self.drafted, self.accepted = _counts(num_drafted, num_emitted)
        flat = emitted.token_ids.int().clamp_min(0).reshape(-1, 1)
        ranks = torch.zeros(len(flat), dtype=torch.long)  # not asked for
        return SamplerOutput(emitted.token_ids.int(), LogprobsTensors(flat, emitted.logprobs.reshape(-1, 1), ranks))

    def sample_draft(self, logits: Tensor, sampling: Any) -> tuple[Tensor, Tensor | None]:
        """As `SpecDecodeBaseProposer._sample_from_logits`: draft tokens [N] and their distributions [N, V'].

        vLLM draws them from the global generator, so that no run could be repeated. It also spreads them over the whole
        vocabulary, which is most of the cost of a head with few tokens.
        """
        if sampling.all_greedy:
            return logits.argmax(-1), None
        own = logits if self._draft_vocabulary is None else logits[:, self._draft_vocabulary]  # [N, V']
        rows = list(range(len(own)))
        probs = _processed(own.float(), sampling, torch.tensor(rows)).softmax(-1)
        uniforms = token_uniforms(_seeds(sampling, rows), self._next_positions, "draft")
        self._next_positions = [position + 1 for position in self._next_positions]
        drafted = draw(probs, uniforms)
        if not sampling.all_random:
            drafted = torch.where(_is_greedy(sampling, len(rows)), own.argmax(-1), drafted)
        return drafted if self._draft_vocabulary is None else self._draft_vocabulary[drafted], probs


def score_tokens(logits: Tensor, num_logprobs: int, token_ids: Tensor) -> Any:
    """As `Sampler.gather_logprobs`, from logits [n, V], for the tokens [n] themselves and without ranks.

    To count ranks, vLLM compiles a function when it scores for the first time, which takes seconds and needs a
    compiler. The log-softmax of a few rows at a time stays in the processor's cache.
    """
    from vllm.v1.outputs import LogprobsTensors

    assert num_logprobs == 0, f"only the log-probs of the tokens themselves, got {num_logprobs} more"
    token_ids = token_ids[:, None]
    logprobs = [
        part.log_softmax(-1, dtype=torch.float32).gather(1, own)
        for part, own in zip(logits.split(_SCORED_ROWS), token_ids.split(_SCORED_ROWS), strict=True)
    ]
    return LogprobsTensors(token_ids.int(), torch.cat(logprobs), torch.zeros(len(token_ids), dtype=torch.long))


def _seeds(sampling: Any, rows: list[int]) -> list[int]:
    """Of requests without a seed (greedy ones): 0."""
    return [sampling.generators[row].initial_seed() if row in sampling.generators else 0 for row in rows]


def _is_greedy(sampling: Any, num_rows: int) -> Tensor:
    return torch.ones(num_rows, dtype=torch.bool) if sampling.all_greedy else sampling.temperature[:num_rows] == 0


def _processed(logits: Tensor, sampling: Any, rows: Tensor) -> Tensor:
    """Logits after temperature and truncation; `rows` [n] are the rows that they belong to."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    assert not sampling.bad_words_token_ids and sampling.allowed_token_ids_mask is None
    if not sampling.all_greedy:
        temperature = sampling.temperature[rows]
        if (temperature != 1).any():
            logits = logits / temperature.masked_fill(temperature == 0, 1)[:, None]
        logits = _without_unlikely(logits, sampling, rows)
    top_k, top_p = (None if values is None else values[rows] for values in (sampling.top_k, sampling.top_p))
    top_k = None if top_k is None else top_k.clamp_max(logits.shape[-1])  # of a drafter that knows fewer tokens
    return apply_top_k_top_p(logits, top_k, top_p)


def _without_unlikely(logits: Tensor, sampling: Any, rows: Tensor) -> Tensor:
    """Logits [n, V] without the tokens that `min_p` leaves out; vLLM holds it for engines that do not draft."""
    from vllm.v1.sample.logits_processor.builtin import MinPLogitsProcessor

    for processor in sampling.logitsprocs.argmax_invariant:
        if isinstance(processor, MinPLogitsProcessor) and processor.min_p_count:
            least = torch.tensor([processor.get_min_p_by_index(row) for row in rows.tolist()])[:, None]
            logits = min_p_logits(logits, least)
    return logits


def _penalised(logits: Tensor, batch: Any, drafts: list[int], num_drafted: list[int]) -> Tensor:
    """Logits [T + N, V] under each row's `repetition_penalty`, at whose k-th place its k first drafted tokens have been
    said as well."""
    penalties = batch.sampling_metadata.repetition_penalties.tolist()
    seen = torch.zeros_like(logits, dtype=torch.bool)
    place = first_draft = 0
    for row, count in enumerate(num_drafted):
        said = batch.token_ids_cpu[row, : batch.num_prompt_tokens[row]].tolist() + batch.req_output_token_ids[row]
        drafted = drafts[first_draft : first_draft + count]
        for offset in range(count + 1):
            seen[place + offset, said + drafted[:offset]] = penalties[row] != 1
        place, first_draft = place + count + 1, first_draft + count
    by_place = torch.tensor([penalties[row] for row, count in enumerate(num_drafted) for _ in range(count + 1)])
    return penalised_logits(logits, seen, by_place[:, None])


class RejectionCounter(nn.Module):
    """Counts the tokens that vLLM's own rejection sampler accepts on a GPU, by position.

    Args:
        rejection_sampler: the runner's `rejection_sampler`.
    """

    def __init__(self, rejection_sampler: nn.Module) -> None:
        super().__init__()
        self.rejection_sampler = rejection_sampler
        self.drafted: list[int] = []
        self.accepted: list[int] = []

    def forward(self, metadata: Any, *arguments: Any) -> Any:
        """As `RejectionSampler.forward`."""
        output = self.rejection_sampler(metadata, *arguments)
        self.drafted, self.accepted = _counts(
            metadata.num_draft_tokens, (output.sampled_token_ids >= 0).sum(-1).tolist()
        )
        return output


def _counts(num_drafted: list[int], num_emitted: list[int]) -> tuple[list[int], list[int]]:
    """Rows with a k-th drafted token, and those of which it was accepted, by position."""
    positions = range(1, max(num_drafted) + 1)
    drafted = [sum(count >= position for count in num_drafted) for position in positions]
    return drafted, [sum(count > position for count in num_emitted) for position in positions]
