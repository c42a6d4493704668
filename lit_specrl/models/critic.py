"""Critics: what return does the policy expect from each response token on?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lit_specrl.experience import Experience, Layout, TokenBatch
from lit_specrl.losses import value_loss
from lit_specrl.metrics import CriticStatistics
from lit_specrl.models import compiled_layers
from lit_specrl.models.hidden_states import forward_hidden_states, keeps_cache_by_row
from lit_specrl.models.model_files import check_weights
from lit_specrl.models.policy import Policy, TokenStatistics, shard_by_layer
from lit_specrl.models.pretrained import check_model_exists, disable_dropout, load_pretrained
from lit_specrl.models.scorer import Scorer


def default_critic_optimizer(parameters: Any) -> torch.optim.Optimizer:
    """AdamW at 1e-5 without weight decay."""
    return torch.optim.AdamW(parameters, lr=1e-5, betas=(0.9, 0.999), weight_decay=0.0, fused=True)


class ValueHead(nn.Module):
    """One linear unit on the hidden state before each response token.

    Begins at zero, so that the first advantages are the returns themselves. Computes in float32 whatever autocast says:
    bf16 values have three digits, which is less than the advantages that are told apart by them.

    Args:
        hidden_size: H.
        detach: keep the gradient from the hidden states; the head then learns alone.
    """

    def __init__(self, hidden_size: int, detach: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.detach = detach

    def forward(self, hidden: Tensor, response_mask: Tensor) -> Tensor:
        """Values before each response token.

        Args:
            hidden: [N, R, H].
            response_mask: [N, R] bool, True on response tokens.

        Returns:
            [N, R] float32, 0 on padding.
        """
        hidden = hidden.detach() if self.detach else hidden
        with torch.autocast(hidden.device.type, enabled=False):
            values = nn.functional.linear(hidden.float(), self.linear.weight.float(), self.linear.bias.float())
        return values.squeeze(-1).masked_fill(~response_mask, 0)


class Critic(nn.Module, ABC):
    """The value model of PPO: how it learns. Subclasses say what it is, and where its values come from.

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

    updates_with_policy: bool
    """Its values come out of the policy's forward pass, and its loss is added to the policy's; otherwise it has passes
    and updates of its own."""

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

    def check_files(self) -> None:
        """Refuse a model of its own that cannot be had, before anything is loaded.

        Raises:
            ValueError: it cannot be had, or is not whole.
        """

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

    @abstractmethod
    def values(self, statistics: TokenStatistics | None, scorer: Scorer, experience: Experience) -> Tensor:
        """Values before each response token, [N, R].

        Args:
            statistics: of the policy's forward pass over all rows, where the critic `updates_with_policy`.
            scorer: runs forward passes.
            experience: N rows.
        """

    def begin_update(self, policy: Policy, is_warm_up: bool) -> None:
        """Called before the passes of a policy update; in the warm-up the policy's weights stay as they are."""

    def add_loss(
        self, loss: Tensor, statistics: TokenStatistics, part: Experience, weights: Tensor
    ) -> tuple[Tensor, CriticStatistics | None]:
        """The policy's loss with that of the critic, where it `updates_with_policy`; and what to report.

        Args:
            loss: scalar.
            statistics: of the policy's forward pass, with gradient.
            part: its n rows.
            weights: [n, R] of each token in the value loss.
        """
        return loss, None

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

    updates_with_policy = False

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

    def check_files(self) -> None:
        if self.model is not None:
            check_model_exists(self.model)
            check_weights(self.model)

    def build(self, policy: Policy, model: str, compile_layers: bool = False, **options: Any) -> None:
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
        if compile_layers:
            compiled_layers.compile_layers(self.backbone)
        self.head = ValueHead(self.backbone.config.get_text_config().hidden_size)

    def trained_parameters(self, policy: Policy) -> Iterator[nn.Parameter]:
        return self.parameters()

    def shard(self, **options: Any) -> None:
        shard_by_layer(self, self.backbone.layers, self.head, **options)

    def forward(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        prompt_index: Tensor,
        response_ids: Tensor,
        response_mask: Tensor,
        share_prompts: bool = False,
        layout: Layout | None = None,
    ) -> Tensor:
        """Values before each response token, [N, R]; arguments as those of `Policy`."""
        batch = TokenBatch(prompt_ids, prompt_mask, prompt_index, response_ids, response_mask)
        share_prompts = share_prompts and self.keeps_cache_by_row
        states = forward_hidden_states(self.backbone, batch, share_prompts, layout=layout)
        return self.head(states.last, response_mask)

    def values(self, statistics: TokenStatistics | None, scorer: Scorer, experience: Experience) -> Tensor:
        return scorer.token_values(self, experience)


class SharedTrunkCritic(Critic):
    """A value head on the policy's own hidden states.

    Costs next to nothing: values come out of the pass that gives the log-probs, and their loss is added to the
    policy's. Its gradient reaches the policy's weights, which is why it is weighted down. During the warm-up the head
    learns alone.

    Args:
        coefficient: weight of the value loss in the sum (`vf_coef` of TRL).
        optimizer: makes the optimizer from the parameters of the head.
        lr_scheduler: makes its learning rate schedule; stepped once per step. `None` keeps the rate constant.
        warmup_steps: first steps of a run in which only the head learns.
        cliprange_value: how far a value may move from its old one before its loss stops falling, in units of reward;
            `None` for the plain squared error.
        max_grad_norm: the head's gradient is scaled down to this norm.
    """

    updates_with_policy = True

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

    def values(self, statistics: TokenStatistics | None, scorer: Scorer, experience: Experience) -> Tensor:
        assert statistics is not None and statistics.values is not None
        return statistics.values

    def begin_update(self, policy: Policy, is_warm_up: bool) -> None:
        assert isinstance(policy.value_head, ValueHead)
        policy.value_head.detach = is_warm_up

    def add_loss(
        self, loss: Tensor, statistics: TokenStatistics, part: Experience, weights: Tensor
    ) -> tuple[Tensor, CriticStatistics | None]:
        assert statistics.values is not None
        per_token_loss, found = self.loss(statistics.values, part)  # [n, R]
        return loss + self.coefficient * (per_token_loss * weights).sum(), found


def build_models(
    model: str,
    options: dict[str, Any],
    *,
    lora: dict[str, Any] | None,
    critic: Critic | None,
    with_reference: bool,
    sharding: dict[str, Any] | None,
) -> tuple[Policy, Policy | None]:
    """The policy, its critic's weights, and the policy before training.

    Args:
        model: hub name or local folder of the policy.
        options: as those of `Policy.build`.
        lora: as that of `Policy.build`; the reference is then the policy without adapters.
        critic: is built; `None` without one.
        with_reference: whether a reference is wanted.
        sharding: arguments of `Policy.shard`; `None` for whole models.

    Returns:
        Policy and reference; `None` where it is not wanted, or is the policy without adapters.
    """
    policy, reference = Policy.build(model, lora=lora, **options), None
    if critic is not None:
        critic.build(policy, model, **options)
    if with_reference and lora is None:
        reference = Policy.build(model, **{**options, "gradient_checkpointing": False})
        reference.requires_grad_(False).eval()
    if sharding is not None:
        for shardable in (policy, reference, critic):
            if shardable is not None:
                shardable.shard(**sharding)
    return policy, reference
