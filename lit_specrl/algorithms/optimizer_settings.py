"""What optimizers and learning rate schedules were asked for, so that a resumed run does not change them in silence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

_NOT_TOLD = (
    *("foreach", "fused", "capturable", "differentiable"),  # the same steps by other kernels
    *("base_lrs", "_last_lr"),  # of a schedule: the rates of the optimizer once more
)


class OptimizerSettings:
    """Classes and arguments of a run's optimizers and schedules.

    A checkpoint holds the state of both, and with it the arguments: whatever a resumed run asks for, the state brings
    the checkpoint's back. Different arguments are therefore told, and different classes, whose state does not fit, are
    refused, both before the state is loaded.

    Args:
        owner: whose they are, for messages.
        writer: what writes the weights alone, for messages.
    """

    def __init__(
        self, owner: str = "optimizer", writer: str = "`lit-specrl export` writes them as a folder for `model`"
    ) -> None:
        self._owner, self._way_out = owner, f"start from the checkpoint's weights alone: {writer}"
        self.clear()

    def clear(self) -> None:
        """Forget the run before, and its checkpoint."""
        self._of_run: dict[str, list[dict[str, Any]]] = {}
        self._of_checkpoint: dict[str, list[dict[str, Any]]] = {}

    def record(self, optimizers: list[Any], schedulers: list[Any]) -> None:
        """Note what has been made, before anything of it is stepped or loaded; errors as those of `load_state_dict`."""
        self._of_run = {
            "optimizer": [
                {"class": type(made).__name__, **_group(group)} for made in optimizers for group in made.param_groups
            ],
            "lr_scheduler": [{"class": type(made).__name__, **_plain(made.state_dict())} for made in schedulers],
        }
        self._compare()

    def state_dict(self) -> dict[str, Any]:
        """Of what the run trains with: the checkpoint's, once it is resumed."""
        return self._of_run

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of the checkpoint that the run goes on from; empty where it does not say.

        Raises:
            MisconfigurationException: classes differ, or there are more of one than of the other.
        """
        self._of_checkpoint = dict(state)
        self._compare()

    def _compare(self) -> None:
        """What the run asks for with what the checkpoint was trained with, once both are known."""
        if not (self._of_run and self._of_checkpoint):
            return
        differing: list[str] = []
        for kind, theirs in self._of_checkpoint.items():
            ours = self._of_run[kind]
            if _classes(ours) != _classes(theirs):
                raise MisconfigurationException(
                    f"the state of the {self._owner} in the checkpoint is of {kind} {_classes(theirs)}, and does not "
                    f"fit this run's {_classes(ours)}; take the same, or {self._way_out}"
                )
            for our, their in zip(ours, theirs, strict=True):
                differing += [
                    f"{name} {their_value} in the checkpoint and {our_value} here"
                    for name, their_value, our_value in _differences(their, our)
                ]
        if differing:
            rank_zero_warn(
                f"the {self._owner} goes on with the checkpoint's settings: {'; '.join(differing)}. To train with "
                f"others, {self._way_out}",
            )
        self._of_run, self._of_checkpoint = self._of_checkpoint, {}


def _group(group: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a group of parameters; a schedule has noted the rate that it begins from."""
    arguments = _plain({name: value for name, value in group.items() if name not in ("params", "initial_lr")})
    return arguments | ({"lr": _plain(group["initial_lr"])} if "initial_lr" in group else {})


def _classes(settings: list[dict[str, Any]]) -> str:
    """By group of parameters."""
    return " and ".join(entry["class"] for entry in settings) or "none"


def _differences(theirs: Any, ours: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        if name and theirs.keys() != ours.keys():  # of the arguments themselves, another release of torch has others
            yield name, theirs, ours
            return
        for key in theirs:
            if key in ours:
                yield from _differences(theirs[key], ours[key], f"{name}.{key}" if name else str(key))
    elif theirs != ours:
        yield name, theirs, ours


def _plain(value: Any) -> Any:
    """Numbers, texts and flags of nested containers; what is neither, such as a function, is left out."""
    if isinstance(value, Mapping):
        entries = {key: _plain(entry) for key, entry in value.items() if key not in _NOT_TOLD}
        return {key: entry for key, entry in entries.items() if entry is not None}
    if isinstance(value, (list, tuple)):
        return dict(enumerate(map(_plain, value)))
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else None
    return value if isinstance(value, (bool, int, float, str)) else None
