"""Who proposes tokens to the engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lit_specrl.checkpoints.locks import ProcessFolder
from lit_specrl.drafting.eagle3 import (
    build_head,
    check_architecture,
    check_drafter_files,
    check_head,
    draft_vocabulary,
    save_head,
)
from lit_specrl.drafting.networks import CausalNetwork, DraftNetwork, Eagle3Network
from lit_specrl.models.model_files import check_weights
from lit_specrl.models.policy import check_model_exists, load_pretrained


class Drafter(ABC):
    """Proposes tokens that the engine verifies; exact, whatever is proposed.

    Args:
        num_speculative_tokens: longest draft, K. `AdaptiveScheduler` chooses among 0 to K.
    """

    reads_past_responses: bool = False
    """Whether it looks into earlier responses to the prompt, which a `PrefixCache` keeps."""

    def __init__(self, num_speculative_tokens: int) -> None:
        if num_speculative_tokens < 1:
            raise ValueError(
                f"num_speculative_tokens must be at least 1, got {num_speculative_tokens}; leave the drafter out for none"
            )
        self.num_speculative_tokens = num_speculative_tokens

    @abstractmethod
    def vllm_config(self) -> dict[str, Any]:
        """What `vllm.LLM` takes as `speculative_config`, without the number of tokens."""

    def check(self, policy: PretrainedConfig) -> None:
        """Whether it can draft for a policy of this configuration, before anything is generated.

        Raises:
            ValueError: it cannot.
        """

    def prepare(self, model: str) -> None:
        """Make what the engine will load, where it is made from the policy; called before the engine starts, and maybe again.

        Args:
            model: hub name or folder that the policy was built from. What is made is the same, however far the policy has been trained.
        """

    def origin(self) -> dict[str, Any]:
        """The class, as `kind`, and the arguments that make the same network again, as it was before any training."""
        return {"kind": type(self).__name__}

    def network(self) -> DraftNetwork:
        """The network that drafts, for training; after `prepare`.

        Raises:
            ValueError: there is none.
        """
        raise ValueError(
            f"{type(self).__name__} has no weights that could learn; take Eagle3Drafter or DraftModel, or leave DrafterDistillation out"
        )


class NGramDrafter(Drafter):
    """Looks up the last words in prompt and response, and proposes what followed them there.

    Args:
        num_speculative_tokens: longest draft.
        min_match: tokens that must agree.
        max_match: tokens that are tried first.
    """

    def __init__(self, num_speculative_tokens: int = 3, min_match: int = 2, max_match: int = 4) -> None:
        super().__init__(num_speculative_tokens)
        if not 1 <= min_match <= max_match:
            raise ValueError(f"1 <= min_match <= max_match is needed, got {min_match} and {max_match}")
        self.min_match, self.max_match = min_match, max_match

    def vllm_config(self) -> dict[str, Any]:
        return {"method": "custom_class", "model": "lit_specrl.engines.vllm.proposers.NGramProposer"}


class HistoryDrafter(Drafter):
    """Proposes what the prompt's earlier responses said after the same words; see `TextHistory`.

    A row first reads on in its own last response (behind the verified prefix, where there is a `PrefixCache`), after a rejection where
    a response of its group agrees best with its last 16 tokens; a few of these may differ.

    Args:
        num_speculative_tokens: longest draft.
    """

    def __init__(self, num_speculative_tokens: int = 4) -> None:
        super().__init__(num_speculative_tokens)

    def vllm_config(self) -> dict[str, Any]:
        return {"method": "custom_class", "model": "lit_specrl.engines.vllm.proposers.HistoryProposer"}


class DraftModel(Drafter):
    """A small causal language model with the policy's vocabulary.

    Args:
        model: hub name or folder in the transformers format.
        num_speculative_tokens: longest draft.
        sampled: its proposals are samples, accepted with probability `min(1, target / draft)`. False: they are its most likely tokens; at a temperature of 1 fewer are
            accepted, but on a CPU the rollouts are then those without drafts, up to rounding (see `SpeculativeRollout`).
    """

    def __init__(self, model: str, num_speculative_tokens: int = 3, sampled: bool = True) -> None:
        super().__init__(num_speculative_tokens)
        self.model, self.sampled = model, sampled

    def vllm_config(self) -> dict[str, Any]:
        return {"method": "draft_model", "model": self.model, "draft_sample_method": _draft_sampling(self.sampled)}

    def origin(self) -> dict[str, Any]:
        return super().origin() | {"model": self.model}

    def network(self) -> DraftNetwork:
        return CausalNetwork.load(self.model)

    def check(self, policy: PretrainedConfig) -> None:
        check_weights(self.model)
        check_drafter_files(self.model)
        own, theirs = (config.get_text_config().vocab_size for config in (check_model_exists(self.model), policy))
        if own != theirs:
            raise ValueError(
                f"the draft model {self.model} has a vocabulary of {own} tokens, the policy one of {theirs}; "
                "take a model with the policy's tokenizer"
            )


class Eagle3Drafter(Drafter):
    """An EAGLE-3 head on the policy's hidden states (Li et al. 2025, arXiv 2503.01840), in the format of speculators.

    Needs `pip install 'lit_specrl[eagle3]'`.

    Args:
        model: hub name or folder of a head, such as `lit-specrl drafter` makes; `None` for a new one, which proposes nothing of use until
            `DrafterDistillation` has trained it.
        num_speculative_tokens: longest draft.
        vocabulary_size: tokens that a new head can draft; `None` for 4096. Those with the lowest ids, unless `build` is told of counts.
        sampled: as that of `DraftModel`.

    Example::

        SpeculativeRollout(drafter=Eagle3Drafter("drafter", num_speculative_tokens=3))
    """

    def __init__(
        self,
        model: str | None = None,
        num_speculative_tokens: int = 3,
        vocabulary_size: int | None = None,
        sampled: bool = True,
    ) -> None:
        super().__init__(num_speculative_tokens)
        if model is not None and vocabulary_size is not None:
            raise ValueError(f"vocabulary_size={vocabulary_size} is of a new head; {model!r} has its own")
        self.model, self.vocabulary_size, self.sampled = model, vocabulary_size, sampled
        self._own_folder: ProcessFolder | None = None

    @classmethod
    def build(
        cls,
        policy: PreTrainedModel,
        model: str,
        folder: str | Path,
        token_counts: Tensor | None = None,
        vocabulary_size: int | None = None,
        num_speculative_tokens: int = 3,
    ) -> Eagle3Drafter:
        """Grow a head from the policy and save it.

        Args:
            policy: a Llama, Qwen or Mistral-like causal language model, such as `Policy.model`.
            model: its hub name or folder.
            folder: where the head goes.
            token_counts: [V] how often each token was seen in responses to the task; chooses what the head can draft.
            vocabulary_size: tokens that it can draft; `None` for 4096.
            num_speculative_tokens: longest draft.

        Raises:
            ImportError: speculators is missing.
            ValueError: no head can be built for the policy.
        """
        size = policy.config.get_text_config().vocab_size
        counts = torch.zeros(size) if token_counts is None else token_counts
        vocabulary = draft_vocabulary(counts, vocabulary_size)
        head = build_head(policy, model, vocabulary if len(vocabulary) < size else None, num_speculative_tokens)
        save_head(head, folder)
        return cls(str(folder), num_speculative_tokens)

    def vllm_config(self) -> dict[str, Any]:
        assert self.model is not None, "`prepare` makes it"
        return {"method": "eagle3", "model": self.model, "draft_sample_method": _draft_sampling(self.sampled)}

    def check(self, policy: PretrainedConfig) -> None:
        if self.model is None:
            check_architecture(policy.get_text_config())
        else:
            check_head(self.model, policy.get_text_config())

    def prepare(self, model: str) -> None:
        if self.model is None:
            self._own_folder = ProcessFolder("drafter")
            folder = Path(self._own_folder.name) / "drafter"
            policy = load_pretrained(AutoModelForCausalLM, model)
            self.model = self.build(
                policy, model, folder, None, self.vocabulary_size, self.num_speculative_tokens
            ).model

    def origin(self) -> dict[str, Any]:
        model = None if self._own_folder else self.model
        return super().origin() | {"model": model, "vocabulary_size": self.vocabulary_size}

    def network(self) -> DraftNetwork:
        assert self.model is not None, "`prepare` makes it"
        return Eagle3Network.load(self.model)


def _draft_sampling(sampled: bool) -> str:
    return "probabilistic" if sampled else "greedy"
