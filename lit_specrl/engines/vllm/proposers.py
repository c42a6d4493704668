"""Drafters that look tokens up, inside vLLM; it loads the class by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_specrl.drafting.drafters import LookUpDrafter, RolloutReader
from lit_specrl.drafting.drafts import SOURCES, Drafts
from lit_specrl.drafting.history import RolloutTexts

RowLengths = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[Any] | None]
"""As `RowControl.row_lengths`."""


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
        self._rows: dict[str, int] = {}  # vLLM's name of a request -> row of the rollout
        self._reader: RolloutReader | None = None
        self._row_lengths: RowLengths | None = None
        self._latest: tuple[NDArray[Any], Drafts] | None = None  # rows and drafts that the present step verifies
        self.by_source: dict[str, tuple[int, int]] = {}
        """Of the latest step: tokens drafted, and accepted, by where they were read."""

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
        own = [self._rows.get(request, -1) for request in self.batch.req_ids[: len(sampled_token_ids)]]
        counts = np.array([len(emitted) for emitted in sampled_token_ids])
        at = np.flatnonzero((counts > 0) & (np.array(own) >= 0))
        rows = np.array(own)[at]
        self._learn(rows, counts[at] - 1)
        drafted: list[list[int]] = [[]] * len(own)
        if self._reader is None or not len(at):
            return drafted
        num_tokens = num_tokens_no_spec[at]
        token_ids = token_ids_cpu[: len(own)] if len(at) == len(own) else token_ids_cpu[at]  # the latter is a copy
        drafts = self._reader.propose(rows, token_ids, num_tokens, self.length)
        drafts = drafts.cut(self._lengths(rows, drafts))
        self._latest = rows, drafts
        for row, tokens in zip(at.tolist(), drafts.as_lists(), strict=True):
            drafted[row] = tokens
        self._check(drafts)
        return drafted

    def _lengths(self, rows: NDArray[Any], drafts: Drafts) -> NDArray[Any]:
        """[n] tokens of each draft that are worth verifying."""
        if not self.length or (self._row_lengths is None and not self.drafter.min_chance):
            return drafts.lengths
        chances = self.drafter.chances.by_position(rows, drafts, drafts.token_ids.shape[1])
        lengths = (
            None
            if self._row_lengths is None
            else self._row_lengths(chances, self.drafter.chances.remaining_steps(rows, drafts))
        )
        return np.asarray((chances >= self.drafter.min_chance).sum(-1)) if lengths is None else lengths

    def _learn(self, rows: NDArray[Any], accepted: NDArray[Any]) -> None:
        """From the tokens [n] of the drafts of the step before that were accepted; rows that have ended are lost."""
        self.by_source = {}
        if self._latest is None or not len(rows):
            return
        drafted_rows, drafts = self._latest
        self._latest = None
        _, here, before = np.intersect1d(rows, drafted_rows, return_indices=True)
        drafts, accepted = drafts.rows(before), np.minimum(accepted[here], drafts.lengths[before])
        self.drafter.chances.observe(rows[here], drafts, accepted)
        for source in np.unique(drafts.sources[drafts.lengths > 0]).tolist():
            of_source = drafts.sources == source
            counts = int(drafts.lengths[of_source].sum()), int(accepted[of_source].sum())
            self.by_source[SOURCES[source]] = counts

    def _check(self, drafts: Drafts) -> None:
        wanted = np.arange(drafts.token_ids.shape[1]) < drafts.lengths[:, None]
        unknown = wanted & ((drafts.token_ids < 0) | (drafts.token_ids >= self._vocabulary_size))
        if unknown.any():
            raise ValueError(
                f"{type(self.drafter).__name__} proposes token {drafts.token_ids[unknown][0]}; token ids are 0 to "
                f"{self._vocabulary_size - 1}"
            )

    def begin(self, texts: RolloutTexts, row_lengths: RowLengths | None) -> None:
        """A rollout begins, beside which these texts may be read; `row_lengths` chooses what is drafted in each row."""
        self._row_lengths = row_lengths
        self._reader = self.drafter.rollout_reader(texts)
        self.drafter.chances.start(np.arange(texts.num_rows) // texts.num_generations)

    def follow(self, request: str, row: int) -> None:
        """A request generates a row of the rollout."""
        self._rows[request] = row

    def forget(self) -> None:
        """All requests have ended."""
        self._rows.clear()
        self._reader = self._latest = None
