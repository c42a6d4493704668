"""Training passes with the prompt of a group computed once, against once per response."""

from __future__ import annotations

import re
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import Tensor

from lit_specrl.allocator import keep_freed_memory
from lit_specrl.bench.report import Ratio, Report, check_at_least_one, describe_hardware, resolve_device, spread
from lit_specrl.experience import Experience
from lit_specrl.masking import masked_sum, pad_left, pad_right
from lit_specrl.models.micro_batches import MicroBatch, plan_micro_batches
from lit_specrl.models.policy import Policy
from lit_specrl.precision import auto_precision

_RESPONSE_SPREAD = 0.3  # responses are this fraction shorter or longer than asked for, uniformly


def bench_shared_prompts(
    model: str,
    lengths: str = "59/27,200/200,100/1000",
    prompts: int = 8,
    num_generations: int = 8,
    budgets: str = "2048,4096,8192",
    precision: Literal["auto", "bf16-mixed", "32-true"] = "auto",
    repeats: int = 3,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> Report:
    """Time forward and backward of one training step, with and without shared prompts.

    A shared prompt is computed once for all its responses.

    The rows have random tokens; response lengths lie within 30 % of the given one, so that there is padding. Rows are
    cut into micro-batches as in training, which shares prompts only where that saves a tenth of the tokens:
    `shared_rows` tells for how many rows it did. Every budget is tried both ways once untimed, then in turn; the two
    ways are compared at the budget that suits each best. The optimizer's step is not part of it. On a CPU freed memory
    is kept, as in training.

    The log-prob difference is the largest over all tokens and budgets, divided by the mean size of a log-prob. In bf16
    it is the rounding of bf16, which single random tokens feel strongly; 32-true shows that the two ways compute the
    same.

    Args:
        model: hub name or local folder, in the transformers format.
        lengths: prompt and mean response length in tokens, as PROMPT/RESPONSE, separated by commas.
        prompts: prompts of the step.
        num_generations: rows for each prompt.
        budgets: tokens of a micro-batch, padding included, separated by commas.
        precision: as for the trainer; "auto" is what the device computes fast in.
        repeats: timed passes for each budget and way.
        device: where to compute; "auto" takes a GPU if there is one.
    """
    check_at_least_one(prompts=prompts, num_generations=num_generations, repeats=repeats)
    length_pairs, token_budgets = _parse_lengths(lengths), _parse_budgets(budgets)
    device = resolve_device(device)  # type: ignore[assignment]
    if device == "cpu":
        keep_freed_memory()
    policy = Policy.build(model).to(device)
    _check_positions(policy, length_pairs)
    if precision == "auto":
        precision = auto_precision(device)
    plugin = MixedPrecision(precision, device) if precision == "bf16-mixed" else Precision()
    measured, compared = [], []
    for prompt_length, response_length in length_pairs:
        vocab_size = policy.model.config.get_text_config().vocab_size
        step = random_step(prompts, num_generations, prompt_length, response_length, vocab_size).to(device)
        label = f"{prompt_length}/{response_length}"
        candidates = [_Candidate.plan(step, budget, share) for budget in token_budgets for share in (False, True)]
        difference = _measure(policy, step, candidates, plugin, repeats, label)
        measured += [{"lengths": label, **candidate.as_row()} for candidate in candidates]
        without, shared = (_best(candidates, share) for share in (False, True))
        compared.append(
            {
                "lengths": label,
                "budget_without": without.budget,
                "budget_with": shared.budget,
                "time_without_over_with": Ratio(without.median_s / shared.median_s),
                "relative_logprob_difference": difference,
            }
        )
    return Report(
        hardware=describe_hardware(device),
        torch_version=torch.__version__,
        settings={
            "benchmark": "shared-prompts",
            "model": model,
            "lengths": lengths,
            "prompts": prompts,
            "num_generations": num_generations,
            "budgets": budgets,
            "precision": precision,
            "repeats": repeats,
            "device": device,
        },
        tables={"measured": measured, "compared": compared},
    )


@dataclass
class _Candidate:
    """One way of cutting the step into micro-batches, with its times."""

    budget: int
    share: bool
    micro_batches: list[MicroBatch]
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def plan(cls, step: Experience, budget: int, share: bool) -> _Candidate:
        lengths = step.prompt_lengths.tolist(), step.response_lengths.tolist()
        return cls(budget, share, plan_micro_batches(step.prompt_index.tolist(), *lengths, budget, share))

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    def as_row(self) -> dict[str, Any]:
        return {
            "prompts": "shared" if self.share else "apart",
            "budget": self.budget,
            "shared_rows": sum(len(batch.rows) for batch in self.micro_batches if batch.share_prompts),
            "computed_tokens": sum(batch.num_tokens for batch in self.micro_batches),
            **spread(self.seconds),
        }


def _best(candidates: list[_Candidate], share: bool) -> _Candidate:
    return min((c for c in candidates if c.share == share), key=lambda candidate: candidate.median_s)


def _measure(
    policy: Policy, step: Experience, candidates: list[_Candidate], precision: Precision, repeats: int, label: str
) -> float:
    """Fill in the seconds of the candidates; returns the largest relative difference of their log-probs."""
    logprobs = []
    for repeat in range(repeats + 1):
        for candidate in candidates:
            started_at = time.perf_counter()
            result = training_pass(policy, step, candidate.micro_batches, precision)
            elapsed_s = time.perf_counter() - started_at
            if repeat == 0:
                logprobs.append(result)
            else:
                candidate.seconds.append(elapsed_s)
            way = "shared" if candidate.share else "apart"
            progress = f"repeat {repeat} of {repeats}" if repeat else "warm-up"
            print(f"{label}, {way}, budget {candidate.budget}, {progress}: {elapsed_s:.2f} s", file=sys.stderr)
    mean_size = masked_sum(logprobs[0].abs(), step.response_mask) / step.response_mask.sum()
    return float(max((other - logprobs[0]).abs().max() for other in logprobs) / mean_size)


def training_pass(policy: Policy, step: Experience, micro_batches: list[MicroBatch], precision: Precision) -> Tensor:
    """Log-probs [N, R] of the step, whose policy gradient is left in the parameters."""
    policy.zero_grad()
    logprobs = torch.zeros_like(step.sampling_logprobs)
    num_tokens = step.loss_mask.sum()
    parts = step.split([micro_batch.rows for micro_batch in micro_batches])
    for micro_batch, (rows, part) in zip(micro_batches, parts, strict=True):
        with precision.forward_context():
            out = policy(*part.inputs, share_prompts=micro_batch.share_prompts, layout=part.layout)
            loss = -masked_sum(out.logprobs * part.advantages, part.loss_mask) / num_tokens
            loss.backward()
        logprobs[rows, : part.response_ids.shape[1]] = out.logprobs.detach()
    if step.response_ids.is_cuda:
        torch.cuda.synchronize()
    return logprobs


def random_step(
    num_prompts: int, num_generations: int, prompt_length: int, response_length: int, vocab_size: int
) -> Experience:
    """The same random rows for the same sizes: B prompts of equal length, N = B * G responses of varied length, normal
    advantages."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(vocab_size, (count,), generator=generator).tolist()

    num_rows = num_prompts * num_generations
    shortest, longest = _response_bounds(response_length)
    response_lengths = torch.randint(shortest, longest + 1, (num_rows,), generator=generator).tolist()
    prompt_ids, prompt_mask = pad_left([tokens(prompt_length) for _ in range(num_prompts)])  # [B, P]
    response_ids, response_mask = pad_right([tokens(length) for length in response_lengths])  # [N, R]
    advantages = torch.randn(num_rows, 1, generator=generator)  # [N, 1]
    return Experience(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        prompt_index=torch.arange(num_prompts).repeat_interleave(num_generations),
        response_ids=response_ids,
        response_mask=response_mask,
        loss_mask=response_mask,
        advantages=advantages.expand(response_mask.shape).contiguous(),
        sampling_logprobs=torch.zeros(response_mask.shape),
        rewards=torch.zeros(num_rows),
        policy_version=0,
    )


def _response_bounds(mean_length: int) -> tuple[int, int]:
    """Shortest and longest response, in tokens."""
    distance = int(_RESPONSE_SPREAD * mean_length)
    return mean_length - distance, mean_length + distance


def _check_positions(policy: Policy, length_pairs: list[tuple[int, int]]) -> None:
    positions = policy.model.config.get_text_config().max_position_embeddings
    for prompt_length, response_length in length_pairs:
        longest = prompt_length + _response_bounds(response_length)[1]
        if longest > positions:
            raise ValueError(
                f"--lengths {prompt_length}/{response_length}: rows of up to {longest} tokens do not fit the "
                f"{positions} positions of the model"
            )


def _parse_lengths(lengths: str) -> list[tuple[int, int]]:
    pairs = [re.fullmatch(r"\s*([1-9]\d*)/([1-9]\d*)\s*", pair) for pair in lengths.split(",")]
    if not all(pairs):
        raise ValueError(
            f"--lengths must be PROMPT/RESPONSE pairs of token counts such as 59/27,200/200, got {lengths!r}"
        )
    return [(int(pair[1]), int(pair[2])) for pair in pairs if pair]


def _parse_budgets(budgets: str) -> list[int]:
    if not re.fullmatch(r"\s*[1-9]\d*\s*(,\s*[1-9]\d*\s*)*", budgets):
        raise ValueError(f"--budgets must be token counts such as 2048,4096, got {budgets!r}")
    return [int(budget) for budget in budgets.split(",")]
