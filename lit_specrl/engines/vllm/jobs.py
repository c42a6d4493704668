"""Jobs for the engine: what a row asks of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch

from lit_specrl.types import SamplingConfig


class Job(NamedTuple):
    """A request to the engine for a row."""

    token_ids: list[int]
    params: Any
    """`vllm.SamplingParams`."""
    row: int | None = None
    """The row of the rollout that it generates, for drafters that look tokens up."""
    num_begun: int = 0
    """Tokens at the end of `token_ids` that belong to the present turn already."""
    num_scored: int = 0
    """Tokens at the end of `token_ids` to score; with any, the sampled token is dropped. See `scoring_job`."""


def generation_job(
    token_ids: list[int],
    sampling: SamplingConfig,
    max_tokens: int,
    stop_token_ids: Collection[int],
    seed: int,
    row: int | None = None,
    num_begun: int = 0,
) -> Job:
    """Sample what follows `token_ids`, up to and including a stop token."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or 0,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        max_tokens=max_tokens,
        stop_token_ids=sorted(stop_token_ids),
        ignore_eos=True,  # `stop_token_ids` has it, where it ends a response
        seed=seed,
        logprobs=0,  # of the sampled token
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    return Job(token_ids, params, row, num_begun)


def scoring_job(token_ids: list[int], num_scored: int, read_cache: bool = True) -> Job:
    """Have the last `num_scored` tokens scored.

    vLLM computes no log-probs of tokens whose KV it finds in its prefix cache, and therefore skips the cache for
    requests with log-probs. Those of the prompt are not needed here, so the cache is read: the rows of a group compute
    their prompt once.
    """
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0,
        max_tokens=1,
        prompt_logprobs=0,
        detokenize=False,
        skip_reading_prefix_cache=not read_cache,
    )
    return Job(token_ids, params, num_scored=num_scored)


def filler_job(prompt_length: int, num_tokens: int, seed: int) -> Job:
    """Generate a response of a given length, to measure times."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, seed=seed, logprobs=0, detokenize=False)
    return Job([seed % 7] * prompt_length, params)


def jobs_of_all_ranks(jobs: Mapping[int, Job]) -> tuple[dict[int, Job], dict[int, int]]:
    """Jobs of the ranks that hold an engine together, the same and in the same order on each.

    Returns:
        The jobs, numbered; and by number this rank's rows.
    """
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    ranks: list[list[Job]] = [[]] * group.world_size
    torch.distributed.all_gather_object(ranks, list(jobs.values()), group=group.cpu_group)
    start = sum(len(rank) for rank in ranks[: group.rank_in_group])
    everyone = [job for rank in ranks for job in rank]
    return dict(enumerate(everyone)), dict(enumerate(jobs, start=start))
