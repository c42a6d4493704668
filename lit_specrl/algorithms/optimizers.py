"""Optimizers and learning rate schedules of policy and critic, as Lightning keeps them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_specrl.models.critic import Critic
from lit_specrl.models.policy import Policy


def make_optimizers(
    policy: Policy,
    critic: Critic | None,
    make_optimizer: Callable[..., Any],
    make_lr_scheduler: Callable[..., Any] | None,
) -> tuple[list[Any], list[Any]]:
    """Optimizers of the policy and, if there is one, of the critic; and the schedules that were asked for."""
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    owned: list[Any] = [(trained, make_optimizer, make_lr_scheduler)]
    if critic is not None:
        owned.append((list(critic.trained_parameters(policy)), critic.make_optimizer, critic.make_lr_scheduler))
    optimizers = [make(parameters) for parameters, make, _ in owned]
    schedulers = [make(optimizer) for optimizer, (_, _, make) in zip(optimizers, owned, strict=True) if make]
    for made in (*optimizers, *schedulers):
        check_steps_alone(made)
    return optimizers, schedulers


def check_steps_alone(made: Any) -> None:
    """Refuse an optimizer or a schedule whose `step` wants something that a training step does not have.

    Raises:
        MisconfigurationException: such as `ReduceLROnPlateau`, which wants a metric, `LBFGS`, which wants a closure, or
            Lightning's dictionary of a schedule.
    """
    step = getattr(type(made), "step", None)  # a schedule wraps that of its optimizer
    if step is None:
        raise MisconfigurationException(
            f"an optimizer or a schedule is expected, got {type(made).__name__}; a schedule is stepped once per "
            "training step, and needs no interval"
        )
    _, *parameters = inspect.signature(step).parameters.values()  # without self
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    if wanted := [each.name for each in parameters if each.kind in named and each.default is each.empty]:
        raise MisconfigurationException(
            f"{type(made).__name__} cannot be used: its step() wants {', '.join(wanted)}, and is called without; take "
            "one that needs none"
        )


def optimizers_of(module: L.LightningModule) -> list[Any]:
    """Of the policy and of the critic, `None` without one.

    Lightning counts the steps of the first alone (`trainer.global_step`).
    """
    wrapped: Any = module.optimizers()
    if not isinstance(wrapped, list):
        return [wrapped, None]
    raw: Any = module.optimizers(use_pl_optimizer=False)
    return [wrapped[0], raw[1]]


def step_lr_schedulers(module: L.LightningModule) -> dict[str, float]:
    """Step all schedules; returns the learning rates of before."""
    named = zip(("actor", "critic"), optimizers_of(module), strict=True)
    found = {f"{name}/lr": optimizer.param_groups[0]["lr"] for name, optimizer in named if optimizer is not None}
    rates = {name: float(rate) for name, rate in found.items() if rate is not None}  # None: it finds its own
    schedulers: Any = module.lr_schedulers() or []
    for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
        scheduler.step()
    return rates
