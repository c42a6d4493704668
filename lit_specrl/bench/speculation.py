"""Whether drafting pays, in the engine itself."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
from transformers import AutoTokenizer

from lit_specrl.bench.report import Ratio, Report, check_at_least_one, describe_hardware, resolve_device
from lit_specrl.data import ArithmeticSource
from lit_specrl.drafting import Drafter, DraftModel, Eagle3Drafter, HistoryDrafter, LookUpDrafter, NGramDrafter
from lit_specrl.drafting.drafts import SOURCES
from lit_specrl.drafting.scheduler.length_schedule import DecodeStep, LengthSchedule
from lit_specrl.engines import VLLMEngine
from lit_specrl.engines.base import SpeculationControl
from lit_specrl.models.policy import Policy
from lit_specrl.precision import fast_dtype
from lit_specrl.types import PromptBatch, RolloutRequest, SamplingConfig

_BATCHES = (1, 4, 16, 32)
_GENERATIONS = 8  # rows of a prompt, where epochs are timed
_AGES = (0, 32, 64, 128, 256, 512, 1024)
_TERMS = 12  # of the sums in the prompts
_EXAMPLE = "What is 4 + 9 + 3 + 6?\n4 + 9 = 13. 13 + 3 = 16. 16 + 6 = 22. Answer: 22\n"
Ask = Callable[..., Any]
"""Has a method of `_Bench` called in another process."""
Times = dict[tuple[str, str], list[float]]
"""(what was run, how it drafted) -> seconds of each repeat."""


def bench_speculation(
    model: str,
    drafter: Literal["history", "ngram", "model", "eagle3"] = "history",
    draft_model: str | None = None,
    rows: int = 32,
    tokens: int = 128,
    num_speculative_tokens: int = 3,
    dtype: Literal["auto", "bfloat16", "float32"] = "auto",
    repeats: int = 3,
    device: str = "auto",
) -> Report:
    """Time vLLM without speculation, with each number of drafted tokens, and with the scheduler.

    Two loads: batches of equal responses, and one that drains from `rows` to a single response, as a step of
    reinforcement learning does. A drafter that looks tokens up is also timed in a first epoch, where there are no
    earlier responses, and in a later one, eight rows to a prompt, with a length for each row and with one for all. The
    prompts are sums to be written out; responses go on to a fixed length, whatever they say. The history is what each
    row said before. All ways take turns: the engine that cannot speculate is in a process of its own, and whichever
    does not run sleeps.

    Args:
        model: hub name or folder of the policy.
        drafter: who proposes tokens.
        draft_model: hub name or folder of the model for `--drafter model`, or of the head for `--drafter eagle3`.
        rows: responses that the drain begins with.
        tokens: length of the longest response.
        num_speculative_tokens: most tokens that are drafted at once.
        dtype: of the engine; "auto" is what the device computes fast in.
        repeats: runs with each setting.
        device: auto, cpu or cuda.
    """
    check_at_least_one(rows=rows, tokens=tokens // 2, num_speculative_tokens=num_speculative_tokens, repeats=repeats)
    if (drafter in ("model", "eagle3")) != (draft_model is not None):
        raise ValueError("--draft_model belongs to --drafter model and eagle3, and is needed there")
    device = resolve_device(device)
    if dtype == "auto":
        dtype = fast_dtype(torch.device(device)).name
    lengths = sorted({0, 1, num_speculative_tokens})
    times: Times = defaultdict(list)
    with _plain_engine(model, rows, tokens, dtype, device) as plain:
        bench = _Bench(model, rows, tokens, dtype, device, plain("said"))
        proposer = _drafter(drafter, draft_model, num_speculative_tokens)
        schedule, steps = bench.time_speculation(proposer, plain, lengths, repeats, times)
    ages = [age for age in _AGES if age < tokens]
    seconds = {setting: statistics.median(values) for setting, values in times.items()}
    return Report(
        hardware=describe_hardware(device),
        torch_version=torch.__version__,
        settings={
            "benchmark": "speculation",
            "model": model,
            "drafter": drafter if draft_model is None else draft_model,
            "rows": rows,
            "tokens": tokens,
            "num_speculative_tokens": num_speculative_tokens,
            "dtype": dtype,
            "repeats": repeats,
        },
        tables={
            "tokens per second in batches of equal responses": [
                bench.batch_row(batch, lengths, seconds) for batch in _BATCHES if batch <= rows
            ],
            f"a batch that drains from {rows} to 1": _drain_rows(seconds, times, lengths),
            "what the scheduler has learnt": [
                {"active_requests": batch}
                | {f"length_after_{age}_tokens": schedule.gains([batch], age).argmax().item() for age in ages}
                for batch in _BATCHES
                if batch <= rows
            ],
            "acceptance by age, in the drain with the scheduler": _by_age(steps["drain"], ages),
        }
        | _epoch_table(steps, seconds, times),
        notes=_notes(steps),
    )


def _drafter(name: str, model: str | None, length: int) -> Drafter:
    if model is not None:
        return DraftModel(model, length) if name == "model" else Eagle3Drafter(model, length)
    return NGramDrafter(length) if name == "ngram" else HistoryDrafter(length)


def _drain_rows(seconds: dict[tuple[str, str], float], times: Times, lengths: Sequence[int]) -> list[dict[str, Any]]:
    plain = seconds["drain", "plain"]
    names = ["plain", *(f"drafting {length}" for length in lengths), "adaptive, first", "adaptive"]
    names += ["adaptive, one length"] if ("drain", "adaptive, one length") in times else []
    return [
        {
            "run": name,
            "seconds_min": min(times["drain", name]),
            "seconds_median": seconds["drain", name],
            "seconds_max": max(times["drain", name]),
            "speed_over_plain": Ratio(plain / seconds["drain", name]),
        }
        for name in names
    ]


def _by_age(steps: Sequence[DecodeStep], ages: Sequence[int]) -> list[dict[str, Any]]:
    """Tokens drafted and accepted where the rows had generated so many tokens on average."""
    rows = []
    for start, end in pairwise([*ages, float("inf")]):
        inside = [step for step in steps if start <= step.age < end]
        drafted, accepted = _sums(inside)
        rate = accepted / drafted if drafted else None
        rows.append({"age_from": start, "drafted": drafted, "accepted": accepted, "acceptance": rate})
    return rows


def _epoch_table(
    steps: dict[str, list[DecodeStep]], seconds: dict[tuple[str, str], float], times: Times
) -> dict[str, list[dict[str, Any]]]:
    """A first and a later epoch, for drafters that look tokens up."""
    rows = []
    for epoch, way in (key for key in times if key[0].endswith("epoch")):
        found = steps.get(f"{epoch}, {way}", [])
        row_steps, num_tokens = sum(step.num_active for step in found), sum(step.num_tokens for step in found)
        gain = seconds[epoch, "drafting 0"] / seconds[epoch, way]
        row = {"epoch": epoch, "way": way, "seconds_median": seconds[epoch, way], "speed_over_drafting_0": Ratio(gain)}
        row |= {"tokens_a_row_and_step": num_tokens / row_steps, "steps": len(found)}
        rows.append(row | {f"accepted_{name}": counts[1] for name, counts in _by_source(found).items()})
    return {"epochs": rows} if rows else {}


def _by_source(steps: Sequence[DecodeStep]) -> dict[str, tuple[int, int]]:
    """Tokens drafted and accepted, by where they were read."""
    return {
        source: (
            sum(step.by_source.get(source, (0, 0))[0] for step in steps),
            sum(step.by_source.get(source, (0, 0))[1] for step in steps),
        )
        for source in SOURCES
    }


def _sums(steps: Sequence[DecodeStep]) -> tuple[int, int]:
    """Tokens drafted, and accepted."""
    return sum(sum(step.drafted) for step in steps), sum(sum(step.accepted) for step in steps)


def _notes(steps: dict[str, list[DecodeStep]]) -> list[str]:
    drafted, accepted = _sums(steps["drain"])
    notes = [f"Accepted in the drain with the scheduler: {accepted:,} of {drafted:,} drafted tokens."]
    sources = [f"{name} {hits:,} of {tried:,}" for name, (tried, hits) in _by_source(steps["drain"]).items() if tried]
    return notes + ([f"By where they were read: {', '.join(sources)}."] if sources else [])


class _Fixed:
    """Always the same number of tokens."""

    def __init__(self, length: int) -> None:
        self._length = length

    def length(self, num_active: int, age: float) -> int:
        return self._length

    def observe(self, step: DecodeStep) -> None:
        """Nothing to learn."""


class _Bench:
    """The policy, its prompts and what it said."""

    def __init__(
        self, model: str, rows: int, tokens: int, dtype: str, device: str, said: list[list[int]] | None = None
    ) -> None:
        self.model, self.rows, self.tokens, self.dtype = model, rows, tokens, dtype
        self.policy = Policy.build(model).to(device)
        tokenizer = AutoTokenizer.from_pretrained(model)
        source = ArithmeticSource(num_prompts=rows, num_terms=_TERMS)
        self.prompts = [tokenizer(f"{_EXAMPLE}{entry['question']}\n")["input_ids"] for entry in source.load()]
        self.texts = said or []
        self._past: dict[int, list[int]] = {}  # of an earlier epoch, by row

    def engine(self, drafter: Drafter | None) -> VLLMEngine:
        engine = VLLMEngine(dtype=self.dtype, max_num_seqs=self.rows)
        engine.drafter = drafter
        longest = max(map(len, self.prompts)) + self.tokens
        engine.start(self.policy, self.model, longest, ())
        engine.load_policy(self.policy, 0)
        if not self.texts:
            self.texts = self._run(engine, self.rows, self.tokens).response_ids
        return engine

    def _request(self, rows: int, tokens: int, prefixes: list[list[int]], seed: int) -> RolloutRequest:
        batch = PromptBatch(
            uids=[str(row) for row in range(rows)],
            prompt_ids=self.prompts[:rows],
            prompts=[""] * rows,
            answers=[None] * rows,
            sources=[""] * rows,
        )
        seeds = [seed * self.rows + row for row in range(rows)]
        request = RolloutRequest(batch, SamplingConfig(1, tokens), seeds, 0, prefixes)
        request.past_responses = dict(enumerate(self.texts[:rows]))
        return request

    def _run(self, engine: VLLMEngine, rows: int, tokens: int, seed: int = 0) -> Any:
        return engine.generate(self._request(rows, tokens, [], seed))

    def drain(self, engine: VLLMEngine, seed: int) -> float:
        """Seconds. Row i begins with so much of what it said before that i parts of it are to come."""
        prefixes = [text[: self.tokens - (row + 1) * self.tokens // self.rows] for row, text in enumerate(self.texts)]
        return engine.generate(self._request(self.rows, self.tokens, prefixes, seed)).elapsed_s

    def epoch(self, engine: VLLMEngine, seed: int, has_past: bool) -> float:
        """Seconds of a step of reinforcement learning, with responses of another seed to look in or without."""
        size = min(_GENERATIONS, self.rows)
        request = self._request(self.rows // size, self.tokens, [], seed)
        request.sampling = SamplingConfig(size, self.tokens)
        request.seeds = [seed * self.rows + row for row in range(request.num_rows)]
        if has_past and not self._past:
            self._past = dict(
                enumerate(
                    engine.generate(replace(request, seeds=[10_000 + seed for seed in request.seeds])).response_ids
                )
            )
        request.past_responses = self._past if has_past else {}
        return engine.generate(request).elapsed_s

    def batch(self, engine: VLLMEngine, size: int, seed: int) -> float:
        """Seconds of a batch of equal responses."""
        return float(self._run(engine, size, self.tokens // 2, seed).elapsed_s)

    def time_speculation(
        self, drafter: Drafter, plain: Ask, lengths: Sequence[int], repeats: int, times: Times
    ) -> tuple[LengthSchedule, dict[str, list[DecodeStep]]]:
        """Returns the schedule, and the steps of the drains under it and of each way of an epoch."""
        engine = self.engine(drafter)
        self.drain(engine, 1)
        looks_up = isinstance(drafter, LookUpDrafter)
        schedule, one_length = (
            LengthSchedule(drafter.num_speculative_tokens, per_row=per_row) for per_row in (looks_up, False)
        )
        profile = engine.profile(self.rows)
        schedule.profile(profile)
        one_length.profile(profile)
        controls: dict[str, SpeculationControl] = {f"drafting {length}": _Fixed(length) for length in lengths}
        adaptive = {"adaptive": schedule} | ({"adaptive, one length": one_length} if looks_up else {})
        steps: dict[str, list[DecodeStep]] = defaultdict(list)
        engine.speculation_control = schedule
        times["drain", "adaptive, first"].append(self.drain(engine, 1))
        for repeat in range(repeats):
            times["drain", "plain"].append(plain("drain", 2 + repeat))
            for name, control in (controls | adaptive).items():
                engine.speculation_control = control
                times["drain", name].append(self.drain(engine, 2 + repeat))
                steps["drain"] += engine.decode_steps if name == "adaptive" else []
            if looks_up:
                for name, control in ({"drafting 0": _Fixed(0)} | adaptive).items():
                    engine.speculation_control = control
                    for epoch in ("first epoch", "later epoch"):
                        times[epoch, name].append(self.epoch(engine, 2 + repeat, epoch == "later epoch"))
                        steps[f"{epoch}, {name}"] = list(engine.decode_steps)
            for size in (batch for batch in _BATCHES if batch <= self.rows):
                times[f"batch {size}", "plain"].append(plain("batch", size, repeat))
                for name, control in controls.items():
                    engine.speculation_control = control
                    times[f"batch {size}", name].append(self.batch(engine, size, repeat))
        engine.shutdown()
        return schedule, steps

    def batch_row(self, batch: int, lengths: Sequence[int], seconds: dict[tuple[str, str], float]) -> dict[str, Any]:
        """Tokens per second of each way, and how off off is."""
        tokens = batch * (self.tokens // 2)
        names = ["plain", *(f"drafting {length}" for length in lengths)]
        row: dict[str, Any] = {"active_requests": batch}
        row |= {name.replace(" ", "_"): tokens / seconds[f"batch {batch}", name] for name in names}
        return row | {"off_over_plain": Ratio(row["drafting_0"] / row["plain"])}


@contextmanager
def _plain_engine(*arguments: Any) -> Iterator[Ask]:
    """An engine that cannot speculate, in a process of its own: vLLM keeps state that two engines of a process would
    share."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, arguments), daemon=True)
    process.start()
    theirs.close()

    def ask(*question: Any) -> Any:
        try:
            ours.send(question)
            return ours.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError("the engine without a drafter has failed; its process has told why, above") from error

    try:
        yield ask
    finally:
        ours.close()
        process.join()


def _answer(questions: Connection, arguments: tuple[Any, ...]) -> None:
    bench = _Bench(*arguments)
    engine = bench.engine(None)
    bench.drain(engine, 1)
    while True:
        try:
            name, *rest = questions.recv()
        except EOFError:  # no more are asked
            break
        questions.send(bench.texts if name == "said" else getattr(bench, name)(engine, *rest))
    engine.shutdown()
