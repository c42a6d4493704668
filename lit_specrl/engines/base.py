"""What the module and its callbacks ask of an engine."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_specrl.drafting.drafters import Drafter
from lit_specrl.drafting.scheduler.length_schedule import DecodeStep
from lit_specrl.models.policy import Policy
from lit_specrl.types import Continuation as Continuation
from lit_specrl.types import FinishReason, RolloutProgress, RolloutRequest, Rollouts

ProgressListener = Callable[[RolloutProgress], None]


class SpeculationControl(Protocol):
    """Decides how many tokens are drafted."""

    def length(self, num_active: int, age: float) -> int:
        """Tokens to draft for each active row; asked before every step.

        Args:
            num_active: rows in this step.
            age: tokens that they have generated, on average.
        """

    def observe(self, step: DecodeStep) -> None:
        """Receives every step that has only decoded."""


@runtime_checkable
class RowControl(Protocol):
    """Decides it for each row, too; a `SpeculationControl` may."""

    def row_lengths(self, chances: NDArray[np.float64], remaining: NDArray[np.float64]) -> NDArray[Any] | None:
        """Tokens to draft for each row of the next step, or `None` for as many as `length` has said.

        Asked under drafters that look tokens up.

        Args:
            chances: [N, K] that the k first tokens of each draft are accepted; 0 where there is none.
            remaining: [N] steps that each row will probably still need; NaN where nothing is known.
        """


class RolloutEngine(ABC):
    """Generates responses with the weights it was last given.

    The order of calls is `check_run`, `start`, then `load_policy` before the first `generate` and after every change of
    the policy, `sleep` and `wake_up` in between where memory is tight, `shutdown` at the end. An engine of one's own
    needs `start`, `load_weights` and `continue_rows`; the attributes say what else it can do.
    """

    policy_version: int | None = None
    """Version of the weights that generate; `None` before the first `load_weights`."""
    can_verify: bool = False
    """Whether `generate` verifies the cached responses of a request."""
    can_speculate: bool = False
    """Whether it takes a drafter."""
    takes_sharded_weights: bool = False
    """Whether it can generate for a policy that FSDP2 has sharded, with whole weights from `load_weights`."""
    generates_together: bool = False
    """Whether several ranks hold one engine, so that all of them must call `generate` when one does."""
    drafter: Drafter | None = None
    """Proposes tokens; set before `start`."""
    drafter_version: int = 0
    """Version of the drafter's weights; 0 for those that it was started with."""
    speculation_control: SpeculationControl | None = None
    """Decides how many tokens are drafted, and watches; `None` for as many as the drafter drafts at most."""
    decode_steps: Sequence[DecodeStep] = ()
    """Steps of the latest `generate` that have only decoded, from engines with a drafter."""
    stop_token_ids: frozenset[int] = frozenset()
    """Token ids that end a response; set by `start`."""
    expected_rows: int | None = None
    """Rows of the run's largest request on this rank, if known; set before `start`."""
    training_bytes: int | None = None
    """What training keeps on the engine's device, activations not counted, if known; set before `start`."""

    def check_run(self, num_ranks: int, max_length: int | None, device: torch.device) -> None:
        """Refuse a run that the engine does not fit, before anything is loaded.

        Args:
            num_ranks: of the run.
            max_length: longest prompt plus response, in tokens, if it is known.
            device: that generates.

        Raises:
            ImportError: a package is missing, or a version that was not tried.
            ValueError: the settings of the engine do not fit the run.
        """

    def memory(self, num_parameters: int, device: torch.device) -> int:
        """Bytes that the engine will hold on a device while it generates, beyond the policy, as far as that is known.

        Args:
            num_parameters: of the policy.
            device: that generates.
        """
        return 0

    @abstractmethod
    def start(self, policy: Policy, model: str, max_length: int, stop_token_ids: Collection[int]) -> None:
        """Make ready to generate.

        Args:
            policy: the policy in training.
            model: hub name or folder that the policy was built from (architecture and tokenizer).
            max_length: longest prompt plus response, in tokens.
            stop_token_ids: token ids that end a response.
        """

    @abstractmethod
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over the policy's weights and forget what was cached under the old ones.

        Args:
            weights: (transformers name, whole tensor) pairs, consumed one at a time.
            version: policy version that the weights belong to.
        """

    def load_policy(self, policy: Policy, version: int) -> None:
        """`load_weights` with those of a policy; several ranks that hold it in shards must call together."""
        self.load_weights(policy.named_weights(), version)

    @torch.no_grad()
    def generate(self, request: RolloutRequest, on_progress: ProgressListener | None = None) -> Rollouts:
        """Sample one response for every row of the request, in the order of the rows.

        A row goes on from its prefix. A row whose prefix ends in a stop token or completes a stop string, or is as long
        as a response may be, is complete and costs nothing. Cached responses of the request are verified first, where
        the engine can, and what is kept of them becomes the prefix. Prefixes and cached responses that hold the end of
        a response before their last token, as those of a run with other stop tokens may, end there.

        Raises:
            RuntimeError: the engine holds other weights than the request asks for.
            ValueError: a prefix longer than a response may be, cached responses for an engine that cannot verify,
                stop strings without `RolloutRequest.text_end`, or from `continue_rows` something other than it should
                return.
        """
        self._check_version(request)
        if request.sampling.stop and request.text_end is None:
            raise ValueError(
                f"stop={request.sampling.stop!r} needs text_end=StopStrings(tokenizer, stop) in the request"
            )
        if request.cached_responses and not self.can_verify:
            raise ValueError(
                f"{type(self).__name__} cannot verify cached responses; verify with the policy, or use VLLMEngine"
            )
        if request.cached_responses and not request.prefixes:
            request.prefixes = [[] for _ in range(request.num_rows)]
        self._end_what_is_known(request)
        self.decode_steps = ()  # also where all rows are complete and none is generated
        rows = [row for row in range(request.num_rows) if self.finish_reason(request, row) is None]
        taken = {} if request.journal is None else request.journal.find(request, rows)
        rows = [row for row in rows if row not in taken]
        if request.expected_lengths:
            rows.sort(key=lambda row: -request.expected_lengths[row])
        meter = ProgressMeter(request.num_rows, on_progress)
        meter.advance(0, request.num_rows - len(rows))
        if request.journal is not None:
            meter.keep = partial(request.journal.keep, request)
        asks = rows or self.generates_together
        found = self.continue_rows(request, rows, meter) if asks else []
        self._check_found(request, rows, found)
        continued = taken | dict(zip(rows, found, strict=True))
        if request.sampling.stop or request.sampling.stop_token_ids:
            continued = {row: self._ended(request, row, found) for row, found in continued.items()}
        responses = [continued.get(row, Continuation()) for row in range(request.num_rows)]
        complete = [self.finish_reason(request, row) for row in range(request.num_rows)]  # after verification
        return Rollouts(
            request=request,
            response_ids=[request.prefix(row) + response.token_ids for row, response in enumerate(responses)],
            sampling_logprobs=[
                [torch.nan] * len(request.prefix(row)) + response.logprobs for row, response in enumerate(responses)
            ],
            finish_reasons=[
                reason or response.finish_reason for reason, response in zip(complete, responses, strict=True)
            ],
            policy_version=request.policy_version,
            elapsed_s=meter.elapsed_s,
        )

    @abstractmethod
    def continue_rows(self, request: RolloutRequest, rows: list[int], meter: ProgressMeter) -> list[Continuation]:
        """Sample the rest of the given rows; prompts and prefixes are those of the request.

        A row ends with a token of `stop_ids`. Nothing is lost but time where it does not end with a stop string, or a
        token of `sampling.stop_token_ids`: `generate` cuts it there.

        Args:
            request: what is generated.
            rows: rows that are not complete.
            meter: counts every token and finished row, and hands finished rows to a journal.
        """

    def stop_ids(self, request: RolloutRequest) -> frozenset[int]:
        """Token ids that end a response to this request."""
        return self.stop_token_ids.union(request.sampling.stop_token_ids or ())

    def end(self, request: RolloutRequest, token_ids: Sequence[int], start: int = 0) -> int | None:
        """Tokens of a response up to and including the first, from `start` on, that ends it; `None` where none does."""
        stop_ids = self.stop_ids(request)
        ends = None
        if not stop_ids.isdisjoint(token_ids[start:]):
            ends = next(place for place, token in enumerate(token_ids[start:], start + 1) if token in stop_ids)
        text_ends = None if request.text_end is None else request.text_end(token_ids[:ends], start)
        return ends if text_ends is None else text_ends

    def _check_found(self, request: RolloutRequest, rows: list[int], found: Sequence[Continuation]) -> None:
        """Refuse what an engine of one's own may get wrong, before it becomes an error far from here."""
        name = type(self).__name__
        if len(found) != len(rows):
            raise ValueError(
                f"{name}.continue_rows must return a Continuation for each of {len(rows)} rows, got {len(found)}"
            )
        limit = request.sampling.max_completion_length
        for row, continuation in zip(rows, found, strict=True):
            num_tokens, num_logprobs = len(continuation.token_ids), len(continuation.logprobs)
            if num_tokens != num_logprobs:
                raise ValueError(f"{name} gave {num_tokens} tokens and {num_logprobs} log-probs for row {row}")
            if (num_before := len(request.prefix(row))) + num_tokens > limit:
                raise ValueError(
                    f"{name} gave {num_tokens} tokens for row {row} behind {num_before}, a response has at most "
                    f"max_completion_length={limit}"
                )
            if continuation.finish_reason not in ("stop", "length"):
                raise ValueError(
                    f"{name} gave finish_reason={continuation.finish_reason!r} for row {row}; use 'stop' or 'length'"
                )

    def _end_what_is_known(self, request: RolloutRequest) -> None:
        """Cut prefixes and cached responses behind the first end that they hold; earlier turns have theirs."""
        if request.ended is not None:
            return
        request.prefixes = [prefix[: self.end(request, prefix)] for prefix in request.prefixes]
        for row, response in request.cached_responses.items():
            request.cached_responses[row] = response[: self.end(request, response)]

    def _ended(self, request: RolloutRequest, row: int, found: Continuation) -> Continuation:
        """What an engine has added to a row, up to the end of the response; engines need not look for it."""
        begun = request.begun(row)
        ends = self.end(request, [*begun, *found.token_ids], len(begun))
        if ends is None:
            return found
        count = ends - len(begun)
        return Continuation(found.token_ids[:count], found.logprobs[:count], "stop")

    def load_drafter_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the weights of the drafter while the engine stands ready.

        Args:
            weights: (name in the drafter's folder, tensor) pairs; weights that are not named stay.
            version: of these weights.

        Raises:
            RuntimeError: the engine has no drafter with weights, or did not take them.
        """
        raise RuntimeError(f"{type(self).__name__} has no drafter whose weights could be replaced")

    def drafter_is_intact(self) -> bool:
        """Whether the drafter still computes the same as when its weights were last loaded."""
        return True

    def profile(self, num_rows: int) -> list[DecodeStep]:
        """Time a few steps with and without drafts at batches of up to `num_rows`; none without a drafter."""
        return []

    def finish_reason(self, request: RolloutRequest, row: int) -> FinishReason | None:
        """Why the prefix of a row is already a whole response, or `None` where it is not."""
        if request.ended is not None:
            return request.ended.get(row)
        prefix, limit = request.prefix(row), request.sampling.max_completion_length
        if len(prefix) > limit:
            raise ValueError(
                f"the prefix of row {row} has {len(prefix)} tokens, a response at most {limit}; cut it before "
                "generating"
            )
        if prefix and self.end(request, prefix, len(prefix) - 1) is not None:
            return "stop"
        return "length" if len(prefix) == limit else None

    def sleep(self) -> None:
        """Give memory back while the policy trains; nothing to do for engines that hold none."""

    def wake_up(self) -> None:
        """Undo `sleep`."""

    def shutdown(self) -> None:
        """Free everything; the engine can be started again."""

    def describe(self, device: torch.device) -> str:
        """Name, version and settings in one line, for the start of a run on a device."""
        return type(self).__name__

    def _check_version(self, request: RolloutRequest) -> None:
        if self.policy_version != request.policy_version:
            raise RuntimeError(
                f"{type(self).__name__} holds weights of policy version {self.policy_version}, the request asks for "
                f"version {request.policy_version}; call load_policy after every change of the policy"
            )


class ProgressMeter:
    """Counts finished rows and generated tokens, and reports them at most every `interval_s` seconds."""

    def __init__(self, num_rows: int, listener: ProgressListener | None, interval_s: float = 0.5):
        self.num_rows, self.listener, self.interval_s = num_rows, listener, interval_s
        self.rows_done = self.num_tokens = 0
        self.started_at = self.reported_at = time.perf_counter()
        self.keep: Callable[[Mapping[int, Continuation]], None] | None = None
        """Receives the rows that have finished, where somebody keeps them."""

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.started_at

    def advance(self, tokens: int, rows: int, finished: Mapping[int, Continuation] | None = None) -> None:
        """Add to the counts.

        Args:
            tokens: generated since the last call.
            rows: finished since then.
            finished: these rows, if the engine has them; asked for where `keep` is set.
        """
        if finished and self.keep is not None:
            self.keep(finished)
        self.num_tokens += tokens
        self.rows_done += rows
        now = time.perf_counter()
        if self.listener and (now - self.reported_at >= self.interval_s or self.rows_done == self.num_rows):
            self.reported_at = now
            self.listener(RolloutProgress(self.rows_done, self.num_rows, self.num_tokens, self.elapsed_s))
