"""Starting and stopping vLLM in this process."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_specrl.checkpoints.locks import ProcessFolder
from lit_specrl.drafting.drafters import Drafter, DraftModel
from lit_specrl.engines.vllm.borrowed_classes import BorrowedClasses
from lit_specrl.engines.vllm.sampler import CPUSampler, RejectionCounter, score_tokens
from lit_specrl.engines.vllm.speculation import Speculation
from lit_specrl.engines.vllm.startup_log import told_by_vllm
from lit_specrl.engines.vllm.version import check_version
from lit_specrl.models.model_name import hub_options

# Read by vLLM when it is imported or started. In one process, weights are handed over by reference.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise the trainer loses a thread and is pinned to vLLM's cores
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

STARTUP_ERRORS = (RuntimeError, ValueError, AssertionError, AttributeError, KeyError, TypeError, ImportError)
"""What vLLM raises where it does not know a model, or has no room for it."""

_KEPT_ENGINES: list[Any] = []  # see `shutdown`


def build_llm(model: str, device: torch.device, drafter: Drafter | None = None, **options: Any) -> Any:
    """Construct a `vllm.LLM` in this process, with empty weights.

    Args:
        model: hub name or folder, maybe a `ModelName`; only its configuration is read.
        device: where the policy computes.
        drafter: proposes tokens; `None` for an engine that cannot speculate.
        options: arguments of `vllm.LLM`, `max_num_seqs` among them.
    """
    check_version()
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    if drafter is not None:
        # on GPUs the second generation of vLLM's model runner is another code path than the one tested
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would count instead of `kv_cache_memory_bytes`
    from vllm import LLM
    from vllm.config.logging import LoggingConfig
    from vllm.logger import configure_logging_if_needed

    placing: dict[str, str] = {}
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        # one engine per rank, in the ranks' process group
        options["distributed_executor_backend"] = "external_launcher"
        placing = _place_of_rank(device, torch.distributed.get_rank())
        if options.get("tensor_parallel_size", 1) > 1:
            _leave_shared_memory_alone()
    elif device.index:  # vLLM takes the first GPU otherwise
        options.setdefault("device_ids", [device.index])
    own_options: dict[str, Any] = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # sampling is decided by the request alone
        "logprobs_mode": "processed_logprobs",  # of the distribution that was sampled from
        "enable_prefix_caching": True,
    } | hub_options(model)
    folder = _meeting_folder()
    configure_logging_if_needed(LoggingConfig())  # otherwise the first engine does, and takes our listener away
    borrowed = BorrowedClasses()
    with told_by_vllm(rank_zero_info), _environment(placing), borrowed.noting():
        llm: Any = LLM(model=str(model), **(own_options | options | _speculative_options(drafter, options)))
    runner = _runner(llm)
    borrowed.give_back([model for model in (runner.model, _draft_network(runner)) if model is not None])
    llm.meeting_folder = folder
    return llm


def _runner(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def _draft_network(runner: Any) -> Any:
    return getattr(getattr(runner, "drafter", None), "model", None)


def _place_of_rank(device: torch.device, rank: int) -> dict[str, str]:
    """What vLLM reads of a rank's place, as torchrun would have set it.

    vLLM takes the local rank for the number of the GPU. It is not where a run has `devices: [2, 3]`, and Slurm does not
    set it.
    """
    local_rank = os.environ.get("LOCAL_RANK", str(rank)) if device.index is None else str(device.index)
    return {"RANK": str(rank), "LOCAL_RANK": local_rank}


@contextmanager
def _environment(changed: Mapping[str, str]) -> Iterator[None]:
    """Change the environment for a while: a later trainer reads its own place there."""
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def startup_failure(model: str, error: BaseException) -> str:
    """What to say of an engine that does not start: vLLM's reason, and the way out."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # pydantic puts a count before the reason
    reason = lines[1] if len(lines) > 1 and "validation error" in lines[0] else "".join(lines[:1])
    reason = reason.partition(" [type=")[0]
    about_model = any(word in reason for word in ("rchitecture", "not supported", "not support", "rust_remote_code"))
    advice = (
        "use TransformersEngine, which generates with the policy itself"
        if about_model or isinstance(error, ImportError | NotImplementedError | AttributeError | KeyError | TypeError)
        else "where memory is short, change gpu_memory_utilization, cpu_kv_cache_gib, max_num_seqs or max_model_len; "
        "TransformersEngine generates without vLLM"
    )
    return f"vLLM does not start with {model!r}: {type(error).__name__}: {reason}; {advice}"


