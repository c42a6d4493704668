"""Drafters as networks that can be trained on the policy's outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_specrl.checkpoints.atomic_files import atomic_folder
from lit_specrl.checkpoints.checksums import write_checksums
from lit_specrl.drafting.distillation.buffer import DistillationSample
from lit_specrl.drafting.eagle3 import (
    load_head,
    save_head,
    trained_weights,
    unrolled_states,
    vocabulary_of,
)


class DraftStep(NamedTuple):
    """What a drafter would propose at step s of a draft, at every place of some responses."""

    logits: Tensor
    """[T, V'] over the drafter's vocabulary, not divided by a temperature."""
    rows: Tensor
    """[T] long, the sample of each place."""
    places: Tensor
    """[T] long, the index of the proposed token in its response."""


class DraftNetwork(ABC):
    """A drafter whose weights can be trained, saved, and handed to a running engine.

    Attributes:
        module: holds the weights.
        vocabulary: [V'] long, token ids that it can draft; `None` for all.
        layers: decoder layers of the policy whose inputs it needs.
    """

    module: nn.Module
    vocabulary: Tensor | None = None
    layers: tuple[int, ...] = ()

    @abstractmethod
    def draft_steps(self, samples: Sequence[DistillationSample], num_steps: int) -> Iterator[DraftStep]:
        """Drafts behind every token of the responses, as if all drafts were right (teacher forcing).

        The first token of a response is never drafted: the policy samples it when it reads the prompt.

        Args:
            samples: on the host.
            num_steps: drafted tokens, K; one step for networks that draft the second token as they draft the first.
        """

    @abstractmethod
    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, weight) of everything that training changes, under the names of the saved model."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write the drafter into a folder that vLLM loads, in place of an older one."""

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor], vocabulary: Tensor | None) -> None:
        """Load what `weights` has returned.

        Args:
            weights: by name, on any device.
            vocabulary: [V'] of the drafter that they belong to.

        Raises:
            ValueError: they are of another drafter.
        """
        own = dict(self.weights())
        if {name: weight.shape for name, weight in own.items()} != {name: w.shape for name, w in weights.items()}:
            raise ValueError("the weights are of another drafter: their names or shapes differ")
        if not _same(self.vocabulary, vocabulary):
            raise ValueError("the weights are of another drafter: it drafts other tokens")
        for name, weight in own.items():
            weight.copy_(weights[name])

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that training changes."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device


class Eagle3Network(DraftNetwork):
    """An EAGLE-3 head.

    Args:
        head: from `build_head` or `load_head`.
    """

    def __init__(self, head: Any) -> None:
        self.module: Any = head
        self.vocabulary = vocabulary_of(head)
        self.layers = tuple(head.config.eagle_aux_hidden_state_layer_ids)

    @classmethod
    def load(cls, folder: str, num_layers: int | None = None) -> Eagle3Network:
        """From a folder in the format of speculators; arguments and errors as those of `load_head`."""
        return cls(load_head(folder, num_layers))

    def draft_steps(self, samples: Sequence[DistillationSample], num_steps: int) -> Iterator[DraftStep]:
        dtype = self.module.fc.weight.dtype
        features = _padded([sample.features[:-1].to(dtype) for sample in samples]).to(self.device)  # [N, L, F]
        token_ids = _padded([sample.token_ids[1:-1].long() for sample in samples]).to(self.device)  # [N, L]
        lengths = torch.tensor([len(sample) - 2 for sample in samples])
        mask = (torch.arange(token_ids.shape[1])[None] < lengths[:, None]).to(self.device)
        for step, states in enumerate(unrolled_states(self.module, features, token_ids, mask, num_steps)):
            rows, places = _places(samples, step + 1)
            prompts = torch.tensor([sample.num_prompt_tokens for sample in samples])
            columns = prompts[rows] + places - 2 - step
            drafted = states[rows.to(self.device), columns.to(self.device)]  # [T, H]
            yield DraftStep(self.module.lm_head(drafted), rows, places)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        return trained_weights(self.module)

    def save(self, folder: str | Path) -> None:
        save_head(self.module, folder)


class CausalNetwork(DraftNetwork):
    """A small causal language model with the policy's vocabulary.

    Args:
        model: a transformers causal language model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.module: Any = model

    @classmethod
    def load(cls, name_or_path: str) -> CausalNetwork:
        """From the hub or a folder in the transformers format."""
        return cls(AutoModelForCausalLM.from_pretrained(name_or_path, dtype=torch.float32))

    def draft_steps(self, samples: Sequence[DistillationSample], num_steps: int) -> Iterator[DraftStep]:
        token_ids = _padded([sample.token_ids[:-1].long() for sample in samples]).to(self.device)  # [N, L]
        lengths = torch.tensor([len(sample) - 1 for sample in samples])
        mask = (torch.arange(token_ids.shape[1])[None] < lengths[:, None]).to(self.device)
        states = self.module.base_model(input_ids=token_ids, attention_mask=mask.long(), use_cache=False)
        rows, places = _places(samples, 1)
        prompts = torch.tensor([sample.num_prompt_tokens for sample in samples])
        drafted = states.last_hidden_state[rows.to(self.device), (prompts[rows] + places - 1).to(self.device)]
        yield DraftStep(self.module.get_output_embeddings()(drafted), rows, places)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.module.named_parameters():
            yield name, parameter.detach()

    def save(self, folder: str | Path) -> None:
        with atomic_folder(folder) as partial:
            self.module.save_pretrained(partial)
            write_checksums(partial, partial.glob("*.safetensors"))


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first.cpu(), second.cpu())


def _padded(rows: Sequence[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def _places(samples: Sequence[DistillationSample], first: int) -> tuple[Tensor, Tensor]:
    """Row among the samples [T], and place [T], of all response tokens from the place `first` on."""
    counts = torch.tensor([max(0, sample.num_response_tokens - first) for sample in samples], dtype=torch.long)
    rows = torch.arange(len(counts)).repeat_interleave(counts)  # [T]
    starts = counts.cumsum(0) - counts
    return rows, torch.arange(len(rows)) - starts[rows] + first
