"""Lenience that follows how fast the policy moves."""

from __future__ import annotations

import math


class AdaptiveLenience:
    """Reuses less while the policy moves fast: by a smaller lenience, and where that is not enough, in fewer groups.

    Measures the KL of today's policy from the one that last scored the cached responses, in nats per token, over all
    scored tokens. (Over the kept tokens it stays small whatever the policy does, because of the acceptance test.) Above
    1, `target / KL` is the lenience. Below 1 it is the share of the groups that reuse, so that the mean KL over all
    groups stays at the target. A few groups always reuse, to notice when the policy slows down; the others cost no
    verification.

    Begins with these few: a policy that has just begun to learn moves fastest, and its KL is unknown. SPEC-RL (Liu et
    al. 2025, arXiv 2509.23232) keeps one lenience and names its adaptation as future work.

    Args:
        target: KL to allow, nats per token.
        low: smallest lenience; 1 is the plain ratio test.
        high: largest lenience; e^0.5 is SPEC-RL's best for GRPO, with e it ended below plain RL in accuracy.
        min_fraction: smallest share of the groups that reuse; 1 leaves none out.
        smoothing: weight that earlier steps keep in every step; 0 uses the latest step alone.

    Raises:
        ValueError: `target` is not positive, the bounds are not positive, finite and in order, or a share lies outside
            its range.

    Example:
        >>> lenience = AdaptiveLenience(target=0.02)
        >>> lenience.update(kl_sum=8.0, num_tokens=100)  # 0.08 nats a token
        >>> lenience.value, lenience.fraction
        (1.0, 0.25)
    """

    def __init__(
        self,
        target: float,
        low: float = 1.0,
        high: float = math.exp(0.5),
        min_fraction: float = 0.1,
        smoothing: float = 0.5,
    ) -> None:
        if not target > 0:
            raise ValueError(f"target must be positive, got {target}")
        if not 0 < low <= high < math.inf:
            raise ValueError(f"low and high must satisfy 0 < low <= high < inf, got low={low} and high={high}")
        if not 0 < min_fraction <= 1:
            raise ValueError(
                f"min_fraction must lie in (0, 1], got {min_fraction}; with 0 nothing would ever be reused again"
            )
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), got {smoothing}")
        self.target, self.low, self.high = target, low, high
        self.min_fraction, self.smoothing = min_fraction, smoothing
        self._kl_sum, self._num_tokens = 0.0, 0.0

    @property
    def _allowance(self) -> float:
        """The target over the measured KL; 0 before the first measurement."""
        if not self._num_tokens:
            return 0.0
        return self.target * self._num_tokens / self._kl_sum if self._kl_sum else math.inf

    @property
    def value(self) -> float:
        """The lenience to use now, between `low` and `high`."""
        return min(max(self._allowance, self.low), self.high)

    @property
    def fraction(self) -> float:
        """Share of the groups that shall reuse now, between `min_fraction` and 1."""
        return min(max(self._allowance, self.min_fraction), 1.0)

    def update(self, kl_sum: float, num_tokens: int) -> None:
        """Take one step into account.

        Args:
            kl_sum: KL of the step's cached responses, summed over their scored tokens, nats.
            num_tokens: these tokens; none change nothing.

        Raises:
            ValueError: `kl_sum` is not finite.
        """
        if not math.isfinite(kl_sum):
            raise ValueError(f"kl_sum must be finite, got {kl_sum}; leave out tokens without log-probs")
        if num_tokens:
            self._kl_sum = self.smoothing * self._kl_sum + kl_sum
            self._num_tokens = self.smoothing * self._num_tokens + num_tokens

    def state_dict(self) -> dict[str, float]:
        return {"kl_sum": self._kl_sum, "num_tokens": self._num_tokens}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self._kl_sum, self._num_tokens = state_dict["kl_sum"], state_dict["num_tokens"]
