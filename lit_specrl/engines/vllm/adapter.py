"""What knows vLLM beyond its documented interface: this file, and `vllm_sampler`, `vllm_proposers` and `vllm_speculation`, which it puts into the engine.

Everything here was tried with the versions in `TESTED`; `check_version` refuses others before vLLM is imported.
"""

from __future__ import annotations

import ast
import gc
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from packaging.specifiers import SpecifierSet
from safetensors.torch import save_file
from torch import Tensor

from lit_specrl.checkpoints.locks import ProcessFolder
from lit_specrl.drafting.drafters import Drafter, DraftModel
from lit_specrl.drafting.history import RowHistory
from lit_specrl.drafting.scheduler.length_schedule import DecodeStep
from lit_specrl.engines.vllm.sampler import CPUSampler, VerificationCounter, score_tokens
from lit_specrl.engines.vllm.speculation import Speculation, repack_tied_head
from lit_specrl.models.lora import Adapter

TESTED = SpecifierSet("==0.32.*")

# Read by vLLM when it is imported or started. The engine runs in this process, so that weights are handed over by reference.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise the trainer is left with one thread fewer, pinned to vLLM's cores
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_ADAPTER_NAME = "policy"

_KEPT_ENGINES: list[Any] = []  # see `shutdown`


def installed_version() -> tuple[str, str] | None:
    """(distribution, version) of the installed vLLM, or `None`."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return distribution, metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_version() -> str:
    """Name and version of the installed vLLM, such as "vllm-cpu 0.32.0".

    Raises:
        ImportError: vLLM is missing, or a version that this adapter has not been tried with.
    """
    installed = installed_version()
    if installed is None:
        raise ImportError(
            "VLLMEngine needs vLLM; install it with `pip install lit_specrl[vllm]` (GPU) or "
            "`pip install lit_specrl[cpu]`, or use engine: TransformersEngine"
        )
    distribution, version = installed
    if version not in TESTED:
        raise ImportError(
            f"VLLMEngine works with {distribution}{TESTED}, found {version}; install it with "
            f"`pip install '{distribution}{TESTED}'` or use engine: TransformersEngine"
        )
    return f"{distribution} {version}"


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse arguments that `vllm.LLM` does not have; read from vLLM's source, whose import takes long.

    Raises:
        ValueError: an unknown name.
    """
    unknown = [name for name in options if name not in _option_names()] if options else []
    if unknown:
        similar = get_close_matches(unknown[0], _option_names(), 1)
        hint = f"did you mean {similar[0]}?" if similar else "options are the arguments of vllm.LLM"
        raise ValueError(f"vLLM has no option {unknown[0]!r}; {hint}")


