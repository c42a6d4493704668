"""DAPO's dynamic sampling: groups without reward spread are replaced by fresh prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lit_specrl.distributed.collectives import gather_objects, max_over_ranks, num_ranks
from lit_specrl.types import PromptBatch, Rollouts


@runtime_checkable
class PromptStream(Protocol):
    """Training data that gives further prompts within a step, which dynamic sampling needs."""

    def draw(self, num_prompts: int) -> PromptBatch:
        """The next prompts of the epoch, which the loop over it will then not meet again."""


@dataclass(frozen=True)
class DynamicSampling:
    """Generate in rounds until every group of a step has reward spread.

    Groups without reward spread are replaced by fresh prompts; those that are left after the last round are left out of
    the loss.

    Args:
        max_rounds: rounds of generation per step.
    """

    max_rounds: int = 10

    def __post_init__(self) -> None:
        if self.max_rounds < 1:
            raise ValueError(f"max_rounds must be at least 1, got {self.max_rounds}")

    def fill_up(
        self,
        rollouts: Rollouts,
        generate: Callable[[PromptBatch, int], Rollouts],
        stream: PromptStream,
        device: torch.device,
    ) -> tuple[Rollouts, dict[str, float]]:
        """The rollouts of a step with as many groups as those of its first round.

        Args:
            rollouts: of the first round, scored.
            generate: scored rollouts of (prompts, number of the round).
            stream: where prompts come from.
            device: where ranks exchange numbers.

        Returns:
            The rollouts, and metrics of all ranks.
        """
        num_groups = len(rollouts.prompts)
        selection = GroupSelection(num_groups)
        selection.add(rollouts)
        while selection.num_rounds < self.max_rounds:
            missing = max_over_ranks(selection.num_missing, device)
            if not missing:
                break
            found = gather_objects((selection.num_useful, selection.num_generated))
            useful, generated = (sum(counts) for counts in zip(*found, strict=True))
            # every rank draws as many, also one that has enough: the ranks move through the data together
            prompts = stream.draw(groups_to_draw(missing, useful, generated, num_groups))
            selection.add(generate(prompts, selection.num_rounds))
        counts = gather_objects(selection.metrics())
        metrics = {name: sum(rank[name] for rank in counts) for name in counts[0]}
        metrics["dynamic_sampling/rounds"] /= num_ranks()
        return selection.result(), metrics


def groups_with_spread(rewards: Tensor, num_generations: int) -> Tensor:
    """Which groups hold two scored rows of different reward.

    Args:
        rewards: [N]; NaN where a row could not be scored.
        num_generations: rows per group, G.

    Returns:
        [B] bool.

    Example:
        >>> groups_with_spread(torch.tensor([0.0, 1.0, 1.0, 1.0]), num_generations=2)
        tensor([ True, False])
    """
    groups = rewards.view(-1, num_generations)
    lowest = groups.nan_to_num(nan=torch.inf).amin(-1)
    highest = groups.nan_to_num(nan=-torch.inf).amax(-1)
    return highest > lowest


class GroupSelection:
    """Collects groups with reward spread over several rounds of generation, until there are enough.

    Dynamic sampling of Yu et al. 2025 (DAPO, arXiv 2503.14476, section 3.2, equation 11), there "over-sample and filter
    out prompts with accuracy equal to 1 and 0"; here any group whose total rewards are all equal, as verl's
    `filter_groups` with `metric: seq_final_reward`.

    Args:
        num_groups: groups wanted.

    Attributes:
        num_rounds: rounds of generation so far.
    """

    def __init__(self, num_groups: int) -> None:
        self.num_groups = num_groups
        self.num_rounds = 0
        self._rollouts: Rollouts | None = None
        self._has_spread: list[bool] = []

    def add(self, rollouts: Rollouts) -> None:
        """Take in the scored rollouts of a round."""
        rewards = torch.tensor([torch.nan if reward is None else reward for reward in rollouts.total_rewards])
        self._has_spread += groups_with_spread(rewards, rollouts.request.sampling.num_generations).tolist()
        self._rollouts = rollouts if self._rollouts is None else self._rollouts + rollouts
        self.num_rounds += 1

    @property
    def num_generated(self) -> int:
        """Groups generated so far."""
        return len(self._has_spread)

    @property
    def num_useful(self) -> int:
        """Groups with spread found so far."""
        return sum(self._has_spread)

    @property
    def num_missing(self) -> int:
        """Groups with spread still wanted."""
        return max(0, self.num_groups - self.num_useful)

    def result(self) -> Rollouts:
        """The first `num_groups` groups with spread; where there are too few, groups without spread fill the number
        up."""
        assert self._rollouts is not None
        useful_first = sorted(range(self.num_generated), key=lambda group: not self._has_spread[group])
        return self._rollouts.select_groups(sorted(useful_first[: self.num_groups]))

    def metrics(self) -> dict[str, float]:
        """Counts of this rank."""
        return {
            "dynamic_sampling/rounds": float(self.num_rounds),
            "dynamic_sampling/generated_groups": float(self.num_generated),
            "dynamic_sampling/dropped_groups": float(self.num_generated - self.num_useful - self.num_missing),
            "dynamic_sampling/surplus_groups": float(max(0, self.num_useful - self.num_groups)),
            "dynamic_sampling/missing_groups": float(self.num_missing),
        }


def groups_to_draw(num_missing: int, num_useful: int, num_generated: int, limit: int) -> int:
    """How many prompts the next round should try.

    As many as are expected to bring the missing groups at the share of useful groups seen so far, which is taken for at
    least a quarter, so that a step without any signal does not draw without bound.

    Args:
        num_missing: groups that the rank with the fewest still wants.
        num_useful: groups with spread so far, on all ranks.
        num_generated: groups generated so far, on all ranks.
        limit: most prompts of a round and rank.

    Example:
        >>> groups_to_draw(num_missing=3, num_useful=5, num_generated=10, limit=8)
        6
    """
    return min(limit, ceil(num_missing * num_generated / max(num_useful, num_generated / 4)))
