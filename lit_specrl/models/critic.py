"""Critics: what return does the policy expect from each response token on?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lit_specrl.losses import value_loss
from lit_specrl.metrics import CriticStatistics
from lit_specrl.models.hidden_states import forward_hidden_states, keeps_cache_by_row
from lit_specrl.models.policy import Policy, disable_dropout, load_pretrained, shard_by_layer
from lit_specrl.models.value_head import ValueHead
from lit_specrl.types import Experience


def default_critic_optimizer(parameters: Any) -> torch.optim.Optimizer:
    """AdamW at 1e-5 without weight decay."""
    return torch.optim.AdamW(parameters, lr=1e-5, betas=(0.9, 0.999), weight_decay=0.0, fused=True)


class Critic(nn.Module, ABC):
    """The value model of PPO: how it learns. Subclasses say what it is.

    Args:
        optimizer: makes the optimizer from the critic's parameters.
        lr_scheduler: makes its learning rate schedule; stepped once per step. `None` keeps the rate constant.
        warmup_steps: first steps of a run in which the critic learns and the policy does not (verl's `critic_warmup`).
        cliprange_value: how far a value may move from its old one before its loss stops falling, in units of reward;
            `None` for the plain squared error.
        max_grad_norm: the critic's gradient is scaled down to this norm.

    Raises:
        ValueError: an argument out of its range.
    """

    shares_trunk: bool

    def __init__(
        self,
        optimizer: OptimizerCallable = default_critic_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
        cliprange_value: float | None = 0.5,
        max_grad_norm: float = 1.0,
    ) -> None:
        super().__init__()
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}")
        if cliprange_value is not None and cliprange_value <= 0:
            raise ValueError(f"cliprange_value must be positive, got {cliprange_value}; use None for no clipping")
        if max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm must be positive, got {max_grad_norm}")
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.warmup_steps = warmup_steps
        self.cliprange_value = cliprange_value
        self.max_grad_norm = max_grad_norm

    @abstractmethod
    def build(self, policy: Policy, model: str, **options: Any) -> None:
        """Create the weights.

        Args:
            policy: the policy, on the CPU and whole.
            model: hub name or folder that the policy was loaded from.
            options: as those of `Policy.build`.
        """

    @abstractmethod
    def trained_parameters(self, policy: Policy) -> Iterator[nn.Parameter]:
        """Parameters that the critic's optimizer owns."""

    @abstractmethod
    def shard(self, **options: Any) -> None:
        """Shard what is not the policy's (FSDP2); arguments as those of `Policy.shard`."""

    def loss(self, values: Tensor, part: Experience) -> tuple[Tensor, CriticStatistics]:
        """Clipped squared error of each token.

        Args:
            values: [n, R] with gradient.
            part: n rows with old values and returns.

        Returns:
            [n, R], 0 outside the loss mask; and what to report.
        """
        assert part.values is not None and part.returns is not None
        per_token_loss, clipped = value_loss(
            values, part.values, part.returns, part.loss_mask, self.cliprange_value
        )  # [n, R]
        return per_token_loss, CriticStatistics(per_token_loss.detach().sum(), clipped)


class SeparateCritic(Critic):
    """A transformer of its own with a value head: verl's and TRL's PPO.

    Costs a second model, its optimizer, and a forward and backward pass of its own.

    Args:
        model: hub name or folder; `None` starts from the policy's own weights. It must have the policy's tokenizer.
        optimizer: makes the optimizer from the critic's parameters.
        lr_scheduler: makes its learning rate schedule; stepped once per step. `None` keeps the rate constant.
        warmup_steps: first steps of a run in which the critic learns and the policy does not.
        cliprange_value: how far a value may move from its old one before its loss stops falling, in units of reward;
            `None` for the plain squared error.
        max_grad_norm: the critic's gradient is scaled down to this norm.

    Example::

        PPO("Qwen/Qwen3-1.7B-Base", rewards=[MathReward()], critic=SeparateCritic(warmup_steps=10))
    """

    shares_trunk = False

    def __init__(
        self,
        model: str | None = None,
        optimizer: OptimizerCallable = default_critic_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
        cliprange_value: float | None = 0.5,
        max_grad_norm: float = 1.0,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, warmup_steps, cliprange_value, max_grad_norm)
        self.model = model
        self.backbone: Any = None

    def build(self, policy: Policy, model: str, **options: Any) -> None:
        if self.backbone is not None:
            return
        name = self.model or model
        self.backbone = load_pretrained(AutoModelForCausalLM, name, **options).base_model
        if self.backbone.get_input_embeddings().num_embeddings < policy.model.get_input_embeddings().num_embeddings:
            raise ValueError(
                f"the critic {name!r} knows {self.backbone.get_input_embeddings().num_embeddings} tokens, the policy "
                f"{policy.model.get_input_embeddings().num_embeddings}; use a model with the policy's tokenizer"
            )
        disable_dropout(self.backbone)
        self.keeps_cache_by_row = keeps_cache_by_row(self.backbone)
        self.head = ValueHead(self.backbone.config.get_text_config().hidden_size)

    def trained_parameters(self, policy: Policy) -> Iterator[nn.Parameter]:
        return self.parameters()

    def shard(self, **options: Any) -> None:
        shard_by_layer(self, self.backbone.layers, **options)

    def forward(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        prompt_index: Tensor,
        response_ids: Tensor,
        response_mask: Tensor,
        share_prompts: bool = False,
    ) -> Tensor:
        """Values before each response token, [N, R]; arguments as those of `Policy`."""
        states = forward_hidden_states(
            self.backbone,
            prompt_ids,
            prompt_mask,
            prompt_index,
            response_ids,
            response_mask,
            share_prompts and self.keeps_cache_by_row,
        )
        return self.head(states.last, response_mask)


class SharedTrunkCritic(Critic):
    """A value head on the policy's own hidden states.

    Costs next to nothing: values come out of the pass that gives the log-probs, and their loss is added to the policy's. Its
    gradient reaches the policy's weights, which is why it is weighted down. During the warm-up the head learns alone.

    Args:
        coefficient: weight of the value loss in the sum (`vf_coef` of TRL).
        optimizer: makes the optimizer from the parameters of the head.
        lr_scheduler: makes its learning rate schedule; stepped once per step. `None` keeps the rate constant.
        warmup_steps: first steps of a run in which only the head learns.
        cliprange_value: how far a value may move from its old one before its loss stops falling, in units of reward;
            `None` for the plain squared error.
        max_grad_norm: the head's gradient is scaled down to this norm.
    """

    shares_trunk = True

    def __init__(
        self,
        coefficient: float = 0.1,
        optimizer: OptimizerCallable = default_critic_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
        cliprange_value: float | None = 0.5,
        max_grad_norm: float = 1.0,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, warmup_steps, cliprange_value, max_grad_norm)
        if coefficient <= 0:
            raise ValueError(f"coefficient must be positive, got {coefficient}")
        self.coefficient = coefficient

    def build(self, policy: Policy, model: str, **options: Any) -> None:
        if policy.value_head is None:
            policy.value_head = ValueHead(policy.model.config.get_text_config().hidden_size)

    def trained_parameters(self, policy: Policy) -> Iterator[nn.Parameter]:
        assert policy.value_head is not None
        return policy.value_head.parameters()

    def shard(self, **options: Any) -> None:
        """The head is sharded with the policy."""
