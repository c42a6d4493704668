"""What the prefix cache itself costs."""

from __future__ import annotations

import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from lit_specrl.bench.report import Report, check_at_least_one, describe_hardware, spread
from lit_specrl.prefix_cache.store import CachedRollout, RolloutStore

_GROUP = 8


def bench_prefix_cache(rows: int = 8192, tokens: int = 1000, repeats: int = 5) -> Report:
    """Time and memory of the cache of a step's responses.

    The cache stores them, looks them up, writes its file and reads it.

    The default is the size of SPEC-RL's runs (Liu et al. 2025, arXiv 2509.23232): 1024 prompts of 8 responses, about
    1000 tokens each.

    Args:
        rows: responses of a step.
        tokens: length of each.
        repeats: measurements; minimum, median and maximum are told.
    """
    check_at_least_one(rows=rows, tokens=tokens, repeats=repeats)
    tracemalloc.start()
    filled = RolloutStore()
    filled.put(_responses(rows, tokens, step=0))
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    store = RolloutStore()
    store.put(_responses(rows, tokens, step=0))
    responses = list(_responses(rows, tokens, step=1))
    keys = [(response.uid, response.sample) for response in responses]
    with tempfile.TemporaryDirectory() as folder:
        file, identity = Path(folder) / "cache.safetensors", {"model": "none"}
        measured = {
            "store": _seconds(lambda: store.put(responses), repeats),
            "look up": _seconds(lambda: [store.get(uid, sample) for uid, sample in keys], repeats),
            "write file": _seconds(lambda: store.save(file, identity), repeats),
            "read file": _seconds(lambda: RolloutStore.load(file, identity), repeats),
        }
        file_size = file.stat().st_size
    return Report(
        hardware=describe_hardware("cpu"),
        torch_version=torch.__version__,
        settings={"benchmark": "prefix-cache", "rows": rows, "tokens": tokens, "repeats": repeats},
        tables={
            "time": [{"operation": name, **spread(seconds)} for name, seconds in measured.items()],
            "memory": [{"in_memory_MB": held / 1e6, "counted_MB": store.num_bytes / 1e6, "file_MB": file_size / 1e6}],
        },
    )


def _responses(rows: int, tokens: int, step: int) -> Iterator[CachedRollout]:
    """As the callback hands them over: views of padded arrays."""
    logprobs = -np.random.default_rng(step).random((_GROUP, tokens), np.float32)  # [G, R]
    for row in range(rows):
        uid, sample = divmod(row, _GROUP)
        yield CachedRollout(
            uid=f"{uid:016x}",
            sample=sample,
            token_ids=np.arange(tokens),
            previous_logprobs=logprobs[sample],
            generation_logprobs=logprobs[sample],
            finish_reason="stop",
            policy_version=step,
            step=step,
            reward=1.0,
            reward_values={"math": 1.0},
        )


def _seconds(operation: Callable[[], object], repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        started_at = time.perf_counter()
        operation()
        seconds.append(time.perf_counter() - started_at)
    return seconds
