"""Generation by vLLM in the trainer's own process."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lit_specrl.drafting.history import RolloutTexts
from lit_specrl.drafting.scheduler.length_schedule import DecodeStep
from lit_specrl.engines.base import Continuation, ProgressMeter, RolloutEngine, RowControl
from lit_specrl.engines.vllm.composite import text_options, text_weights
from lit_specrl.engines.vllm.jobs import Job, filler_job, generation_job, jobs_of_all_ranks, scoring_job
from lit_specrl.engines.vllm.loop import run
from lit_specrl.engines.vllm.plan import rows_at_once, sleep_level
from lit_specrl.engines.vllm.speculation import Speculation
from lit_specrl.engines.vllm.startup import STARTUP_ERRORS, build_llm, startup_failure, take_over_sampling
from lit_specrl.engines.vllm.startup import shutdown as shutdown_llm
from lit_specrl.engines.vllm.version import check_options, check_version
from lit_specrl.engines.vllm.weights import adapter_options, load_adapters
from lit_specrl.engines.vllm.weights import load_weights as load_llm_weights
from lit_specrl.models.lora import adapter_ranks, named_adapters
from lit_specrl.models.policy import Policy
from lit_specrl.precision import fast_dtype, warn_if_slow
from lit_specrl.types import RolloutRequest, check_at_least_one

DTYPES = ("auto", "bfloat16", "float16", "float32")
_CPU_BATCHED_TOKENS = 4096  # prompt tokens of one engine step on a CPU
_CPU_BLOCK_SIZE = 32  # tokens; under vLLM's own 128 the rows of a group seldom find their prompt in the KV prefix cache
_SLEEP = (
    "awake while the policy trains",
    "asleep while the policy trains, weights on the host",
    "asleep while the policy trains, weights dropped",
)  # by level
_PROFILE_PROMPT = 8  # tokens
_PROFILE_STEPS = 5  # of each setting


class VLLMEngine(RolloutEngine):
    """A colocated vLLM: same process, same device, weights handed over in memory.

    Args:
        dtype: dtype of the engine's weights and cache. "auto" is "bfloat16" where the device has instructions for it,
            which is faster and takes half the memory, and "float32" elsewhere. Only "float32" gives the tokens of a
            float32 policy.
        gpu_memory_utilization: fraction of the GPU that the engine may hold; not used on a CPU.
        cpu_kv_cache_gib: size of the key-value cache on a CPU, in GiB.
        max_num_seqs: most responses decoded at once. `None` takes as many as the run asks for, up to 1024 on a GPU and
            256 on a CPU.
        max_model_len: longest prompt plus response, in tokens; `None` takes what data and sampling settings need.
        enforce_eager: run without compilation and CUDA graphs. `None` is True on a CPU and False on a GPU.
        sleep_level: what `sleep` gives back on a GPU while the policy trains. 0 = nothing; 1 = the key-value cache,
            with the weights moved to the host; 2 = both, without a copy: the policy's weights are handed over again,
            those of a drafter are kept on the host. "auto" = 0 where engine and training fit the device together, with
            15 % of it for activations, and else 2, or 1 under `merge_adapters: false`.
        tensor_parallel_size: ranks that hold one engine between them, for policies that do not fit one device. They
            generate for all of their prompts together, neither verify nor speculate, and must be neighbours (of one
            node, if it is to be fast). 1 = an engine for each rank.
        merge_adapters: add the adapters of a policy with `lora` to the weights that are handed over. False hands over
            adapters alone, and the engine reads the model that they adapt from its folder or the hub, once: less to
            hand over, and weights in bfloat16 do not round small adapters away; but each step of the engine multiplies
            with both (vLLM's LoRA).
        options: further arguments of `vllm.LLM`.
    """

    takes_sharded_weights = True

    def __init__(
        self,
        dtype: str = "auto",
        gpu_memory_utilization: float = 0.5,
        cpu_kv_cache_gib: float = 2,
        max_num_seqs: int | None = None,
        max_model_len: int | None = None,
        enforce_eager: bool | None = None,
        sleep_level: int | Literal["auto"] = "auto",
        tensor_parallel_size: int = 1,
        merge_adapters: bool = True,
        options: dict[str, Any] | None = None,
    ):
        if sleep_level not in (0, 1, 2, "auto"):
            raise ValueError(f"sleep_level must be 0, 1, 2 or auto, got {sleep_level}")
        if sleep_level == 2 and not merge_adapters:
            raise ValueError(
                "sleep_level=2 would drop the weights under the adapters, which merge_adapters=False hands over no "
                "more; use sleep_level=1"
            )
        check_at_least_one(
            tensor_parallel_size=tensor_parallel_size, max_num_seqs=max_num_seqs, max_model_len=max_model_len
        )
        if not 0 < gpu_memory_utilization <= 1:
            raise ValueError(
                "gpu_memory_utilization is a fraction of the GPU's memory and must lie in (0, 1], got "
                f"{gpu_memory_utilization}"
            )
        if not 0 < cpu_kv_cache_gib < math.inf:
            raise ValueError(f"cpu_kv_cache_gib must be a positive number of GiB, such as 0.5, got {cpu_kv_cache_gib}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if "speculative_config" in (options or {}):
            raise ValueError(
                "speculation is not an option of the engine: give SpeculativeRollout a drafter, whose drafts are "
                "verified exactly"
            )
        self.dtype, self.max_num_seqs, self.max_model_len = dtype, max_num_seqs, max_model_len
        self.gpu_memory_utilization, self.cpu_kv_cache_gib = gpu_memory_utilization, cpu_kv_cache_gib
        self.enforce_eager, self.sleep_level = enforce_eager, sleep_level
        self.tensor_parallel_size, self.merge_adapters = tensor_parallel_size, merge_adapters
        self.can_verify = self.can_speculate = tensor_parallel_size == 1
        self.generates_together = tensor_parallel_size > 1
        self.options = dict(options or {})
        self.llm: Any = None
        self._speculation: Speculation | None = None
        self._drafter_fingerprint: str | None = None
        self._adapter: Any = None  # what requests name, where adapters are not merged
        self._text_only = dict[str, Any]()  # options of vLLM for a composite policy
        self._asleep = False
        self._on_gpu = False
        self._sleep_level = 0

    def dtype_on(self, device: torch.device) -> str:
        """The dtype of weights and cache on a device."""
        return fast_dtype(device).name if self.dtype == "auto" else self.dtype

    def check_run(self, num_ranks: int, max_length: int | None, device: torch.device) -> None:
        """As in `RolloutEngine`; warns of a dtype that the device emulates.

        Raises:
            ImportError: vLLM is missing, or a version that was not tried.
            ValueError: the ranks cannot be divided among engines, the longest rollouts do not fit, or vLLM has no such
                option.
        """
        check_version()
        check_options(self.options)
        if num_ranks % self.tensor_parallel_size:
            raise ValueError(
                f"tensor_parallel_size={self.tensor_parallel_size} ranks hold one engine, which {num_ranks} ranks "
                "cannot be divided into; use a size that divides the number of devices"
            )
        if self.max_model_len is not None and max_length is not None and self.max_model_len < max_length:
            raise ValueError(
                f"max_model_len={self.max_model_len} is less than the run's prompts and responses of up to "
                f"{max_length} tokens; raise it, or leave it out"
            )
        warn_if_slow(f"VLLMEngine(dtype={self.dtype!r})", self.dtype_on(device), device)

    def memory(self, num_parameters: int, device: torch.device) -> int:
        """On a GPU its share of the memory, on a CPU weights and key-value cache."""
        if device.type == "cuda":
            return int(self.gpu_memory_utilization * torch.cuda.get_device_properties(device).total_memory)
        weights = num_parameters * getattr(torch, self.dtype_on(device)).itemsize // self.tensor_parallel_size
        return weights + self._cpu_kv_cache_bytes

    @property
    def _cpu_kv_cache_bytes(self) -> int:
        return int(self.cpu_kv_cache_gib * 2**30)

    def start(self, policy: Policy, model: str, max_length: int, stop_token_ids: Collection[int]) -> None:
        self._on_gpu = policy.device.type == "cuda"
        if not self._on_gpu and not (policy.keeps_cache_by_row and policy.model.config.model_type != "gpt_oss"):
            name = type(policy.model).__name__
            raise RuntimeError(f"vLLM 0.32 on a CPU samples from something else than {name}; use TransformersEngine")
        self.stop_token_ids = frozenset(stop_token_ids)
        positions = policy.model.config.get_text_config().max_position_embeddings
        # vLLM samples a token after scoring; where drafts might not fit behind the longest row, it drafts token 0
        room = 1 if self.drafter is None else self.drafter.num_speculative_tokens + 2
        options: dict[str, Any] = {
            "dtype": self.dtype_on(policy.device),
            "max_model_len": self.max_model_len or min(max_length + room, positions),
            "max_num_seqs": self._rows_at_once(),
            "enforce_eager": not self._on_gpu if self.enforce_eager is None else self.enforce_eager,
            "tensor_parallel_size": self.tensor_parallel_size,
        }
        if not self._on_gpu:
            # no partial prefills: vLLM 0.32 rewinds a row's generator after one, which CPU generators cannot do
            batched_tokens = max(_CPU_BATCHED_TOKENS, options["max_model_len"])
            options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": batched_tokens}
            options |= {"block_size": _CPU_BLOCK_SIZE, "kv_cache_memory_bytes": self._cpu_kv_cache_bytes}
        else:
            self._sleep_level = self._sleep_level_on(policy.device)
            options |= {
                "gpu_memory_utilization": self.gpu_memory_utilization,
                "enable_sleep_mode": self._sleep_level > 0,
                "sleep_preserve_parameter_names": ["draft.*"],
            }
        if self.drafter is not None:
            # the length of drafts follows from the step before, and is counted where vLLM verifies
            options["async_scheduling"] = False
        if not self.merge_adapters:
            options |= adapter_options(adapter_ranks(policy.model))
        self._text_only = text_options(model, self.merge_adapters)
        self._max_model_len: int = options["max_model_len"]
        if self.drafter is not None:
            self.drafter.prepare(model)
        with torch.autocast(policy.device.type, enabled=False):
            try:
                more = self._text_only | self.options
                self.llm = build_llm(model, policy.device, self.drafter, **options | more)
            except (*STARTUP_ERRORS, torch.OutOfMemoryError) as error:
                raise RuntimeError(startup_failure(model, error)) from error
            self._speculation = take_over_sampling(self.llm, self.drafter)

    def load_policy(self, policy: Policy, version: int) -> None:
        if self.merge_adapters:
            return super().load_policy(policy, version)
        self.wake_up()
        self._adapter = load_adapters(self.llm, named_adapters(policy.model))
        self.policy_version = version

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        if not self.merge_adapters:
            raise RuntimeError("with merge_adapters=False the engine takes adapters, not weights; call load_policy")
        self.wake_up()
        load_llm_weights(self.llm, text_weights(weights) if self._text_only else weights)
        self.policy_version = version

    def load_drafter_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        if self._speculation is None:
            return super().load_drafter_weights(weights, version)
        self.wake_up()
        with torch.autocast("cuda" if self._on_gpu else "cpu", enabled=False):
            self._drafter_fingerprint = self._speculation.load_weights(weights)
        self.drafter_version = version

    def drafter_is_intact(self) -> bool:
        if self._drafter_fingerprint is None or self._speculation is None:
            return True
        self.wake_up()
        with torch.autocast("cuda" if self._on_gpu else "cpu", enabled=False):
            return self._speculation.fingerprint() == self._drafter_fingerprint

    def continue_rows(self, request: RolloutRequest, rows: list[int], meter: ProgressMeter) -> list[Continuation]:
        self.wake_up()
        finished: dict[int, Continuation] = {}
        control, steps = self.speculation_control, list[DecodeStep]()
        if self._speculation is not None:
            if control is None:  # whoever decided before has left its last length
                self._speculation.set_length(self._speculation.longest)
            self._speculation.begin(_texts(request), control.row_lengths if isinstance(control, RowControl) else None)
        self._scored: dict[int, list[float]] = {}  # log-probs of cached responses, as far as they are scored
        jobs = {row: self._first_job(request, row) for row in rows}
        own = {row: row for row in rows}
        if self.generates_together:
            jobs, own = jobs_of_all_ranks(jobs)
        choose_length = None if control is None else control.length
        # the trainer's autocast would silently change the dtype of the engine's own arithmetic
        with torch.autocast("cuda" if self._on_gpu else "cpu", enabled=False):
            for step in run(
                self.llm,
                jobs,
                partial(self._after_verification, request),
                self._speculation,
                choose_length,
                self._adapter,
                request.text_end,
            ):
                if step.decoding is not None:
                    steps.append(step.decoding)
                    if control is not None:
                        control.observe(step.decoding)
                newly = {
                    own[done.row]: Continuation(done.token_ids, done.logprobs, done.finish_reason)
                    for done in step.finished
                    if done.row in own
                }
                finished |= newly
                meter.advance(step.num_tokens, len(newly), newly)
        self.decode_steps = steps
        return [finished[row] for row in rows]

    def generation_jobs(self, request: RolloutRequest) -> list[Job]:
        """What vLLM is asked for the rows of a request without cached responses."""
        return [self._generation(request, row) for row in range(request.num_rows)]

    @torch.no_grad()
    def profile(self, num_rows: int) -> list[DecodeStep]:
        """Time steps that draft nothing, one token, and as many as the drafter can, at batches up to `num_rows`.

        Look-up drafters find nothing in an artificial prompt: the same token is drafted everywhere in their place.
        """
        assert self._speculation is not None and self.drafter is not None
        self.wake_up()
        longest, room = self.drafter.num_speculative_tokens, self._max_model_len - _PROFILE_PROMPT - 1
        found = []
        with torch.autocast("cuda" if self._on_gpu else "cpu", enabled=False), self._speculation.force_token(token=0):
            for batch in _profile_batches(min(num_rows, self._rows_at_once())):
                plan = iter([length for length in sorted({0, 1, longest}) for _ in range(_PROFILE_STEPS)])
                jobs = {row: filler_job(_PROFILE_PROMPT, room, row) for row in range(batch)}
                # stops when the lengths are used up; the engine drops the requests then
                for step in run(self.llm, jobs, None, self._speculation, partial(_next, plan), self._adapter):
                    if step.decoding is not None:
                        found.append(step.decoding)
        return found

    def _first_job(self, request: RolloutRequest, row: int) -> Job:
        prompt = request.prompts.prompt_ids[request.prompt_index(row)]
        room = self._max_model_len - len(prompt) - 1  # less the token that vLLM samples after scoring
        if row not in request.cached_responses or room < 1:
            return self._generation(request, row)
        request.cached_responses[row] = request.cached_responses[row][:room]
        self._scored[row] = []
        return self._scoring(request, row)

    def _scoring(self, request: RolloutRequest, row: int) -> Job:
        """Of the next block of a cached response.

        It fills the KV prefix cache, where later blocks and the continuation find the verified tokens.
        """
        prompt = request.prompts.prompt_ids[request.prompt_index(row)]
        start = len(self._scored[row])
        block = request.cached_responses[row][start:][: request.verify_block_length]
        return scoring_job(prompt + request.cached_responses[row][:start] + block, len(block))

    def _after_verification(self, request: RolloutRequest, row: int, logprobs: list[float]) -> Job | None:
        """Score the next block, or enter the verified prefix of a row, which then goes on at once."""
        assert request.accept is not None
        cached = request.cached_responses[row]
        self._scored[row] = scored = self._scored[row] + logprobs
        length = request.accept(row, scored)
        if length == len(scored) < len(cached):
            return self._scoring(request, row)
        request.prefixes[row] = cached[:length]
        return None if self.finish_reason(request, row) else self._generation(request, row)

    def _generation(self, request: RolloutRequest, row: int) -> Job:
        sampling, prefix = request.sampling, request.prefix(row)
        return generation_job(
            request.prompts.prompt_ids[request.prompt_index(row)] + prefix,
            sampling,
            sampling.max_completion_length - len(prefix),
            self.stop_ids(request),
            request.seeds[row],
            row,
            num_begun=len(request.begun(row)),
        )

    def sleep(self) -> None:
        if self.llm is None or not self._on_gpu or not self._sleep_level or self._asleep:
            return
        self.llm.sleep(level=self._sleep_level)
        self._asleep = True
        if self._sleep_level == 2:
            self.policy_version = None  # the policy's weights are gone

    def wake_up(self) -> None:
        if self._asleep:
            torch.cuda.empty_cache()  # what training used lies in torch's reserve, which vLLM cannot use
            self.llm.wake_up()
            self._asleep = False

    def shutdown(self) -> None:
        if self.llm is not None:
            shutdown_llm(self.llm)
        self.llm = self._speculation = self._adapter = self.policy_version = self._drafter_fingerprint = None
        self.drafter_version = 0
        self._asleep = False

    def describe(self, device: torch.device) -> str:
        place = "in process" if self.tensor_parallel_size == 1 else f"over {self.tensor_parallel_size} ranks"
        adapters = "" if self.merge_adapters else ", adapters not merged"
        level = self._sleep_level_on(device) if device.type == "cuda" else 0
        sleeps = f", {_SLEEP[level]}" if device.type == "cuda" else ""
        return (
            f"{check_version()}, {self.dtype_on(device)}, {place}{adapters}, up to {self._rows_at_once(device)} rows "
            f"at once{sleeps}"
        )

    def _rows_at_once(self, device: torch.device | None = None) -> int:
        on_gpu = self._on_gpu if device is None else device.type == "cuda"
        num_rows = None if self.expected_rows is None else self.expected_rows * self.tensor_parallel_size
        return self.max_num_seqs or rows_at_once(num_rows, on_gpu)

    def _sleep_level_on(self, device: torch.device) -> int:
        """On a GPU."""
        if self.sleep_level != "auto":
            return self.sleep_level
        total = torch.cuda.get_device_properties(device).total_memory
        return sleep_level(self.memory(0, device), self.training_bytes, total, self.merge_adapters)


def _texts(request: RolloutRequest) -> RolloutTexts:
    """What a drafter may read."""
    sampling = request.sampling
    return RolloutTexts(
        request.prompts.prompt_ids, sampling.num_generations, request.past_responses, sampling.max_completion_length
    )


def _profile_batches(largest: int) -> list[int]:
    """1, 4, 16, ... and the largest."""
    powers = [4**power for power in range(8)]
    return [*(batch for batch in powers if batch < largest), largest]


def _next(plan: Iterator[int], num_active: int, age: float) -> int | None:
    return next(plan, None)
