"""vLLM as it comes, on the same requests and in the same process: what the library's own loop is measured against."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lit_specrl.engines.vllm.jobs import Job


def generate(llm: Any, jobs: Sequence[Job], with_logprobs: bool = True, with_seeds: bool = True) -> list[list[int]]:
    """Responses from `vllm.LLM.generate`.

    Args:
        llm: from `build_llm`.
        jobs: of generation.
        with_logprobs: ask for the log-probs of the sampled tokens.
        with_seeds: give every request the seed of its job.
    """
    params = []
    for job in jobs:
        own = job.params.clone()
        own.logprobs = own.logprobs if with_logprobs else None
        own.seed = own.seed if with_seeds else None
        params.append(own)
    prompts = [{"type": "token", "prompt_token_ids": job.token_ids} for job in jobs]
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False)]


@contextmanager
def stock_sampling(llm: Any) -> Iterator[None]:
    """Let vLLM sample itself on a CPU, where the library has its own sampler; see `take_over_sampling`."""
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    taken_over = [(owner, name) for owner, name in _places(runner) if name in vars(owner)]
    own = [vars(owner).pop(name) for owner, name in taken_over]
    try:
        yield
    finally:
        for (owner, name), value in zip(taken_over, own, strict=True):
            setattr(owner, name, value)


def _places(runner: Any) -> list[tuple[Any, str]]:
    return [(runner, "_sample"), (runner.sampler, "compute_logprobs"), (runner.sampler, "gather_logprobs")]


@contextmanager
def runner_time(llm: Any) -> Iterator[Callable[[], float]]:
    """Processor seconds of this process inside vLLM's model runner, of all its threads."""
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    seconds = [0.0]

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            started_at = time.process_time()
            try:
                return method(*arguments, **options)
            finally:
                seconds[0] += time.process_time() - started_at

        return call

    executor.execute_model, executor.sample_tokens = timed(executor.execute_model), timed(executor.sample_tokens)
    try:
        yield lambda: seconds[0]
    finally:
        del executor.execute_model, executor.sample_tokens
