"""How long a step of the engine takes that verifies drafts of different lengths."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lit_specrl.drafting.scheduler.latency_model import non_negative_solution

Floats = NDArray[np.float64]

_KNOTS = np.array([8, 16, 32, 64, 128, 256, 512, 1024])  # tokens of a step from which one more may cost more
_OUTLIER = 1.5  # factor from which a step counts as disturbed
_FEWEST = 8  # steps


class StepCost:
    """Predicts the seconds of a step from its rows and the tokens that they verify together.

    Of B rows with M drafted tokens altogether, the engine computes n = B + M tokens:

        seconds = fixed + per_row * B + convex(n) + (M > 0) * (overhead + per_drafting_row * B) + a * B * M

    No coefficient is negative, `convex` is piecewise linear, and errors count relative to the time of the step. Only
    the normal equations are kept, so that memory is constant. A step that takes far longer than predicted counts as if
    it had taken somewhat longer.

    Args:
        half_life: steps after which an old one counts half.

    Example:
        >>> cost = StepCost()
        >>> for rows, drafted in [(1, 0), (1, 8), (8, 0), (8, 64), (32, 0), (32, 128)] * 4:
        ...     cost.observe(rows, drafted, seconds=0.01 + 0.001 * (rows + drafted))
        >>> cost.curve(16, most=32)[[0, 16, 32]].round(2)
        array([0.03, 0.04, 0.06])
    """

    def __init__(self, half_life: float = 2000) -> None:
        self.half_life = half_life
        size = len(_KNOTS) + 6
        self._gram, self._target = np.zeros((size, size)), np.zeros(size)
        self._coefficients: Floats | None = None
        self.num_steps = 0
        """Steps observed so far."""

    @property
    def is_known(self) -> bool:
        """Whether enough steps were seen to predict others."""
        return self.num_steps >= _FEWEST

    def observe(self, num_rows: int, num_drafted: int, seconds: float) -> None:
        """Learn from a step that only decoded; predictions follow at the next `fit`."""
        features = _features(num_rows, np.array([num_drafted]))[0]
        if self._coefficients is not None:
            seconds = min(seconds, _OUTLIER * float(features @ self._coefficients))
        decay = 0.5 ** (1 / self.half_life)
        relative = features / seconds
        self._gram = self._gram * decay + np.outer(relative, relative)
        self._target = self._target * decay + relative
        self.num_steps += 1

    def fit(self) -> None:
        """Let predictions follow what was observed."""
        self._coefficients = non_negative_solution(self._gram, self._target, self._coefficients)

    def curve(self, num_rows: int, most: int) -> Floats:
        """Seconds of steps with 0 to `most` drafted tokens, [most + 1].

        Raises:
            ValueError: nothing was observed yet.
        """
        if not self.num_steps:
            raise ValueError("no step of the engine has been timed yet; profile it before asking for predictions")
        if self._coefficients is None:
            self.fit()
        assert self._coefficients is not None
        seconds: Floats = np.maximum(_features(num_rows, np.arange(most + 1)) @ self._coefficients, 1e-9)
        return seconds

    def seconds(self, num_rows: int, num_drafted: int) -> float:
        """Of one step."""
        return float(self.curve(num_rows, num_drafted)[-1])

    def state_dict(self) -> dict[str, list[float]]:
        coefficients = [] if self._coefficients is None else self._coefficients.tolist()
        return {
            "gram": self._gram.ravel().tolist(),
            "target": self._target.tolist(),
            "coefficients": coefficients,
            "num_steps": [float(self.num_steps)],
        }

    def load_state_dict(self, state_dict: dict[str, list[float]]) -> None:
        self._gram = np.array(state_dict["gram"]).reshape(self._gram.shape)
        self._target = np.array(state_dict["target"])
        self._coefficients = np.array(state_dict["coefficients"]) if state_dict["coefficients"] else None
        self.num_steps = int(state_dict["num_steps"][0])


def _features(num_rows: int, drafted: NDArray[np.int64]) -> Floats:
    """[n, features] of steps with these numbers of drafted tokens [n]; see `StepCost`."""
    tokens = (num_rows + drafted)[:, None]
    one = np.ones_like(tokens)
    bends = np.maximum(tokens - _KNOTS, 0)
    is_drafting, times_rows = (drafted > 0)[:, None], num_rows * drafted[:, None]
    columns = [one, num_rows * one, tokens, bends, is_drafting, is_drafting * num_rows, times_rows]
    return np.concatenate(columns, axis=1).astype(np.float64)