@cache
def _option_names() -> frozenset[str]:
    spec = find_spec("vllm")
    assert spec is not None and spec.origin is not None, "after `check_version`"
    names = set[str]()
    for file in ("engine/arg_utils.py", "entrypoints/llm.py"):
        for node in ast.walk(ast.parse((Path(spec.origin).parent / file).read_text("utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name == "EngineArgs":
                names |= {
                    field.target.id
                    for field in node.body
                    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                }
            if isinstance(node, ast.ClassDef) and node.name == "LLM":
                constructor = next(
                    item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"
                )
                names |= {argument.arg for argument in [*constructor.args.args, *constructor.args.kwonlyargs]}
    return frozenset(names - {"self"})


def build_llm(model: str, cpu_kv_cache_gib: float, drafter: Drafter | None = None, **options: Any) -> Any:
    """Construct a `vllm.LLM` in this process, with empty weights.

    Args:
        model: hub name or folder; only its configuration is read.
        cpu_kv_cache_gib: size of the key-value cache on a machine without GPU, in GiB.
        drafter: proposes tokens; `None` for an engine that cannot speculate.
        options: arguments of `vllm.LLM`, `max_num_seqs` among them.
    """
    check_version()
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    if drafter is not None:
        # on GPUs the second generation of vLLM's model runner is another code path than the one tested
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(int(cpu_kv_cache_gib))
    from vllm import LLM

    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        # one engine per rank, in the ranks' process group; vLLM reads what torchrun would have set
        options["distributed_executor_backend"] = "external_launcher"
        os.environ.setdefault("RANK", str(torch.distributed.get_rank()))
        os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
        if options.get("tensor_parallel_size", 1) > 1:
            _leave_shared_memory_alone()
    own_options: dict[str, Any] = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # sampling is decided by the request alone
        "logprobs_mode": "processed_logprobs",  # of the distribution that was sampled from
        "enable_prefix_caching": True,
    }
    folder = _meeting_folder()
    llm: Any = LLM(model=model, **(own_options | options | _speculative_options(drafter, options)))
    llm.meeting_folder = folder
    return llm


def _meeting_folder() -> ProcessFolder:
    """Where the workers of the next engine find each other; vLLM 0.32 takes the folder for temporary files and leaves a file there for ever."""
    from vllm.v1.executor import uniproc_executor

    folder, executor = ProcessFolder("engine"), cast(Any, uniproc_executor)
    executor.get_file_store_init_method = lambda: f"file://{folder.name}/workers"
    return folder


def _leave_shared_memory_alone() -> None:
    """Let the ranks of a CPU engine talk through the process group.

    vLLM 0.32 takes shared memory, whose name is the same for all runs of a machine under an external launcher: none can start where one has left it behind.
    """
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    communicator: Any = CpuCommunicator
    communicator._all_group_ranks_share_shm_group_name = lambda self: False


def take_over_sampling(llm: Any, drafter: Drafter | None) -> Speculation | None:
    """Let the engine sample as `CPUSampler` does, where it runs on a CPU.

    Returns:
        The control of its speculation, if there is a drafter.
    """
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    sampler: CPUSampler | VerificationCounter
    if runner.device.type == "cpu":
        sampler = CPUSampler(runner, _draft_vocabulary(runner))
        runner._sample = sampler.sample
        runner.sampler.compute_logprobs, runner.sampler.gather_logprobs = (lambda logits: logits), score_tokens
        if getattr(drafter, "sampled", False):
            runner.drafter._sample_from_logits = sampler.sample_draft
    elif drafter is not None:
        runner.rejection_sampler = sampler = VerificationCounter(runner.rejection_sampler)
    return None if drafter is None else Speculation(llm, runner, sampler, drafter)


def _draft_vocabulary(runner: Any) -> Tensor | None:
    """[V'] token ids that the drafter can draft, where they are ascending and not all."""
    offsets = getattr(getattr(getattr(runner, "drafter", None), "model", None), "draft_id_to_target_id", None)
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


def load_weights(llm: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Replace the weights of the running engine and flush its KV prefix cache."""
    # model.load_weights would fail on CPU, where weights are repacked after loading and have lost their loaders
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
    llm.apply_model(repack_tied_head)
    _flush(llm)


def adapter_options(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for an engine that reads its weights itself, and has adapters beside them.

    Args:
        ranks: by the layer's name.

    Raises:
        ValueError: there are no adapters, or vLLM cannot take them.
    """
    if not ranks:
        raise ValueError(
            "merge_adapters=False is for a policy with adapters; give the module lora, or leave merge_adapters out"
        )
    rank = max(ranks.values())
    taken = next((size for size in _LORA_RANKS if size >= rank), None)
    if taken is None:
        raise ValueError(f"vLLM takes adapters of rank {_LORA_RANKS[-1]} at most, got {rank}; leave merge_adapters out")
    return {
        "load_format": "auto",
        "enable_lora": True,
        "max_lora_rank": taken,
        "max_loras": 1,
        # vLLM would make room for adapters of the head, too, with which it cannot score prompts
        "lora_target_modules": sorted({name.rpartition(".")[-1] for name in ranks}),
    }


def load_adapters(llm: Any, adapters: Iterable[Adapter]) -> Any:
    """Replace the adapters of the running engine and flush its KV prefix cache.

    vLLM reads adapters from a folder alone; this one is gone when the call returns.

    Returns:
        What requests name, to be answered with them.
    """
    from vllm.lora.request import LoRARequest

    tensors, rank = dict[str, Tensor](), 1
    for layer, down, up in adapters:
        name, rank = f"base_model.model.{layer}", max(rank, len(down))
        tensors |= {f"{name}.lora_A.weight": down.contiguous().cpu(), f"{name}.lora_B.weight": up.contiguous().cpu()}
    layers = sorted({name.split(".")[-3] for name in tensors})
    with ProcessFolder("adapters") as folder:
        save_file(tensors, Path(folder) / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": layers, "bias": "none"}
        (Path(folder) / "adapter_config.json").write_text(json.dumps(config))
        if not llm.llm_engine.add_lora(LoRARequest(_ADAPTER_NAME, 1, folder, load_inplace=True)):
            raise RuntimeError(f"vLLM did not take the adapters of {', '.join(layers)}; leave merge_adapters out")
        request = LoRARequest(_ADAPTER_NAME, 1, folder)
    _flush(llm)
    return request


def _flush(llm: Any) -> None:
    if not llm.reset_prefix_cache():
        raise RuntimeError(
            "vLLM could not flush its KV prefix cache: requests of the previous weights are still running"
        )


class Job(NamedTuple):
    """What the engine is asked to do for a row."""

    token_ids: list[int]
    params: Any
    """`vllm.SamplingParams`."""
    history: RowHistory | None = None
    """Past responses, for a drafter that reads them."""
    num_scored: int = 0
    """Tokens at the end of `token_ids` whose log-probs are wanted; then what the job samples is thrown away. See `scoring_job`."""


def scoring_job(token_ids: list[int], num_scored: int, read_cache: bool = True) -> Job:
    """Have the last `num_scored` tokens scored.

    vLLM computes no log-probs where it finds the KV of a token in its prefix cache, and therefore does not look there for a request that wants
    some. Ours wants none of the prompt's, so it looks: the rows of a group compute their prompt once.
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
    """Have a response of a given length generated, to no purpose."""
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
    """The step as speculation sees it; `None` where rows were prefilled or scored, or the engine cannot speculate."""


def run(
    llm: Any,
    jobs: Mapping[int, Job],
    follow_up: Callable[[int, list[float]], Job | None] | None = None,
    speculation: Speculation | None = None,
    choose_length: Callable[[int, float], int | None] | None = None,
    adapter: Any = None,
) -> Iterator[EngineStep]:
    """Work on all rows at once and yield after every step of the engine.

    Args:
        llm: from `build_llm`.
        jobs: by row, in the order in which they start where not all fit.
        follow_up: (row, log-probs of the scored tokens) -> the job that follows a scoring job at once, or `None` where the row needs no
            more and is reported as finished.
        speculation: of an engine that can.
        choose_length: (active rows, tokens that they have generated on average) -> tokens to draft for each, or `None` to stop and drop what
            is not finished; asked before every step.
        adapter: from `load_adapters`.
    """
    engine = llm.llm_engine
    prefix = f"{time.monotonic_ns()}-"
    running: dict[str, tuple[int, Job]] = {}
    seen: dict[str, int] = {}
    catch_up_s = 0.0

    def submit(row: int, job: Job) -> None:
        name = f"{prefix}{row}-{len(seen)}"
        engine.add_request(name, {"prompt_token_ids": job.token_ids}, job.params, lora_request=adapter)
        running[name], seen[name] = (row, job), 0
        if speculation is not None and job.history is not None:
            speculation.follow(name, job.history)

    try:
        for row, job in jobs.items():
            submit(row, job)
        while running:
            num_running, age = 0, 0.0
            if speculation is not None:
                num_running = speculation.num_running
                ages = [seen[name] for name in running if seen[name]]  # others wait, or have just begun
                age = sum(ages) / max(1, len(ages))
                if choose_length is not None:
                    length = choose_length(num_running or len(running), age)
                    if length is None:
                        break
                    speculation.set_length(length)
                    num_running = speculation.num_running  # none where all are to be computed again
            started_at = time.perf_counter()
            outputs = engine.step()
            elapsed_s = time.perf_counter() - started_at
            num_tokens, finished = 0, []
            num_active = len(outputs)
            are_known = bool(outputs) and all(seen[output.request_id] for output in outputs)
            is_decoding = are_known and num_active == num_running
            for output in outputs:
                (row, job), completion = running[output.request_id], output.outputs[0]
                if not job.num_scored:
                    num_tokens += len(completion.token_ids) - seen[output.request_id]
                    seen[output.request_id] = len(completion.token_ids)
                if not output.finished:
                    continue
                del running[output.request_id]
                if not job.num_scored:
                    finished.append(_finished_row(row, completion))
                    continue
                num_unscored = len(job.token_ids) - job.num_scored
                if output.num_cached_tokens >= num_unscored:  # the cache held a part of what was to be scored
                    submit(row, scoring_job(job.token_ids, job.num_scored, read_cache=False))
                    continue
                assert follow_up is not None
                next_job = follow_up(row, _last_logprobs(job, output.prompt_logprobs))
                if next_job is None:
                    finished.append(FinishedRow(row, [], [], "stop"))
                else:
                    submit(row, next_job)
            decoding = None
            if speculation is not None:
                found = speculation.end_step(num_active, num_tokens, elapsed_s)
                if is_decoding:
                    decoding, catch_up_s = replace(found, age=age, catch_up_s=catch_up_s), 0.0
                elif are_known:
                    catch_up_s += elapsed_s
            yield EngineStep(num_tokens, finished, elapsed_s, decoding)
    finally:
        if speculation is not None:
            speculation.forget()
        if running:  # interrupted: leave an engine that can be used again
            engine.abort_request(list(running))


def _last_logprobs(job: Job, entries: Any) -> list[float]:
    last = slice(-job.num_scored, None)  # the entries before may be missing, or those of tokens that were not computed
    return [entry[token].logprob for token, entry in zip(job.token_ids[last], entries[last], strict=True)]


def _finished_row(row: int, completion: Any) -> FinishedRow:
    token_ids = list(completion.token_ids)
    logprobs = [entry[token].logprob for token, entry in zip(token_ids, completion.logprobs, strict=True)]
    return FinishedRow(row, token_ids, logprobs, completion.finish_reason)


def shutdown(llm: Any) -> None:
    """Stop the engine and give its memory back.

    When vLLM stops, or is collected, it destroys the process group. One of several ranks belongs to the trainer, which still needs
    it: there the engine is kept until the process ends.
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
