"""The weight of the entropy bonus, constant or following a target."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class EntropyTarget:
    """An entropy bonus that acts where the policy has become too sure.

    Skywork-OR1 (He et al. 2025, arXiv 2505.22312), as TRL's `use_adaptive_entropy`.

    Args:
        target: entropy to hold, in nats per token.
        initial: weight of the bonus at the beginning.
        minimum: smallest weight.
        maximum: largest weight.
        delta: what an update adds to the weight, or takes from it.

    Raises:
        ValueError: a number out of its range.
    """

    target: float = 0.2
    initial: float = 0.0
    minimum: float = 0.0
    maximum: float = 1.0
    delta: float = 0.005

    def __post_init__(self) -> None:
        if not (self.target > 0 and self.delta > 0):
            raise ValueError(f"target and delta must be positive, got {self.target} and {self.delta}")
        if not 0 <= self.minimum <= self.initial <= self.maximum < math.inf:
            raise ValueError(
                "the weight of the bonus must keep 0 <= minimum <= initial <= maximum, got minimum="
                f"{self.minimum}, initial={self.initial} and maximum={self.maximum}"
            )


class EntropyCoefficient:
    """Weight of the entropy bonus. With a target each update moves it by `delta`: up where the update before found no
    more entropy than the target, down otherwise; and it acts only where that update did.

    Args:
        coefficient: the weight, or how it follows a target.

    Raises:
        ValueError: the weight is not finite.

    Example:
        >>> coefficient = EntropyCoefficient(EntropyTarget(target=0.3, delta=0.01))
        >>> coefficient.update(0.25)
        >>> coefficient.value
        0.01
    """

    def __init__(self, coefficient: float | EntropyTarget) -> None:
        self.target: EntropyTarget | None = None
        if isinstance(coefficient, EntropyTarget):
            self.target, coefficient = coefficient, coefficient.initial
        self._weight = coefficient
        self._entropy = math.inf  # of the latest update; no bonus before the first
        if not math.isfinite(self._weight):
            raise ValueError(f"entropy_coef must be a finite number, got {self._weight}; use 0.0 for no bonus")

    @property
    def is_on(self) -> bool:
        """Whether there may ever be a bonus."""
        return self.target is not None or self._weight != 0

    @property
    def value(self) -> float:
        """What the next update weights the bonus with."""
        return self._weight if self.target is None or self._entropy <= self.target.target else 0.0

    def update(self, entropy: float) -> None:
        """Move the weight.

        Args:
            entropy: of the update just done, in nats per token, on all ranks.
        """
        if self.target is None or not math.isfinite(entropy):  # a policy that has broken says nothing
            return
        delta = self.target.delta if entropy <= self.target.target else -self.target.delta
        self._weight = min(max(self._weight + delta, self.target.minimum), self.target.maximum)
        self._entropy = entropy

    def state_dict(self) -> list[float]:
        """Weight and entropy, for a checkpoint."""
        return [self._weight, self._entropy]

    def load_state_dict(self, state: list[float]) -> None:
        """Go on from a checkpoint; a constant weight is the one of this run."""
        if self.target is not None:
            self._weight, self._entropy = state
