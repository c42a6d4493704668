"""Lenience that is steered by what reuse does to the training."""

from __future__ import annotations

import math


class AdaptiveLenience:
    """Raise the lenience while reused tokens stay harmless and lower it when they stray.

    Holds an observed quantity that grows with the lenience (clip fraction of the reused tokens, or their mean KL) at a
    target. An integral controller in log-lenience: every update moves it by `rate * (target - observed) / target` nats,
    never by more than `rate`, and keeps it between the bounds, so nothing winds up there. It settles where the
    observation grows by less than `2 * target / rate` per nat of log-lenience, and oscillates where it grows faster.
    Starts at `low`.

    Args:
        target: value to hold, in the unit of what is observed.
        low: smallest lenience; 1 is the plain ratio test.
        high: largest lenience. With e, SPEC-RL (Liu et al. 2025, arXiv 2509.23232) ended below plain RL in accuracy.
        rate: largest change per update, in nats of log-lenience.

    Raises:
        ValueError: `target` or `rate` is not positive, or the bounds are not positive, finite and in order.

    Example:
        >>> lenience = AdaptiveLenience(target=0.02)
        >>> round(lenience.update(observed=0.01), 4)  # exp(0.1 * 0.5)
        1.0513
    """

    def __init__(self, target: float, low: float = 1.0, high: float = math.e, rate: float = 0.1) -> None:
        if not target > 0:
            raise ValueError(f"target must be positive, got {target}")
        if not 0 < low <= high < math.inf:
            raise ValueError(f"low and high must satisfy 0 < low <= high < inf, got low={low} and high={high}")
        if not rate > 0:
            raise ValueError(f"rate must be positive, got {rate}")
        self.target, self.low, self.high, self.rate = target, low, high, rate
        self._log_lenience = math.log(low)

    @property
    def value(self) -> float:
        """The lenience to use now, between `low` and `high`."""
        return min(max(math.exp(self._log_lenience), self.low), self.high)

    def update(self, observed: float) -> float:
        """Take one observation into account.

        Args:
            observed: the quantity, measured over the tokens that were reused with the present lenience.

        Returns:
            The new lenience.

        Raises:
            ValueError: `observed` is NaN.
        """
        if math.isnan(observed):
            raise ValueError("observed must be a number, got nan; leave the update out when no token was reused")
        error = (self.target - observed) / self.target
        self._move_to(self._log_lenience + self.rate * min(max(error, -1.0), 1.0))
        return self.value

    def state_dict(self) -> dict[str, float]:
        return {"log_lenience": self._log_lenience}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Continue from a saved lenience, moved into the present bounds."""
        self._move_to(state_dict["log_lenience"])

    def _move_to(self, log_lenience: float) -> None:
        self._log_lenience = min(max(log_lenience, math.log(self.low)), math.log(self.high))
