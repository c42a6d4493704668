"""Who proposes tokens to the engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from transformers import PretrainedConfig

from lit_specrl.policy import check_model_exists


class Drafter(ABC):
    """Proposes tokens that the engine verifies; exact, whatever is proposed.

    Args:
        num_speculative_tokens: longest draft, K. `AdaptiveScheduler` chooses among 0 to K.
    """

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
        """Whether it can draft for a policy of this configuration; nothing is loaded.

        Raises:
            ValueError: it cannot.
        """


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
        return {"method": "custom_class", "model": "lit_specrl.rollout.vllm_proposers.NGramProposer"}


class HistoryDrafter(Drafter):
    """Proposes what the prompt's earlier responses said after the same words; see `TextHistory`.

    A row first reads on in its own last response (behind the verified prefix, where there is a `PrefixCache`), after a rejection in
    whichever response of its group agrees longest with what it has said since.

    Args:
        num_speculative_tokens: longest draft.
    """

    def __init__(self, num_speculative_tokens: int = 4) -> None:
        super().__init__(num_speculative_tokens)

    def vllm_config(self) -> dict[str, Any]:
        return {"method": "custom_class", "model": "lit_specrl.rollout.vllm_proposers.HistoryProposer"}


class DraftModel(Drafter):
    """A small causal language model with the policy's vocabulary.

    Its proposals are sampled, and accepted with probability `min(1, target / draft)`.

    Args:
        model: hub name or folder in the transformers format.
        num_speculative_tokens: longest draft.
    """

    def __init__(self, model: str, num_speculative_tokens: int = 3) -> None:
        super().__init__(num_speculative_tokens)
        self.model = model

    def vllm_config(self) -> dict[str, Any]:
        return {"method": "draft_model", "model": self.model, "draft_sample_method": "probabilistic"}

    def check(self, policy: PretrainedConfig) -> None:
        own, theirs = (config.get_text_config().vocab_size for config in (check_model_exists(self.model), policy))
        if own != theirs:
            raise ValueError(
                f"the draft model {self.model} has a vocabulary of {own} tokens, the policy one of {theirs}; "
                "take a model with the policy's tokenizer"
            )
