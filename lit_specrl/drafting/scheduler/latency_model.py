"""How long a step of the engine takes."""

from __future__ import annotations

import math
import operator
import statistics
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

_KNOTS = (16, 64, 256, 1024)
"""Tokens of a step from which one more may cost more: memory traffic hides the arithmetic of the first ones."""
_WINDOW = 16  # step times that are remembered of each setting
_HALF_LIFE = 200  # steps after which a setting that was not seen again counts half
_CHANGES = 8  # successive steps that must agree that the engine has become another one
_CHANGE_FACTOR = 1.25  # factor between a step time and its prediction
_PRIOR_WEIGHT = 4.0  # step times of a bucket that weigh as much as the formula


class LatencyModel:
    """Predicts the seconds of an engine step from the number of active requests and the speculation length.

    The form is physical. Of B requests with K drafted tokens each, the target computes `n = B * (K + 1)` tokens:

        seconds = fixed + convex(n) + (K > 0) * overhead + K * (draft_fixed + draft_per_token * B)

    with a convex, piecewise linear function, all coefficients at least 0: flat while the weights' way through memory
    hides the arithmetic, steeper beyond. They are fitted to the medians of recent step times, relative errors counting;
    a step that was disturbed moves no median. Nearby measurements correct the formula, weighted by their number. When
    steps with drafts (or those without) keep taking far more or less than predicted, what was known about them is
    forgotten.

    ReSpec (Chen et al. 2025, arXiv 2510.26475) fits a model to an offline profile without printing its form; this one
    also learns from every step of the run.

    Example:
        >>> model = LatencyModel()
        >>> settings = [(batch, length) for batch in (1, 8, 32) for length in (0, 1, 3)]
        >>> model.observe((batch, length, 0.01 + 0.001 * batch * (length + 1)) for batch, length in settings)
        >>> round(model.seconds(16, 2), 3)  # never measured
        0.058
    """

    def __init__(self) -> None:
        self._times: dict[tuple[int, int], deque[float]] = {}  # (batch, length) -> latest step times
        self._seen_at: dict[tuple[int, int], int] = {}
        self._num_steps = 0
        self._coefficients: NDArray[np.float64] | None = None
        self._corrections: dict[tuple[int, int], float] = {}
        self._latest: dict[bool, deque[tuple[int, int, float, float]]] = {
            speculating: deque(maxlen=_CHANGES) for speculating in (False, True)
        }  # batch, length, seconds, log ratio to what was predicted

    def observe(self, steps: Iterable[tuple[int, int, float]]) -> None:
        """Take step times into account; predictions follow at the next `fit`.

        Args:
            steps: (active requests, speculation length, seconds) of each step that only decoded.
        """
        for batch, length, seconds in steps:
            self._num_steps += 1
            self._watch(batch, length, seconds)
            self._times.setdefault((batch, length), deque(maxlen=_WINDOW)).append(seconds)
            self._seen_at[batch, length] = self._num_steps

    def _watch(self, batch: int, length: int, seconds: float) -> None:
        """Forget steps of this kind if the latest ones agree that they are of another engine."""
        if self._coefficients is None:
            return
        latest = self._latest[length > 0]
        latest.append((batch, length, seconds, math.log(seconds / self._predict([(batch, length)])[0])))
        if len(latest) < _CHANGES or abs(latest[-1][3]) < math.log(_CHANGE_FACTOR):
            return
        if abs(statistics.median(ratio for *_, ratio in latest)) < math.log(_CHANGE_FACTOR):
            return
        for setting in [setting for setting in self._times if (setting[1] > 0) == (length > 0)]:
            del self._times[setting], self._seen_at[setting]
        for number, size, took, _ in list(latest)[:-1]:  # the last one comes next
            self._times.setdefault((number, size), deque(maxlen=_WINDOW)).append(took)
            self._seen_at[number, size] = self._num_steps
        latest.clear()

    @property
    def num_steps(self) -> int:
        """Steps observed so far."""
        return self._num_steps

    def fit(self) -> None:
        """Let predictions follow what was observed since the last fit; the first one comes by itself."""
        if not self._times:
            raise ValueError("no step of the engine has been timed yet; profile it before asking for predictions")
        self._coefficients = self._fitted()
        self._corrections = self._residuals(self._coefficients)

    def seconds(self, batch: int, length: int) -> float:
        """Predicted seconds of a step.

        Raises:
            ValueError: nothing was observed yet.
        """
        return float(self.table([batch], [length])[0, 0])

    def table(self, batches: Sequence[int], lengths: Sequence[int]) -> NDArray[np.float64]:
        """Predicted seconds of steps, [number of batches, number of lengths].

        Raises:
            ValueError: nothing was observed yet.
        """
        if self._coefficients is None:
            self.fit()
        grid = [(batch, length) for batch in batches for length in lengths]
        return self._predict(grid).reshape(len(batches), len(lengths))

    def _predict(self, settings: list[tuple[int, int]]) -> NDArray[np.float64]:
        """With the coefficients of the last fit."""
        assert self._coefficients is not None
        corrections = [self._corrections.get((_bucket(batch), length), 1.0) for batch, length in settings]
        return _formula(settings, self._coefficients) * np.array(corrections)

    def _residuals(self, coefficients: NDArray[np.float64]) -> dict[tuple[int, int], float]:
        """(bucket of batch sizes, length) -> factor between what was measured there and the formula."""
        formula = _formula(list(self._times), coefficients)
        sums: dict[tuple[int, int], tuple[float, float]] = {}
        for (setting, times), seconds in zip(self._times.items(), formula, strict=True):
            key, weight = (_bucket(setting[0]), setting[1]), self._weight(setting)
            total, count = sums.get(key, (0.0, 0.0))
            sums[key] = total + weight * math.log(statistics.median(times) / seconds), count + weight
        return {key: math.exp(total / (count + _PRIOR_WEIGHT)) for key, (total, count) in sums.items()}

    def _fitted(self) -> NDArray[np.float64]:
        settings = list(self._times)
        medians = np.array([statistics.median(self._times[setting]) for setting in settings])
        weights = np.sqrt([self._weight(setting) for setting in settings]) / medians  # errors are relative
        matrix = _features(settings) * weights[:, None]
        return _non_negative_least_squares(matrix, medians * weights, self._coefficients)

    def _weight(self, setting: tuple[int, int]) -> float:
        age = self._num_steps - self._seen_at[setting]
        return len(self._times[setting]) * 0.5 ** (age / _HALF_LIFE)

    # ----------------------------------------------------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, list[list[float]]]:
        """Rows of numbers: step times as (batch, length, age in steps, seconds), the last fit, the latest surprises."""
        return {
            "times": [
                [batch, length, self._num_steps - self._seen_at[batch, length], seconds]
                for (batch, length), times in self._times.items()
                for seconds in times
            ],
            "coefficients": [] if self._coefficients is None else [self._coefficients.tolist()],
            "corrections": [[bucket, length, factor] for (bucket, length), factor in self._corrections.items()],
            "latest": [list(entry) for entries in self._latest.values() for entry in entries],
            "counts": [[self._num_steps]],
        }

    def load_state_dict(self, state_dict: dict[str, list[list[float]]]) -> None:
        self.__init__()  # type: ignore[misc]
        ((num_steps,),) = state_dict["counts"]
        self._num_steps = int(num_steps)
        for batch, length, age, seconds in state_dict["times"]:
            setting = int(batch), int(length)
            self._times.setdefault(setting, deque(maxlen=_WINDOW)).append(seconds)
            self._seen_at[setting] = self._num_steps - int(age)
        if state_dict["coefficients"]:
            self._coefficients = np.array(state_dict["coefficients"][0])
        self._corrections = {(int(bucket), int(length)): factor for bucket, length, factor in state_dict["corrections"]}
        for batch, length, seconds, ratio in state_dict["latest"]:
            self._latest[length > 0].append((int(batch), int(length), seconds, ratio))