def _meeting_folder() -> ProcessFolder:
    """Where the workers of the next engine meet; vLLM 0.32 leaves a file among the temporary ones for ever."""
    from vllm.v1.executor import uniproc_executor

    folder, executor = ProcessFolder("engine"), cast(Any, uniproc_executor)
    executor.get_file_store_init_method = lambda: f"file://{folder.name}/workers"
    return folder


def _leave_shared_memory_alone() -> None:
    """Let the ranks of a CPU engine talk through the process group.

    vLLM 0.32 takes shared memory. Under an external launcher its name is the same for all runs of a machine, so that no
    run can start after one has left it behind.
    """
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    communicator: Any = CpuCommunicator
    communicator._all_group_ranks_share_shm_group_name = lambda self: False


def take_over_sampling(llm: Any, drafter: Drafter | None) -> Speculation | None:
    """Let the engine sample as `CPUSampler` does, where it runs on a CPU.

    Returns:
        The control of its speculation, if there is a drafter.
    """
    runner = _runner(llm)
    sampler: CPUSampler | RejectionCounter
    if runner.device.type == "cpu":
        sampler = CPUSampler(runner, _draft_vocabulary(runner))
        runner._sample = sampler.sample
        runner.sampler.compute_logprobs, runner.sampler.gather_logprobs = (lambda logits: logits), score_tokens
        if getattr(drafter, "sampled", False):
            runner.drafter._sample_from_logits = sampler.sample_draft
    elif drafter is not None:
        runner.rejection_sampler = sampler = RejectionCounter(runner.rejection_sampler)
    return None if drafter is None else Speculation(llm, runner, sampler, drafter)


def _draft_vocabulary(runner: Any) -> Tensor | None:
    """[V'] token ids that the drafter can draft, where they are ascending and not all."""
    offsets = getattr(_draft_network(runner), "draft_id_to_target_id", None)
    if offsets is None:
        return None
    token_ids = offsets.detach() + torch.arange(len(offsets), device=offsets.device)
    return token_ids if bool((token_ids.diff() > 0).all()) else None


def _speculative_options(drafter: Drafter | None, options: Mapping[str, Any]) -> dict[str, Any]:
    if drafter is None:
        return {}
    longest = drafter.num_speculative_tokens
    # vLLM reads the speculation length from a table in each step, if it was given one; `Speculation` rewrites it
    table = [(1, options["max_num_seqs"], longest)]
    config: dict[str, Any] = {"num_speculative_tokens": longest, "num_speculative_tokens_per_batch_size": table}
    from vllm.config.load import LoadConfig

    config["draft_load_config"] = LoadConfig()  # the policy begins with empty weights, a drafter with its own
    # vLLM 0.32 loads a draft model in the policy's way, whatever it is told
    load_format = {"load_format": "auto"} if isinstance(drafter, DraftModel) else {}
    return {"speculative_config": drafter.vllm_config() | config} | load_format


def shutdown(llm: Any) -> None:
    """Stop the engine and give its memory back.

    When vLLM stops, or is collected, it destroys the process group. One of several ranks belongs to the trainer, which
    still needs it: there the engine is kept until the process ends.
    """
    from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        _KEPT_ENGINES.append(llm)
        return
    llm.llm_engine.engine_core.shutdown()
    destroy_model_parallel()
    destroy_distributed_environment()
    llm.meeting_folder.cleanup()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
