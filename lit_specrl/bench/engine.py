"""What a rollout costs beside the arithmetic of the model: the library's loop around vLLM against vLLM's own."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lit_specrl.bench.report import Ratio, Report, check_at_least_one, describe_hardware, resolve_device
from lit_specrl.engines import VLLMEngine
from lit_specrl.engines.vllm import stock
from lit_specrl.models.policy import Policy
from lit_specrl.precision import fast_dtype
from lit_specrl.types import PromptBatch, RolloutRequest, SamplingConfig

_PROMPT = 32  # tokens
_OURS = "this library"


def bench_engine(
    model: str | None = None,
    rows: int = 256,
    tokens: int = 224,
    dtype: Literal["auto", "bfloat16", "float32"] = "auto",
    repeats: int = 5,
    max_num_seqs: int | None = None,
    device: str = "auto",
) -> Report:
    """Compare rollouts of the engine with vLLM's own `LLM.generate`, and time verification and hand-over of weights.

    All ways run in one process, on one engine. They answer the same prompts, by responses of the same
    lengths, and take turns. The library always asks for
    log-probs and gives every row its seed; `LLM.generate` is measured with and without. On a CPU the library brings its
    own sampler: `LLM.generate` is measured with that and with vLLM's.

    Verification scores the same responses under new weights, as the prefix cache has it done. What it takes of the time
    to generate them bounds what reuse can save: where it takes half, a response of which all is kept costs half.

    Args:
        model: hub name or folder of the policy; without one, a random policy of one layer of width 64, whose
            arithmetic vanishes beside the loop.
        rows: responses at once.
        tokens: of each.
        dtype: of the engine; "auto" is what the device computes fast in.
        repeats: runs of each way, behind one that warms up.
        max_num_seqs: as of `VLLMEngine`.
        device: auto, cpu or cuda.
    """
    check_at_least_one(rows=rows, tokens=tokens, repeats=repeats)
    device = resolve_device(device)
    if dtype == "auto":
        dtype = fast_dtype(torch.device(device)).name
    with TemporaryDirectory() as folder:
        bench = _Bench(model or _tiny_policy(folder, _PROMPT + tokens), rows, tokens, dtype, max_num_seqs, device)
        try:
            loops = bench.time_loops(repeats)
            reuse = bench.time_verification(repeats)
            hand_over = bench.time_hand_over(repeats)
        finally:
            bench.engine.shutdown()
    notes = [
        "Ratios are those of this library over the way of the row. Processor time is that of all threads of the "
        "process. Host time leaves out what passes inside vLLM's model runner: it is scheduling, bookkeeping and "
        "outputs, for each row and step.",
    ]
    if device == "cpu":
        notes.append("Engines on a CPU do not sleep.")
    return Report(
        hardware=describe_hardware(device),
        torch_version=torch.__version__,
        settings={
            "benchmark": "engine",
            "model": model or "one layer of width 64",
            "rows": rows,
            "tokens": tokens,
            "dtype": dtype,
            "repeats": repeats,
            "device": device,
        },
        tables={"generation": loops, "reuse": [reuse], "around a rollout": [hand_over]},
        notes=notes,
    )


class _Bench:
    """An engine and what it is asked."""

    def __init__(self, model: str, rows: int, tokens: int, dtype: str, max_num_seqs: int | None, device: str) -> None:
        self.rows, self.tokens, self.device = rows, tokens, device
        self.policy = Policy.build(model).to(device)
        self.engine = VLLMEngine(dtype=dtype, max_num_seqs=max_num_seqs)
        self.engine.expected_rows = rows
        self.engine.start(self.policy, model, _PROMPT + tokens + 1, ())  # and what vLLM samples behind a verified one
        self.engine.load_policy(self.policy, 0)
        self.version = 0
        vocabulary = self.policy.model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        self.prompts = torch.randint(vocabulary, (rows, _PROMPT), generator=generator).tolist()

    def _request(self, seed: int) -> RolloutRequest:
        prompts = PromptBatch(
            uids=[str(row) for row in range(self.rows)],
            prompt_ids=self.prompts,
            prompts=[""] * self.rows,
            answers=[None] * self.rows,
            sources=[""] * self.rows,
        )
        seeds = [seed * self.rows + row for row in range(self.rows)]
        return RolloutRequest(prompts, SamplingConfig(1, self.tokens), seeds, self.version)

    def _ways(self) -> dict[str, Callable[[RolloutRequest], Any]]:
        def by_vllm(request: RolloutRequest, with_logprobs: bool, with_seeds: bool) -> Any:
            return stock.generate(self.engine.llm, self.engine.generation_jobs(request), with_logprobs, with_seeds)

        def by_vllm_alone(request: RolloutRequest) -> Any:
            with stock.stock_sampling(self.engine.llm):
                return by_vllm(request, True, True)

        ways: dict[str, Callable[[RolloutRequest], Any]] = {
            _OURS: lambda request: self.engine.generate(request).response_ids,
            "LLM.generate": lambda request: by_vllm(request, True, True),
            "LLM.generate, no seeds": lambda request: by_vllm(request, True, False),
            "LLM.generate, no seeds, no log-probs": lambda request: by_vllm(request, False, False),
        }
        return ways | ({"LLM.generate, vLLM's sampler": by_vllm_alone} if self.device == "cpu" else {})

    def time_loops(self, repeats: int) -> list[dict[str, Any]]:
        """A row for each way, medians over the repeats."""
        ways = self._ways()
        wall, processor, host = (defaultdict[str, list[float]](list) for _ in range(3))
        for repeat in range(repeats + 1):
            for name, way in ways.items():
                request = self._request(repeat)
                with stock.runner_time(self.engine.llm) as in_runner:
                    started_at, began = time.perf_counter(), time.process_time()
                    found = way(request)
                    seconds, used = time.perf_counter() - started_at, time.process_time() - began
                assert all(len(ids) == self.tokens for ids in found), "responses go on to their full length"
                if repeat:
                    wall[name].append(seconds)
                    processor[name].append(used)
                    host[name].append(used - in_runner())
        microseconds = 1e6 / (self.rows * self.tokens)
        ours = statistics.median(processor[_OURS]), statistics.median(wall[_OURS])
        return [
            {
                "way": name,
                "tokens_per_second": self.rows * self.tokens / statistics.median(wall[name]),
                "processor_us_per_token": statistics.median(processor[name]) * microseconds,
                "host_us_per_row_and_step": statistics.median(host[name]) * microseconds,
                "processor_time_ratio": Ratio(ours[0] / statistics.median(processor[name])),
                "speed_ratio": Ratio(statistics.median(wall[name]) / ours[1]),
            }
            for name in ways
        ]

    def time_verification(self, repeats: int) -> dict[str, Any]:
        """Medians of generating all responses and of verifying them whole; a new version forgets keys and values."""
        generating, verifying = list[float](), list[float]()
        for repeat in range(repeats + 1):
            self._load_next_version()
            request = self._request(repeat)
            started_at = time.perf_counter()
            responses = self.engine.generate(request).response_ids
            generated_at = time.perf_counter()
            self._load_next_version()
            request = self._request(repeat)
            request.cached_responses = dict(enumerate(responses))
            request.accept = lambda row, logprobs: len(logprobs)
            loaded_at = time.perf_counter()
            assert self.engine.generate(request).response_ids == responses
            if repeat:
                generating.append(generated_at - started_at)
                verifying.append(time.perf_counter() - loaded_at)
        seconds = {
            "generation_seconds": statistics.median(generating),
            "verification_seconds": statistics.median(verifying),
        }
        return seconds | {"share_of_generation": seconds["verification_seconds"] / seconds["generation_seconds"]}

    def _load_next_version(self) -> None:
        self.version += 1
        self.engine.load_policy(self.policy, self.version)

    def time_hand_over(self, repeats: int) -> dict[str, Any]:
        """Seconds of the hand-over of all weights, and of going to sleep and waking up where engines do."""
        weights, sleeping, waking = list[float](), list[float](), list[float]()
        for _ in range(repeats):
            for seconds, action in [(sleeping, self.engine.sleep), (waking, self.engine.wake_up)]:
                seconds.append(self._seconds(action))
            weights.append(self._seconds(self._load_next_version))
        on_gpu = self.device == "cuda"
        return {
            "weight_sync_seconds": statistics.median(weights),
            "sleep_seconds": statistics.median(sleeping) if on_gpu else None,
            "wake_up_seconds": statistics.median(waking) if on_gpu else None,
        }

    def _seconds(self, action: Callable[[], object]) -> float:
        started_at = time.perf_counter()
        action()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started_at


def _tiny_policy(folder: str, length: int) -> str:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=length + 8,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
