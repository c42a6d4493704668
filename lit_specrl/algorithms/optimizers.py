"""Optimizers and learning rate schedules of policy and critic, as Lightning keeps them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L

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
    return optimizers, schedulers


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
    rates = {f"{name}/lr": float(optimizer.param_groups[0]["lr"]) for name, optimizer in named if optimizer is not None}
    schedulers: Any = module.lr_schedulers() or []
    for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
        scheduler.step()
    return rates
