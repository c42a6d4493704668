"""A reference of the KL penalty that follows the policy."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_specrl.losses import KLPenalty
from lit_specrl.models.scorer import Scorer

_SMALL_SHARE = 0.1
"""Of the difference to the policy; what is less is lost in the rounding of half precision."""


class MovingReference:
    """Moves the reference towards the policy every few steps, where `KLPenalty(sync_steps)` asks for it.

    Args:
        kl: how the penalty is taken.
        beta: weight of the penalty.
        lora: adapters that are trained; the reference is then the policy without them.

    Raises:
        ValueError: there is no reference that could move.

    Example:
        >>> reference = MovingReference(KLPenalty(sync_steps=3), beta=0.1, lora=None)
        >>> [step for step in range(8) if reference.moves_after(step)]
        [2, 5]
    """

    def __init__(self, kl: KLPenalty, beta: float, lora: dict[str, Any] | None) -> None:
        self._sync_steps, self._share, self._has_told = kl.sync_steps, kl.mixup_alpha, False
        if self.is_on and not beta:
            raise ValueError(
                f"KLPenalty(sync_steps={kl.sync_steps}) moves the reference of the KL penalty, but beta=0 has none; set"
                " beta, or leave sync_steps out"
            )
        if self.is_on and lora is not None:
            raise ValueError(
                f"KLPenalty(sync_steps={kl.sync_steps}) moves a reference of its own, but with lora the reference is "
                "the policy without adapters; leave one of the two out"
            )

    @property
    def is_on(self) -> bool:
        """Whether the reference ever moves; log-probs of earlier steps are then not those of today."""
        return self._sync_steps is not None

    def moves_after(self, step: int) -> bool:
        """Whether this step, counted from 0, is followed by a move."""
        return self._sync_steps is not None and (step + 1) % self._sync_steps == 0

    def follow(self, scorer: Scorer, step: int) -> None:
        """Move, if this step is one to do it after."""
        if self.moves_after(step):
            self._tell_if_rounded_away(scorer.policy.model.dtype)
            scorer.move_reference(self._share)

    def _tell_if_rounded_away(self, dtype: torch.dtype) -> None:
        if dtype != torch.float32 and self._share < _SMALL_SHARE and not self._has_told:
            self._has_told = True
            rank_zero_warn(
                f"the reference hardly moves: with mixup_alpha={self._share}, most moves are less than "
                f"{str(dtype).removeprefix('torch.')} can add to a weight; take dtype: float32, or a larger mixup_alpha "
                "with a larger sync_steps"
            )

    def check(self, is_sharded: bool) -> None:
        """Raise `MisconfigurationException` where checkpoints have no place for the reference."""
        if self.is_on and is_sharded:
            raise MisconfigurationException(
                "KLPenalty(sync_steps=...) keeps the reference in checkpoints, which sharded ones have no place for "
                "yet; train with another strategy, or with a fixed reference"
            )

    def state_dict(self, scorer: Scorer) -> dict[str, Any]:
        """Weights of the reference where it moves; nothing elsewhere."""
        return {"reference": scorer.reference_state()} if self.is_on else {}

    def load_state_dict(self, scorer: Scorer, state: dict[str, Any]) -> None:
        """Go on from the reference of a checkpoint; one of a run without moves has none, and it begins anew."""
        if self.is_on and "reference" in state:
            scorer.load_reference_state(state["reference"])
        elif "reference" in state:
            rank_zero_warn(
                "the checkpoint's reference had moved, and this run has no sync_steps: its KL penalty is taken from "
                "the initial model; set sync_steps to go on with the moved one"
            )
