"""The loop that works on jobs, one step of vLLM after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from lit_specrl.drafting.scheduler.length_schedule import DecodeStep
from lit_specrl.engines.vllm.jobs import Job, scoring_job
from lit_specrl.engines.vllm.speculation import Speculation
from lit_specrl.types import FinishReason, TextEnd


class FinishedRow(NamedTuple):
    row: int
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason


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
    text_end: TextEnd | None = None,
) -> Iterator[EngineStep]:
    """Work on all rows at once and yield after every step of the engine.

    Requests go to vLLM's engine core, and its outputs are read there, as they come: tokens as lists, log-probs as
    arrays. The layer above it would build an object for every token.

    Args:
        llm: from `build_llm`.
        jobs: by row, in the order in which they start where not all fit.
        follow_up: gives the job that follows a scoring job at once.
        speculation: of an engine that can.
        choose_length: asked before every step; where it stops, unfinished rows are dropped.
        adapter: from `load_adapters`.
        text_end: finds stop strings; a row ends in the step that completes one, and keeps all tokens of that step.

    Raises:
        RuntimeError: vLLM has given a row up.
    """
    queue = _RunningJobs(llm, follow_up, speculation, choose_length, adapter, text_end)
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


@dataclass
class _Request:
    """A job that the engine works on, and what has come of it."""

    row: int
    job: Job
    token_ids: list[list[int]] = field(default_factory=list)
    """By step."""
    logprobs: list[np.ndarray] = field(default_factory=list)
    """By step, [n, 1] nats."""
    num_tokens: int = 0
    prompt_logprobs: Any = None
    """[P - 1, 1] nats, of a scoring job; of its last tokens alone, where others were not computed."""
    num_cached: int = 0
    """Tokens whose KV the engine had."""
    tail: list[int] = field(default_factory=list)
    """Latest tokens of the response, as many as `TextEnd.reach`."""


class _RunningJobs:
    """The requests that the engine works on; arguments as those of `run`."""

    def __init__(
        self,
        llm: Any,
        follow_up: FollowUp | None,
        speculation: Speculation | None,
        choose_length: ChooseLength | None,
        adapter: Any,
        text_end: TextEnd | None,
    ) -> None:
        self._inputs, self._core = llm.llm_engine.input_processor, llm.llm_engine.engine_core
        self._tasks = llm.llm_engine.get_supported_tasks()
        self._follow_up, self._adapter, self._text_end = follow_up, adapter, text_end
        self._speculation, self._choose_length = speculation, choose_length
        self._catch_up_s = 0.0  # of steps since the last one that has only decoded
        self.requests: dict[str, _Request] = {}
        """By vLLM's name, those that have not ended."""

    def submit(self, row: int, job: Job) -> None:
        """Add a job of a row."""
        prompt = {"type": "token", "prompt_token_ids": job.token_ids}
        request = self._inputs.process_inputs(str(row), prompt, job.params, self._tasks, lora_request=self._adapter)
        self._inputs.assign_request_id(request)  # a name that no other request has had
        self.requests[request.request_id] = added = _Request(row, job)
        if self._text_end is not None:
            count = min(job.num_begun, self._text_end.reach)
            added.tail = job.token_ids[len(job.token_ids) - count :]
        if self._speculation is not None and job.row is not None:
            self._speculation.follow(request.request_id, job.row)
        self._core.add_request(request)

    def step(self) -> EngineStep | None:
        """Do one step of the engine; `None`, without one, where `choose_length` stops."""
        if self._speculation is not None:
            return self._speculating_step(self._speculation)
        started_at = time.perf_counter()
        outputs = self._core.get_output().outputs
        num_tokens, finished = self._take(outputs)
        return EngineStep(num_tokens, finished, time.perf_counter() - started_at, None)

    def _speculating_step(self, speculation: Speculation) -> EngineStep | None:
        age = self._mean_age()
        if not self._set_length(speculation, age):
            return None
        num_running = speculation.num_running  # none where all are to be computed again
        started_at = time.perf_counter()
        outputs = self._core.get_output().outputs
        elapsed_s = time.perf_counter() - started_at
        # none is prefilled
        are_decoding = bool(outputs) and all(self.requests[output.request_id].num_tokens for output in outputs)
        num_tokens, finished = self._take(outputs)
        found, decoding = speculation.end_step(len(outputs), num_tokens, elapsed_s), None
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
            self._core.abort_requests(list(self.requests))
        while self._core.engine_core.batch_queue:  # steps that were scheduled ahead, of rows that have ended since
            self._core.get_output()

    def _mean_age(self) -> float:
        ages = [request.num_tokens for request in self.requests.values() if request.num_tokens]  # others have not begun
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
            request = self.requests[output.request_id]
            if request.job.num_scored:
                _keep_scores(request, output)
            else:
                count = len(output.new_token_ids)
                num_tokens += count
                request.num_tokens += count
                request.token_ids.append(output.new_token_ids)
                if output.new_logprobs is not None:
                    request.logprobs.append(output.new_logprobs.logprobs)
            reason = output.finish_reason
            if reason is None and self._text_end is not None and self._completes_text(request, output.new_token_ids):
                self._core.abort_requests([output.request_id])
                reason = "stop"
            if reason is None:
                continue
            del self.requests[output.request_id]
            finished += self._go_on(request) if request.job.num_scored else [_finished_row(request, str(reason))]
        return num_tokens, finished

    def _completes_text(self, request: _Request, token_ids: Sequence[int]) -> bool:
        """Whether the tokens that a step has added to a row complete a stop string; vLLM sees no text."""
        if request.job.num_scored:
            return False
        assert self._text_end is not None
        start = len(request.tail)
        request.tail += token_ids
        ends = self._text_end(request.tail, start)
        del request.tail[: max(0, len(request.tail) - self._text_end.reach)]
        return ends is not None

    def _go_on(self, request: _Request) -> list[FinishedRow]:
        """Submit what follows a scoring job; the row itself, where nothing does."""
        row, job = request.row, request.job
        num_unscored = len(job.token_ids) - job.num_scored
        if request.num_cached >= num_unscored:  # the KV cache held a part of what was to be scored
            self.submit(row, scoring_job(job.token_ids, job.num_scored, read_cache=False))
            return []
        assert self._follow_up is not None
        next_job = self._follow_up(row, request.prompt_logprobs[-job.num_scored :, 0].tolist())
        if next_job is None:
            return [FinishedRow(row, [], [], "stop")]
        self.submit(row, next_job)
        return []


def _keep_scores(request: _Request, output: Any) -> None:
    if output.prefill_stats is not None:
        request.num_cached = output.prefill_stats.num_cached_tokens
    if output.new_prompt_logprobs_tensors is not None:
        request.prompt_logprobs = output.new_prompt_logprobs_tensors.logprobs


def _finished_row(request: _Request, reason: str) -> FinishedRow:
    if reason not in ("stop", "length"):
        raise RuntimeError(
            f"vLLM has given up row {request.row} after {request.num_tokens} tokens: {reason}; its log tells why "
            "(VLLM_LOGGING_LEVEL=INFO)"
        )
    logprobs = np.concatenate(request.logprobs)[:, 0].tolist() if request.logprobs else []
    return FinishedRow(
        request.row, list(chain.from_iterable(request.token_ids)), logprobs, "stop" if reason == "stop" else "length"
    )