def _bucket(batch: int) -> int:
    """Batch sizes that behave alike: two buckets for each doubling."""
    return round(2 * float(np.log2(batch)))


def _formula(settings: Sequence[tuple[int, int]], coefficients: NDArray[np.float64]) -> NDArray[np.float64]:
    seconds: NDArray[np.float64] = np.maximum(_features(settings) @ coefficients, 1e-9)
    return seconds


def _features(settings: Sequence[tuple[int, int]]) -> NDArray[np.float64]:
    """One row per (batch, length); see `LatencyModel`."""
    batch, length = np.array(settings, dtype=np.float64).T
    tokens = batch * (length + 1)
    bends = [np.maximum(tokens - knot, 0) for knot in _KNOTS]
    return np.stack([np.ones_like(tokens), tokens, *bends, length > 0, length, length * batch], axis=1)


def _non_negative_least_squares(
    matrix: NDArray[np.float64], target: NDArray[np.float64], start: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """x >= 0 that minimises |matrix x - target|, from `start`."""
    return non_negative_solution(matrix.T @ matrix, matrix.T @ target, start)


def non_negative_solution(
    gram: NDArray[np.float64],
    wanted: NDArray[np.float64],
    start: NDArray[np.float64] | None = None,
    sweeps: int = 60,
) -> NDArray[np.float64]:
    """x >= 0 of a least-squares fit whose normal equations are `gram x = wanted`.

    By coordinate descent on scaled columns from `start`.
    """
    scale = np.sqrt(np.diag(gram))
    scale[scale == 0] = 1
    gram = gram / np.outer(scale, scale)
    gram[np.diag_indices_from(gram)] += 1e-9  # columns that say the same
    rows, targets = gram.tolist(), (wanted / scale).tolist()
    solution = [0.0] * len(targets) if start is None else (start * scale).tolist()
    for _ in range(sweeps):
        change = 0.0
        for index, row in enumerate(rows):
            gradient = targets[index] - sum(map(operator.mul, row, solution))
            value = max(0.0, solution[index] + gradient / row[index])
            change = max(change, abs(value - solution[index]))
            solution[index] = value
        if change < 1e-5 * max(solution):
            break
    return np.array(solution) / scale
