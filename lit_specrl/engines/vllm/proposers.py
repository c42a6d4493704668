"""Drafters that look tokens up, inside vLLM; it loads the class by its name."""

from __future__ import annotations

from typing import Any

from lit_specrl.drafting.drafters import LookUpDrafter, TokenReader
from lit_specrl.drafting.history import RowHistory


class LookUpProposer:
    """vLLM's interface of a custom proposer (`speculative_config` with `method="custom_class"`), for a `LookUpDrafter`.

    N-grams come from here, too: vLLM's own are compiled by numba, which keeps vLLM 0.32 from starting a second engine
    in the process.

    Args:
        vllm_config: of the engine.
    """

    drafter: LookUpDrafter
    """What proposes; set before the first step."""
    batch: Any
    """vLLM's input batch, which knows the request of each row; set before the first step."""

    def __init__(self, vllm_config: Any) -> None:
        self.length: int = vllm_config.speculative_config.num_speculative_tokens
        """Tokens to propose; vLLM passes it to other proposers in each step, but not to these."""
        self._vocabulary_size: int = vllm_config.model_config.get_vocab_size()
        self._histories: dict[str, RowHistory] = {}  # by vLLM's name of a request
        self._readers: dict[str, TokenReader] = {}

    def load_model(self, *arguments: Any, **options: Any) -> None:
        """Nothing to load."""

    def propose(
        self, sampled_token_ids: list[list[int]], num_tokens_no_spec: Any, token_ids_cpu: Any, **options: Any
    ) -> list[list[int]]:
        """Drafts for each row of the batch; empty for rows that are still prefilled, or where nothing is found.

        Args:
            sampled_token_ids: [N] ragged, tokens that the step has emitted.
            num_tokens_no_spec: [N] tokens of prompt and response, with these.
            token_ids_cpu: [N, max_model_len] the tokens.
            options: more that vLLM hands over.

        Raises:
            ValueError: a token that the policy does not have.
        """
        return [
            self._propose_for(self.batch.req_ids[row], token_ids_cpu[row, : num_tokens_no_spec[row]]) if emitted else []
            for row, emitted in enumerate(sampled_token_ids)
        ]

    def _propose_for(self, request: str, token_ids: Any) -> list[int]:
        if request not in self._readers:
            self._readers[request] = self.drafter.reader(self._histories.get(request))
        drafted = [int(token) for token in self._readers[request].propose(token_ids, self.length)[: self.length]]
        unknown = [token for token in drafted if not 0 <= token < self._vocabulary_size]
        if unknown:
            raise ValueError(
                f"{type(self.drafter).__name__} proposes token {unknown[0]}; token ids are 0 to {self._vocabulary_size - 1}"
            )
        return drafted

    def follow(self, request: str, history: RowHistory) -> None:
        """Let the drafter read past responses beside a request."""
        self._histories[request] = history

    def forget(self) -> None:
        """All requests have ended."""
        self._histories.clear()
        self._readers.clear()
