"""What the module asks of an engine."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable

from torch import Tensor

from lit_specrl.policy import Policy
from lit_specrl.types import RolloutProgress, RolloutRequest, Rollouts

ProgressListener = Callable[[RolloutProgress], None]


class RolloutEngine(ABC):
    """Generates responses with the weights it was last given.

    The order of calls is `start`, then `load_weights` before the first `generate` and after every change of the policy,
    `sleep` and `wake_up` in between where memory is tight, `shutdown` at the end.
    """

    policy_version: int | None = None
    """Version of the weights that generate; `None` before the first `load_weights`."""

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

    @abstractmethod
    def generate(self, request: RolloutRequest, on_progress: ProgressListener | None = None) -> Rollouts:
        """Sample one response for every row of the request, in the order of the rows.

        Raises:
            RuntimeError: the engine holds other weights than the request asks for.
        """

    def sleep(self) -> None:
        """Give memory back while the policy trains; nothing to do for engines that hold none."""

    def wake_up(self) -> None:
        """Undo `sleep`."""

    def shutdown(self) -> None:
        """Free everything; the engine can be started again."""

    def describe(self) -> str:
        """Name, version and settings in one line, for the start of a run."""
        return type(self).__name__

    def _check_version(self, request: RolloutRequest) -> None:
        if self.policy_version != request.policy_version:
            raise RuntimeError(
                f"{type(self).__name__} holds weights of policy version {self.policy_version}, the request asks for "
                f"version {request.policy_version}; call load_weights after every change of the policy"
            )


class ProgressMeter:
    """Counts finished rows and generated tokens and tells the listener at most every `interval_s` seconds."""

    def __init__(self, num_rows: int, listener: ProgressListener | None, interval_s: float = 0.5):
        self.num_rows, self.listener, self.interval_s = num_rows, listener, interval_s
        self.rows_done = self.num_tokens = 0
        self.started_at = self.reported_at = time.perf_counter()

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.started_at

    def advance(self, tokens: int, rows: int) -> None:
        self.num_tokens += tokens
        self.rows_done += rows
        now = time.perf_counter()
        if self.listener and (now - self.reported_at >= self.interval_s or self.rows_done == self.num_rows):
            self.reported_at = now
            self.listener(RolloutProgress(self.rows_done, self.num_rows, self.num_tokens, self.elapsed_s))
