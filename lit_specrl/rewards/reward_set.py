"""All rewards of a run evaluated on a batch."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from lit_specrl.rewards.arguments import takes_argument
from lit_specrl.rewards.base import Reward, Scores
from lit_specrl.rewards.event_loop import EventLoop
from lit_specrl.rewards.function import RewardFunction
from lit_specrl.rewards.watchdog import warning_when_slow


@dataclass
class RewardScores:
    """What the rewards say about a batch.

    Example: two rewards of weight 1 and 0.5 on three rows; the second does not apply to row 1, none to row 2::

        RewardScores(names=["math", "format"], values=[[1.0, 0.0, None], [1.0, None, None]], total=[1.5, 0.0, 0.0],
                     num_unscored=1)
    """

    names: list[str]
    """One per reward, in the order given to `RewardSet`."""
    values: list[list[float | None]]
    """Per reward, per row: unweighted scores; `None` where the reward does not apply."""
    total: list[float]
    """[N] weighted sum over the rewards that apply; 0 where none does."""
    num_unscored: int = 0
    """Rows to which no reward applies."""
    num_nonfinite: int = 0
    """Scores that came as NaN or infinity, over all rewards; they are `None` in `values`."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Counters of the rewards, such as `rewards/math/timeouts`."""


class RewardSet:
    r"""Evaluates several rewards on the same rows and adds them up.

    Plain rewards run one after the other on the calling thread, then all async ones run at the same time on an event
    loop that lives as long as the set, so that their network sessions stay usable from call to call. A NaN or an
    infinity counts as "does not apply", with a warning.

    Args:
        rewards: `Reward`s, functions of TRL's signature or import paths of such functions; names must differ.
        warn_after_s: warn when a reward has been busy with one call for so many seconds; `None` never warns.

    Raises:
        ValueError: no rewards, two of one name, or `warn_after_s` is not positive.
        TypeError: something that is no reward.

    Example::

        rewards = RewardSet([MathReward(), FormatReward(r".*\\boxed\{.*\}.*", weight=0.1)])
        rewards(["6*7="], [r"\boxed{42}"], answer=["42"]).total  # [1.1]
    """

    def __init__(self, rewards: Sequence[Reward | Callable[..., Any] | str], warn_after_s: float | None = 60.0) -> None:
        if isinstance(rewards, str) or callable(rewards):  # a single one
            rewards = [rewards]
        if not rewards:
            raise ValueError("rewards must hold at least one reward, got none")
        if warn_after_s is not None and not 0 < warn_after_s < math.inf:
            raise ValueError(f"warn_after_s must be a positive number of seconds, got {warn_after_s}; None never warns")
        self.rewards = [reward if isinstance(reward, Reward) else RewardFunction(reward) for reward in rewards]
        names = [reward.name for reward in self.rewards]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"{names.count(name)} rewards are named {name!r}; give them different names by name=..."
                )
        self.warn_after_s = warn_after_s
        # Taken now: what a reward counts or keeps while it is called is no setting.
        self._identity = "\n".join(f"{reward.name}: {reward.identity()}" for reward in self.rewards)
        self._event_loop = EventLoop()

    def __call__(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> RewardScores:
        """Score every row with every reward.

        Args:
            prompts: [N] rendered prompts.
            completions: [N] decoded responses.
            columns: lists of N values.

        Raises:
            ValueError: columns or scores of the wrong length, scores that are no numbers.
            RuntimeError: a reward raised; names the reward, the cause is attached.
        """
        for name, values in {"prompts": prompts, **columns}.items():
            if len(values) != len(completions):
                raise ValueError(f"column {name!r} has {len(values)} rows, completions has {len(completions)}")
        if not completions:
            return self._nothing()
        scores = self._evaluate(prompts, completions, columns)
        return self._add_up([_checked(*pair, len(completions)) for pair in zip(self.rewards, scores, strict=True)])

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each reward, by its name."""
        return {reward.name: reward.weight for reward in self.rewards}

    def total(self, values: Sequence[float | None]) -> float | None:
        """Weighted sum of the rewards of one row, in the order of `rewards`; `None` where none applies."""
        if all(value is None for value in values):
            return None
        return _weighted_sum(self.weights.values(), values)

    def identity(self) -> str:
        """Return a line per reward that names it and what makes its numbers, see `Reward.identity`; weights are no part
        of it."""
        return self._identity

    def close(self) -> None:
        """Close every reward and stop the event loop; the next call starts them again."""
        with ExitStack() as calls:  # from the last to the first, each also where one raises
            calls.callback(self._event_loop.close)
            for reward in reversed(self.rewards):
                calls.callback(reward.close)

    def _evaluate(self, prompts: list[str], completions: list[str], columns: dict[str, list[Any]]) -> list[Any]:
        scores: list[Any] = []
        try:
            for reward in self.rewards:
                with _naming(reward), warning_when_slow(reward, self.warn_after_s):
                    taken = {
                        name: values
                        for name, values in columns.items()
                        if takes_argument(reward, name, follow_wrapped=False)
                    }
                    scores.append(reward(list(prompts), list(completions), **_copies(taken)))
        except RuntimeError:
            for score in scores:
                if inspect.iscoroutine(score):
                    score.close()  # never awaited: Python would warn about it
            raise
        pairs = list(zip(self.rewards, scores, strict=True))
        awaited = iter(
            self._event_loop.gather(
                [self._watch(reward, score) for reward, score in pairs if inspect.isawaitable(score)]
            )
        )
        return [_result(reward, next(awaited)) if inspect.isawaitable(score) else score for reward, score in pairs]

    async def _watch(self, reward: Reward, score: Awaitable[Scores]) -> Scores:
        with warning_when_slow(reward, self.warn_after_s):
            return await score

    def _nothing(self) -> RewardScores:
        """Of no rows: no reward is asked, and every counter is 0."""
        counters = {
            f"rewards/{reward.name}/{name}": 0.0 for reward in self.rewards for name in [*reward.counters, "nonfinite"]
        }
        return RewardScores([reward.name for reward in self.rewards], [[] for _ in self.rewards], [], metrics=counters)

    def _add_up(self, checked: list[_Checked]) -> RewardScores:
        values = [column.values for column in checked]
        weights = self.weights.values()
        metrics: dict[str, float] = {}
        for reward, column in zip(self.rewards, checked, strict=True):
            counters = {**reward.counters, "nonfinite": column.num_nonfinite}
            metrics |= {f"rewards/{reward.name}/{counter}": float(count) for counter, count in counters.items()}
        rows = list(zip(*values, strict=True))
        return RewardScores(
            names=[reward.name for reward in self.rewards],
            values=values,
            total=[_weighted_sum(weights, row) for row in rows],
            num_unscored=sum(all(score is None for score in row) for row in rows),
            num_nonfinite=sum(column.num_nonfinite for column in checked),
            metrics=metrics,
        )


def _weighted_sum(weights: Iterable[float], row: Sequence[float | None]) -> float:
    return sum((weight * score for weight, score in zip(weights, row, strict=True) if score is not None), start=0.0)


@dataclass
class _Checked:
    """Scores of one reward, known to be finite numbers or `None`."""

    values: list[float | None]
    num_nonfinite: int


def _checked(reward: Reward, scores: Any, num_rows: int) -> _Checked:
    """Check what a reward returned: a list, an array or a tensor of [N] numbers."""
    expected = f"reward {reward.name!r} must return a list of {num_rows} numbers"
    shape = getattr(scores, "shape", None)
    if isinstance(scores, str | bytes | dict | set) or not hasattr(scores, "__len__") or shape == ():
        raise ValueError(f"{expected}, got {type(scores).__name__}; return one number (or None) per completion")
    if shape is not None and len(shape) != 1:
        raise ValueError(
            f"{expected}, got {type(scores).__name__} of shape {tuple(shape)}; return one number per completion, shape "
            f"({num_rows},)"
        )
    if len(scores) != num_rows:
        raise ValueError(
            f"reward {reward.name!r} must return one number (or None) per completion: expected {num_rows}, "
            f"got {len(scores)}; return None for rows it does not apply to"
        )
    if shape is not None:
        scores = scores.tolist()
    scores = [_plain(score) for score in scores]
    for row, score in enumerate(scores):
        if score is not None and not isinstance(score, Real):
            raise ValueError(
                f"reward {reward.name!r} must return numbers or None, got {score!r} of type {type(score).__name__} "
                f"for row {row}; convert it with float()"
            )
    numbers = [None if score is None else _float(score) for score in scores]
    values = [score if score is not None and math.isfinite(score) else None for score in numbers]
    num_nonfinite = values.count(None) - numbers.count(None)
    if num_nonfinite:
        warnings.warn(
            f"reward {reward.name!r} returned NaN or infinity for {num_nonfinite} of {num_rows} rows; they count as "
            "None. Return None where the reward does not apply, or a finite number.",
            stacklevel=4,
        )
    return _Checked(values, num_nonfinite)


def _plain(score: Any) -> Any:
    """A scalar of numpy or torch, which has no dimensions, as Python's own; anything else as it is."""
    return score.item() if getattr(score, "shape", None) == () and hasattr(score, "item") else score


def _float(score: Real) -> float:
    try:
        return float(score)
    except OverflowError:  # a whole number beyond the floats
        return math.inf


@contextmanager
def _naming(reward: Reward) -> Iterator[None]:
    """Turn an exception into a RuntimeError that names the reward."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(f"reward {reward.name!r} failed: {type(error).__name__}: {error}") from error


def _result(reward: Reward, outcome: Any) -> Any:
    """Return what an async reward came to, or raise what it raised."""
    with _naming(reward):
        if isinstance(outcome, BaseException):
            raise outcome
    return outcome


def _copies(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Columns that a reward may change: the lists and mappings in them are those of the rollouts and of the data.

    Objects such as the environments of the rows stay themselves. Token ids are numbers, which need no look at each.
    """
    return {
        name: [list(value) if name == "completion_ids" else _copy(value) for value in values]
        for name, values in columns.items()
    }


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copy(entry) for name, entry in value.items()}
    return [_copy(entry) for entry in value] if isinstance(value, list) else value
