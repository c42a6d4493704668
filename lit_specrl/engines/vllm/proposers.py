"""Drafters that look tokens up, inside vLLM: loaded by it under the names of these classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from lit_specrl.drafting.drafters import Drafter, NGramDrafter
from lit_specrl.drafting.history import HistoryReader, TextHistory
from lit_specrl.drafting.ngram import PromptLookup


@dataclass(frozen=True)
class Following:
    """What a row may read on in, for `HistoryDrafter`."""

    history: TextHistory
    own_text: int | None
    """The row's own last response among the texts."""
    prompt_length: int


class LookUpProposer(ABC):
    """vLLM's interface of a custom proposer (`speculative_config` with `method="custom_class"`).

    Args:
        vllm_config: of the engine.
    """

    drafter: Drafter
    """What it shall do; set before the first step."""
    batch: Any
    """vLLM's input batch, which knows the request behind each row; set before the first step."""

    def __init__(self, vllm_config: Any) -> None:
        self.length: int = vllm_config.speculative_config.num_speculative_tokens
        """Tokens to propose; vLLM tells other proposers in each step, but not these."""

    def load_model(self, *arguments: Any, **options: Any) -> None:
        """Nothing to load."""

    def propose(
        self, sampled_token_ids: list[list[int]], num_tokens_no_spec: Any, token_ids_cpu: Any, **options: Any
    ) -> list[list[int]]:
        """Drafts for each row of the batch; empty for rows that are still prefilled or have nothing to go by.

        Args:
            sampled_token_ids: [N] ragged, what the step has emitted.
            num_tokens_no_spec: [N] tokens of prompt and response, with these.
            token_ids_cpu: [N, max_model_len] the tokens.
            options: more that vLLM hands over.
        """
        return [
            self.propose_for(self.batch.req_ids[row], token_ids_cpu[row, : num_tokens_no_spec[row]]) if emitted else []
            for row, emitted in enumerate(sampled_token_ids)
        ]

    @abstractmethod
    def propose_for(self, request: str, token_ids: Any) -> list[int]:
        """Up to `length` tokens that may follow.

        Args:
            request: vLLM's name of the request.
            token_ids: [T] its prompt and response.
        """

    @abstractmethod
    def forget(self) -> None:
        """All requests have ended."""


class NGramProposer(LookUpProposer):
    """`NGramDrafter`. vLLM's own is compiled by numba, which keeps vLLM 0.32 from starting a second engine in the process."""

    def __init__(self, vllm_config: Any) -> None:
        super().__init__(vllm_config)
        self._texts: dict[str, PromptLookup] = {}

    def propose_for(self, request: str, token_ids: Any) -> list[int]:
        text = self._texts.get(request)
        if text is None:
            assert isinstance(self.drafter, NGramDrafter)
            text = self._texts[request] = PromptLookup(self.drafter.min_match, self.drafter.max_match)
        text.extend(token_ids[len(text) :].tolist())
        return text.propose(self.length)

    def forget(self) -> None:
        self._texts.clear()


class HistoryProposer(LookUpProposer):
    """`HistoryDrafter`."""

    def __init__(self, vllm_config: Any) -> None:
        super().__init__(vllm_config)
        self._followers: dict[
            str, tuple[HistoryReader, int]
        ] = {}  # request -> (who reads beside it, length of its prompt)

    def follow(self, request: str, following: Following) -> None:
        """Read on in a history beside a request."""
        self._followers[request] = HistoryReader(following.history, following.own_text), following.prompt_length

    def propose_for(self, request: str, token_ids: Any) -> list[int]:
        name, _, _ = request.rpartition("-")  # vLLM has appended a suffix of its own
        if name not in self._followers:
            return []
        follower, prompt_length = self._followers[name]
        return follower.propose(token_ids[prompt_length:], self.length)

    def forget(self) -> None:
        self._followers.clear()
