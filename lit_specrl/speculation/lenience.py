"""Lenience that is steered by what reuse does to the training."""

from __future__ import annotations

import math


class AdaptiveLenience:
    """Raise the lenience while reused tokens stay harmless, lower it when they stray, and reuse in fewer groups when that is not enough.

    Holds an observed quantity (the mean KL of the reused tokens: how far the policy has moved since it last saw them) at a target. Where the
    policy learns fast, the plain ratio test still keeps too much of the past; then the lenience stays at `low` and the share of the groups that
    have drafts falls instead, down to a few that watch whether the policy has slowed down. Groups without drafts cost no verification.

    An integral controller: every update moves log-lenience by `rate * (target - observed) / target` nats, never by more than `rate`. Below
    `log(low)` the same number is the logarithm of the share. It stays between its bounds, so nothing winds up there. Starts at `low`
    with drafts in all groups.

    Args:
        target: value to hold, in the unit of what is observed.
        low: smallest lenience; 1 is the plain ratio test.
        high: largest lenience. With e, SPEC-RL (Liu et al. 2025, arXiv 2509.23232) ended below plain RL in accuracy.
        rate: largest change per update, in nats.
        min_fraction: smallest share of the groups that have drafts; 1 leaves none out.

    Raises:
        ValueError: `target` or `rate` is not positive, or the bounds are not positive, finite and in order.

    Example:
        >>> lenience = AdaptiveLenience(target=0.02)
        >>> round(lenience.update(observed=0.01), 4)  # exp(0.1 * 0.5)
        1.0513
    """

    def __init__(
        self, target: float, low: float = 1.0, high: float = math.e, rate: float = 0.1, min_fraction: float = 0.05
    ) -> None:
        if not target > 0:
            raise ValueError(f"target must be positive, got {target}")
        if not 0 < low <= high < math.inf:
            raise ValueError(f"low and high must satisfy 0 < low <= high < inf, got low={low} and high={high}")
        if not rate > 0:
            raise ValueError(f"rate must be positive, got {rate}")
        if not 0 < min_fraction <= 1:
            raise ValueError(
                f"min_fraction must lie in (0, 1], got {min_fraction}; with 0 nothing would ever be reused again"
            )
        self.target, self.low, self.high, self.rate, self.min_fraction = target, low, high, rate, min_fraction
        self._log_lenience = math.log(low)  # less than log(low) where groups are left out

    @property
    def value(self) -> float:
        """The lenience to use now, between `low` and `high`."""
        return min(max(math.exp(self._log_lenience), self.low), self.high)

    @property
    def fraction(self) -> float:
        """Share of the groups that shall have drafts now, between `min_fraction` and 1."""
        return min(max(math.exp(self._log_lenience) / self.low, self.min_fraction), 1.0)

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
        lowest = math.log(self.low) + math.log(self.min_fraction)
        self._log_lenience = min(max(log_lenience, lowest), math.log(self.high))
