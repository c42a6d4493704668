"""Jobs for the engine, and the loop that works on them step by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from lit_specrl.drafting.history import RowHistory
from lit_specrl.drafting.scheduler.length_schedule import DecodeStep
from lit_specrl.engines.vllm.speculation import Speculation


class Job(NamedTuple):
    """A request to the engine for a row."""

    token_ids: list[int]
    params: Any
    """`vllm.SamplingParams`."""
    history: RowHistory | None = None
    """Past responses, for a drafter that reads them."""
    num_scored: int = 0
    """Tokens at the end of `token_ids` to score; with any, the sampled token is dropped. See `scoring_job`."""


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


class FinishedRow(NamedTuple):
    row: int
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


class EngineStep(NamedTuple):
    """One step of the engine: every running row one token further, or more by speculation."""

    num_tokens: int
    """Tokens generated in this step."""
    finished: list[FinishedRow]
    elapsed_s: float
    decoding: DecodeStep | None
    """The step for the speculation schedule; `None` where rows were prefilled or scored, or without speculation."""


FollowUp = Callable[[int, list[float]], Job | None]
"""(row, log-probs of the scored tokens) -> the next job of the row, or `None` where the row is finished."""
ChooseLength = Callable[[int, float], int | None]
"""(active rows, tokens that they have generated on average) -> tokens to draft for each, or `None` to stop."""


def run(
    llm: Any,
    jobs: Mapping[int, Job],
    follow_up: FollowUp | None = None,
    speculation: Speculation | None = None,
    choose_length: ChooseLength | None = None,
    adapter: Any = None,
) -> Iterator[EngineStep]:
    """Work on all rows at once and yield after every step of the engine.

    Args:
        llm: from `build_llm`.
        jobs: by row, in the order in which they start where not all fit.
        follow_up: gives the job that follows a scoring job at once.
        speculation: of an engine that can.
        choose_length: asked before every step; where it stops, unfinished rows are dropped.
        adapter: from `load_adapters`.
    """
    queue = _RunningJobs(llm, follow_up, speculation, choose_length, adapter)
    try:
        for row, job in jobs.items():
            queue.submit(row, job)
        while queue.requests:
            step = queue.step()
            if step is None:
                return
            yield step
    finally:
        queue.finish()


class _RunningJobs:
    """The requests that the engine works on; arguments as those of `run`."""

    def __init__(
        self,
        llm: Any,
        follow_up: FollowUp | None,
        speculation: Speculation | None,
        choose_length: ChooseLength | None,
        adapter: Any,
    ) -> None:
        self._engine, self._follow_up, self._adapter = llm.llm_engine, follow_up, adapter
        self._speculation, self._choose_length = speculation, choose_length
        self._prefix = f"{time.monotonic_ns()}-"
        self._seen: dict[str, int] = {}  # request -> tokens generated so far; also of finished ones
        self._catch_up_s = 0.0  # of steps since the last one that has only decoded
        self.requests: dict[str, tuple[int, Job]] = {}
        """Request -> its row and job, of those that have not ended."""

    def submit(self, row: int, job: Job) -> None:
        """Add a job of a row."""
        name = f"{self._prefix}{row}-{len(self._seen)}"
        self._engine.add_request(name, {"prompt_token_ids": job.token_ids}, job.params, lora_request=self._adapter)
        self.requests[name], self._seen[name] = (row, job), 0
        if self._speculation is not None and job.history is not None:
            self._speculation.follow(name, job.history)

    def step(self) -> EngineStep | None:
        """Do one step of the engine; `None`, without one, where `choose_length` stops."""
        num_running, age = 0, 0.0
        if self._speculation is not None:
            age = self._mean_age()
            if not self._set_length(self._speculation, age):
                return None
            num_running = self._speculation.num_running  # none where all are to be computed again
        started_at = time.perf_counter()
        outputs = self._engine.step()
        elapsed_s = time.perf_counter() - started_at
        are_decoding = bool(outputs) and all(self._seen[output.request_id] for output in outputs)  # none is prefilled
        num_tokens, finished = self._take(outputs)
        decoding = None
        if self._speculation is not None:
            found = self._speculation.end_step(len(outputs), num_tokens, elapsed_s)
            if are_decoding and len(outputs) == num_running:
                decoding, self._catch_up_s = replace(found, age=age, catch_up_s=self._catch_up_s), 0.0
            elif are_decoding:  # the drafter is shown tokens that were generated without it
                self._catch_up_s += elapsed_s
        return EngineStep(num_tokens, finished, elapsed_s, decoding)

    def finish(self) -> None:
        """Leave an engine that can be used again, also after an interruption."""
        if self._speculation is not None:
            self._speculation.forget()
        if self.requests:
            self._engine.abort_request(list(self.requests))

    def _mean_age(self) -> float:
        ages = [self._seen[name] for name in self.requests if self._seen[name]]  # others wait, or have just begun
        return sum(ages) / max(1, len(ages))

    def _set_length(self, speculation: Speculation, age: float) -> bool:
        """Ask for the next speculation length; False to stop."""
        if self._choose_length is None:
            return True
        length = self._choose_length(speculation.num_running or len(self.requests), age)
        if length is not None:
            speculation.set_length(length)
        return length is not None

    def _take(self, outputs: Sequence[Any]) -> tuple[int, list[FinishedRow]]:
        """Tokens that a step has generated, and the rows that it has finished; scored rows get their next job."""
        num_tokens, finished = 0, list[FinishedRow]()
        for output in outputs:
            (row, job), completion = self.requests[output.request_id], output.outputs[0]
            if not job.num_scored:
                num_tokens += len(completion.token_ids) - self._seen[output.request_id]
                self._seen[output.request_id] = len(completion.token_ids)
            if not output.finished:
                continue
            del self.requests[output.request_id]
            if job.num_scored:
                finished += self._go_on(row, job, output)
            else:
                finished.append(_finished_row(row, completion))
        return num_tokens, finished

    def _go_on(self, row: int, job: Job, output: Any) -> list[FinishedRow]:
        """Submit what follows a scoring job; the row itself, where nothing does."""
        num_unscored = len(job.token_ids) - job.num_scored
        if output.num_cached_tokens >= num_unscored:  # the KV cache held a part of what was to be scored
            self.submit(row, scoring_job(job.token_ids, job.num_scored, read_cache=False))
            return []
        assert self._follow_up is not None
        next_job = self._follow_up(row, _last_logprobs(job, output.prompt_logprobs))
        if next_job is None:
            return [FinishedRow(row, [], [], "stop")]
        self.submit(row, next_job)
        return []


def _last_logprobs(job: Job, entries: Any) -> list[float]:
    last = slice(-job.num_scored, None)  # the entries before may be missing, or those of tokens that were not computed
    return [entry[token].logprob for token, entry in zip(job.token_ids[last], entries[last], strict=True)]


def _finished_row(row: int, completion: Any) -> FinishedRow:
    token_ids = list(completion.token_ids)
    logprobs = [entry[token].logprob for token, entry in zip(token_ids, completion.logprobs, strict=True)]
    return FinishedRow(row, token_ids, logprobs, completion.finish_reason)
