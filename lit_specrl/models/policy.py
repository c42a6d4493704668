"""The policy: a causal language model that reports the log-probs of given responses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_specrl.distributed.collectives import compute_device, whole_tensor
from lit_specrl.experience import Layout, TokenBatch
from lit_specrl.models import compiled_layers
from lit_specrl.models.hidden_states import HiddenStates, forward_hidden_states, keeps_cache_by_row
from lit_specrl.models.logprobs import token_logprobs
from lit_specrl.models.lora import adapted_layers, add_adapters, lora_config, merged_weight
from lit_specrl.models.policy_check import check_logprobs
from lit_specrl.models.pretrained import disable_dropout, load_pretrained
from lit_specrl.models.saved_names import saved_weights

ObserveStates = Callable[[HiddenStates, Tensor], None]
"""Called inside a forward pass with its hidden states and the rows of the output head, [V, H]."""


class TokenStatistics(NamedTuple):
    """What the policy says about given response tokens."""

    logprobs: Tensor
    """[N, R] float32, nats, 0 on padding."""
    entropy: Tensor
    """[N, R] float32, nats, 0 on padding; without gradient."""
    values: Tensor | None = None
    """[N, R] float32, of the value head, 0 on padding; `None` without one."""


class Policy(nn.Module):
    """A causal language model whose forward pass returns token log-probs of responses.

    Args:
        model: a transformers causal language model.

    Raises:
        ValueError: the log-probs of a short input are not those of the model's own logits.

    Example::

        policy = Policy.build("HuggingFaceTB/SmolLM2-135M-Instruct")
        out = policy(prompt_ids, prompt_mask, prompt_index, response_ids, response_mask)
        out.logprobs  # [N, R]
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.value_head: nn.Module | None = None
        """Set where a critic shares the trunk of the policy."""
        self.is_compiled = False
        disable_dropout(model)
        check_logprobs(model, self)
        self.keeps_cache_by_row = keeps_cache_by_row(cast(PreTrainedModel, model.base_model))
        """False for models whose cache cannot be repeated or selected by row, such as those with linear attention."""

    @classmethod
    def build(
        cls,
        name_or_path: str,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = None,
        lora: dict[str, Any] | None = None,
        compile_layers: bool = False,
    ) -> Policy:
        """Load a policy from the hub or a local folder.

        Args:
            name_or_path: hub name or folder in the transformers format.
            dtype: dtype of the model's weights; "float32" unless memory forbids it.
            gradient_checkpointing: recompute activations in the backward pass.
            attn_implementation: as in transformers ("sdpa", "flash_attention_2", "eager").
            lora: freeze the model and train adapters; arguments of `lora_config`.
            compile_layers: compile the decoder layers.

        Raises:
            ValueError: the model can neither be found locally nor fetched, or `lora` asks for what cannot be had.
        """
        adapters = None if lora is None else lora_config(lora)
        model = load_pretrained(AutoModelForCausalLM, name_or_path, dtype, gradient_checkpointing, attn_implementation)
        if adapters is not None:
            add_adapters(model, adapters)
        policy = cls(model)
        if compile_layers:
            compiled_layers.compile_layers(model.base_model)
            policy.is_compiled = True
        return policy

    @property
    def device(self) -> torch.device:
        """Where it computes, also where its weights wait on the host."""
        return compute_device(next(self.model.parameters()))

    @property
    def eos_token_ids(self) -> set[int]:
        """Token ids that end a response, from the model's generation config."""
        ids = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ids = ids if ids is not None else self.model.config.get_text_config().eos_token_id
        return set(ids if isinstance(ids, list) else [] if ids is None else [ids])

    @property
    def can_share_prompts(self) -> bool:
        """False where the prompt's keys and values cannot be kept for the responses."""
        return self.keeps_cache_by_row and not self.model.is_gradient_checkpointing and not self.is_compiled

    def forward(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        prompt_index: Tensor,
        response_ids: Tensor,
        response_mask: Tensor,
        temperature: float = 1.0,
        share_prompts: bool = False,
        observe: ObserveStates | None = None,
        observed_layers: Sequence[int] = (),
        layout: Layout | None = None,
    ) -> TokenStatistics:
        """Log-probs and entropies of responses, and values where there is a value head.

        Args:
            prompt_ids: [B, P] long, left-padded.
            prompt_mask: [B, P] bool, True on prompt tokens.
            prompt_index: [N] long, the prompt of each row.
            response_ids: [N, R] long, right-padded.
            response_mask: [N, R] bool, True on response tokens.
            temperature: the log-probs are those of `softmax(logits / temperature)`.
            share_prompts: compute each prompt once and let its responses attend to its keys and values, instead of
                once per response. Values and gradients are those of the plain pass.
            observe: is given the hidden states.
            observed_layers: decoder layers whose inputs it is given, too.
            layout: of the rows, with which the host never waits for the device; `None` reads it from the tensors.
        """
        batch = TokenBatch(prompt_ids, prompt_mask, prompt_index, response_ids, response_mask)
        layout = layout or Layout.of(batch)
        backbone = cast(PreTrainedModel, self.model.base_model)
        is_plain = not self.is_compiled or not (share_prompts or observed_layers)
        with nullcontext() if is_plain else compiled_layers.uncompiled():
            states = forward_hidden_states(backbone, batch, share_prompts, observed_layers, layout)
        hidden = states.last  # [N, R, H]
        head = self.model.get_output_embeddings().weight
        if observe is not None:
            observe(states, head)
        # [T] places of the response tokens among all N * R; their number is known, so that nobody has to ask for it
        places = response_mask.flatten().nonzero_static(size=layout.num_tokens).squeeze(-1)
        flat_logprobs, flat_entropy = token_logprobs(
            hidden.flatten(0, 1).index_select(0, places), head, response_ids.flatten()[places], temperature
        )
        empty = torch.zeros(response_ids.numel(), dtype=torch.float32, device=response_ids.device)
        shape = response_ids.shape
        return TokenStatistics(  # copies, since FSDP2 warns of modules that return views
            logprobs=empty.index_copy(0, places, flat_logprobs).view(shape).clone(),
            entropy=empty.index_copy(0, places, flat_entropy).view(shape).clone(),
            values=None if self.value_head is None else self.value_head(hidden, response_mask),
        )

    def shard(self, **options: Any) -> None:
        """Shard every decoder layer, then the rest (FSDP2), on the device of the mesh; no device ever holds more of the
        whole model than a layer, or what is outside the layers.

        Args:
            options: arguments of `torch.distributed.fsdp.fully_shard`, see `lit_specrl.distributed.fsdp2.sharding`.
        """
        layers: Any = self.model.base_model.layers  # type: ignore[union-attr]
        shard_by_layer(self, layers, self.value_head, **options)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, keys and values can be kept: gradient checkpointing, where it is on, would switch the cache off in
        training mode, and compiled layers would compile for each length of it."""
        was_training = self.training
        self.eval()
        try:
            with compiled_layers.uncompiled() if self.is_compiled else nullcontext():
                yield
        finally:
            self.train(was_training)

    @contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        """Inside, the policy is the model that its adapters were added to, bit for bit.

        Raises:
            ValueError: the policy has no adapters.
        """
        if not adapted_layers(self.model):
            raise ValueError("the policy has no adapters to disable; build it with lora={...}")
        self.model.disable_adapters()
        try:
            yield
        finally:
            self.model.enable_adapters()

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Weights as `save_pretrained` writes them, one whole tensor at a time (shards are gathered as they are asked
        for); a layer at a time where its experts are one tensor.

        Adapters are merged into the weights that they adapt.
        """
        return saved_weights(self.model, named_weights(self.model))

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write the model in the transformers format; where there are adapters, these alone in the format of peft."""
        self.model.save_pretrained(folder, **options)


def named_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Weights under their names in the model, one whole tensor at a time, with adapters merged into them."""
    adapted = adapted_layers(model)
    for name, parameter in model.named_parameters():
        path, _, leaf = name.partition(".base_layer.")
        if leaf == "weight":
            yield f"{path}.weight", merged_weight(adapted[path])
        elif leaf:
            yield f"{path}.{leaf}", whole_tensor(parameter)
        elif ".lora_" not in name:
            yield name, whole_tensor(parameter)


def shard_by_layer(module: nn.Module, layers: nn.ModuleList, head: nn.Module | None, **options: Any) -> None:
    """Shard each layer of `module`, its head of values, which stays float32, and what is left of it (FSDP2)."""
    for layer in layers:
        fully_shard(layer, **options)
    if head is not None:
        fully_shard(head, **{name: value for name, value in options.items() if name != "mp_policy"})
    fully_shard(module, **options)


def release(module: nn.Module) -> None:
    """After a forward pass that no backward pass will follow: give up the whole weights that sharded modules keep for
    it."""
    if isinstance(module, FSDPModule):
        module.reshard()
