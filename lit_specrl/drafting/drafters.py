"""Drafters: what proposes tokens to the engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lit_specrl.checkpoints.locks import ProcessFolder
from lit_specrl.drafting.drafts import Drafts, from_lists
from lit_specrl.drafting.eagle3 import (
    build_head,
    check_architecture,
    check_drafter_files,
    check_head,
    draft_vocabulary,
    save_head,
)
from lit_specrl.drafting.history import HistoryReader, RolloutTexts, RowHistory
from lit_specrl.drafting.networks import CausalNetwork, DraftNetwork, Eagle3Network
from lit_specrl.drafting.ngram import NGramReader
from lit_specrl.drafting.scheduler.draft_chances import DraftChances
from lit_specrl.models.model_files import check_weights
from lit_specrl.models.pretrained import check_model_exists, load_pretrained


class Drafter(ABC):
    """Proposes tokens, which the engine accepts or rejects; exact, whatever is proposed.

    Args:
        num_speculative_tokens: longest draft, K. `AdaptiveScheduler` chooses among 0 to K.
    """

    reads_past_responses: bool = False
    """Whether it looks into earlier responses to the prompt, which a `PrefixCache` keeps."""
    needs_past_responses: bool = False
    """Whether it has nothing to say without them."""

    def __init__(self, num_speculative_tokens: int) -> None:
        if num_speculative_tokens < 1:
            raise ValueError(
                f"num_speculative_tokens must be at least 1, got {num_speculative_tokens}; leave the drafter out for "
                "none"
            )
        self.num_speculative_tokens = num_speculative_tokens

    @abstractmethod
    def vllm_config(self) -> dict[str, Any]:
        """What `vllm.LLM` takes as `speculative_config`, without the number of tokens."""

    def check(self, policy: PretrainedConfig) -> None:
        """Refuse a policy that it cannot draft for, by its configuration, before anything is generated.

        Raises:
            ValueError: the drafter does not fit.
        """

    def prepare(self, model: str) -> None:
        """Make the files that the engine will load, where they are made from the policy.

        Called before the engine starts, and maybe again. The files do not depend on how far the policy has been
        trained.

        Args:
            model: hub name or folder that the policy was built from.
        """

    def state_dict(self) -> dict[str, Any]:
        """What it has learnt from rollouts, for checkpoints; weights have files of their own."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was learnt."""

    def origin(self) -> dict[str, Any]:
        """`DraftModel` or `Eagle3Drafter`, as `kind`, and the arguments with which it makes the same untrained network.

        `lit-specrl export --drafter` makes it again; other kinds it refuses.
        """
        return {"kind": type(self).__name__}

    def network(self) -> DraftNetwork:
        """The network that drafts, for training; after `prepare`.

        Raises:
            ValueError: there is none.
        """
        raise ValueError(
            f"{type(self).__name__} has no weights that could learn; take Eagle3Drafter or DraftModel, or leave "
            "DrafterDistillation out"
        )


class TokenReader(Protocol):
    """Proposes tokens for one row while it is generated."""

    def propose(self, token_ids: Sequence[int], length: int) -> Sequence[int]:
        """Tokens that may follow; see `LookUpDrafter.propose`."""


class RolloutReader(Protocol):
    """Proposes tokens for the rows of a rollout while they are generated."""

    def propose(self, rows: NDArray[Any], token_ids: NDArray[Any], num_tokens: NDArray[Any], length: int) -> Drafts:
        """What may follow in each row; asked after every step, also where nothing is wanted.

        Args:
            rows: [n] rows of the rollout.
            token_ids: [n, T] prompt and response of each, and anything behind them; to be read only.
            num_tokens: [n] tokens of prompt and response.
            length: tokens wanted.
        """


class LookUpDrafter(Drafter):
    """A drafter without weights: it looks tokens up in what it is shown.

    A drafter of one's own needs `propose` alone, and is chosen by its `class_path`. Override `reader` where a row keeps
    a state from step to step, such as an index of its tokens.

    Args:
        num_speculative_tokens: longest draft.

    Example: repeat the last token.

        >>> class Stutter(LookUpDrafter):
        ...     def propose(self, token_ids, length):
        ...         return [token_ids[-1]] * length
        >>> Stutter(num_speculative_tokens=2).propose([5, 6], 2)
        [6, 6]
    """

    min_chance: float = 0.0
    """Least chance of acceptance with which a token is drafted where nothing compares it with its price."""

    def __init__(self, num_speculative_tokens: int = 3) -> None:
        super().__init__(num_speculative_tokens)

    @cached_property
    def chances(self) -> DraftChances:
        """What its drafts have brought, over all rollouts."""
        return DraftChances()

    def state_dict(self) -> dict[str, Any]:
        return {"chances": self.chances.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.chances.load_state_dict(state_dict["chances"])

    @abstractmethod
    def propose(self, token_ids: Sequence[int], length: int) -> Sequence[int]:
        """Up to `length` tokens that may follow; empty where there is nothing to go by.

        Args:
            token_ids: [T] prompt and response of one row so far; in the engine a numpy array, to be read only.
            length: tokens wanted.
        """

    def reader(self, history: RowHistory | None) -> TokenReader:
        """What proposes for one row until its response ends.

        Args:
            history: earlier responses to the row's prompt, for drafters that say `reads_past_responses`; `None` where
                there are none.
        """
        return self

    def rollout_reader(self, texts: RolloutTexts) -> RolloutReader:
        """What proposes for all rows of a rollout; by default `reader`, row by row."""
        return _RowByRow(self, texts)

    def vllm_config(self) -> dict[str, Any]:
        return {"method": "custom_class", "model": "lit_specrl.engines.vllm.proposers.LookUpProposer"}


class NGramDrafter(LookUpDrafter):
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

    def propose(self, token_ids: Sequence[int], length: int) -> list[int]:
        return self.reader().propose(token_ids, length)

    def reader(self, history: RowHistory | None = None) -> NGramReader:
        return NGramReader(self.min_match, self.max_match)


class HistoryDrafter(LookUpDrafter):
    """Proposes the tokens that followed the same words in other responses to the prompt; see `HistoryReader`.

    A row first reads on in its own last response (behind the verified prefix, where there is a `PrefixCache`). After a
    rejection it reads on where another text agrees best with its last 16 tokens; a few of these may differ. The texts
    are the earlier responses of its group, and with `siblings` what the rows of the group, finished or not, have said
    in this rollout, with the row's own words and the prompt: these are there from the first epoch on.

    RhymeRL (He et al. 2025, arXiv 2508.18588) drafts from earlier responses in the same spirit, by a tree of suffixes;
    Seer (2025, arXiv 2511.14617) from the running group. A match of two tokens makes a candidate, as there; whether
    it is used depends on what drafts with such a match have brought, in this row, its group and altogether.

    Args:
        num_speculative_tokens: longest draft.
        siblings: read this rollout's responses and the prompt, too; False for earlier responses alone, which need a
            `PrefixCache`.
        min_chance: least chance of acceptance, from 0 to 1, with which a token is drafted where no `AdaptiveScheduler`
            compares it with its price.
    """

    reads_past_responses = True

    def __init__(self, num_speculative_tokens: int = 4, siblings: bool = True, min_chance: float = 0.3) -> None:
        super().__init__(num_speculative_tokens)
        if not 0 <= min_chance <= 1:
            raise ValueError(f"min_chance must lie in [0, 1], got {min_chance}")
        self.siblings, self.min_chance = siblings, min_chance
        self.needs_past_responses = not siblings

    def propose(self, token_ids: Sequence[int], length: int) -> list[int]:
        return []  # of a single row nothing is known

    def rollout_reader(self, texts: RolloutTexts) -> RolloutReader:
        return HistoryReader(texts, self.siblings)


class DraftModel(Drafter):
    """A small causal language model with the policy's vocabulary.

    Args:
        model: hub name or folder in the transformers format.
        num_speculative_tokens: longest draft.
        sampled: drafted tokens are samples, accepted with probability `min(1, target / draft)`. False: they are the
            most likely tokens. At a temperature of 1 fewer are accepted, but on a CPU the rollouts are then those
            without drafts, up to rounding (see `SpeculativeRollout`).
    """

    def __init__(self, model: str, num_speculative_tokens: int = 3, sampled: bool = True) -> None:
        super().__init__(num_speculative_tokens)
        self.model, self.sampled = model, sampled

    def vllm_config(self) -> dict[str, Any]:
        return {"method": "draft_model", "model": self.model, "draft_sample_method": _draft_sampling(self.sampled)}

    def origin(self) -> dict[str, Any]:
        return {"kind": "DraftModel", "model": self.model}

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
        model: hub name or folder of a head, such as `lit-specrl drafter` makes; `None` for a new one, whose drafts are
            useless until `DrafterDistillation` has trained it.
        num_speculative_tokens: longest draft.
        vocabulary_size: tokens that a new head can draft; `None` for 4096. Those with the lowest ids, unless `build` is
            given counts.
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
        self._num_policy_layers: int | None = None

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
        self._num_policy_layers = check_model_exists(model).get_text_config().num_hidden_layers
        if self.model is None:
            self._own_folder = ProcessFolder("drafter")
            folder = Path(self._own_folder.name) / "drafter"
            policy = load_pretrained(AutoModelForCausalLM, model)
            self.model = self.build(
                policy, model, folder, None, self.vocabulary_size, self.num_speculative_tokens
            ).model

    def origin(self) -> dict[str, Any]:
        model = None if self._own_folder else self.model
        return {"kind": "Eagle3Drafter", "model": model, "vocabulary_size": self.vocabulary_size}

    def network(self) -> DraftNetwork:
        assert self.model is not None, "`prepare` makes it"
        return Eagle3Network.load(self.model, self._num_policy_layers)


class _RowByRow:
    """Asks a reader of each row."""

    def __init__(self, drafter: LookUpDrafter, texts: RolloutTexts) -> None:
        self._drafter, self._texts = drafter, texts
        self._readers: dict[int, TokenReader] = {}

    def propose(self, rows: NDArray[Any], token_ids: NDArray[Any], num_tokens: NDArray[Any], length: int) -> Drafts:
        if not length:
            return from_lists([[]] * len(rows))
        return from_lists(
            [
                self._reader(row).propose(tokens[:count], length)[:length]
                for row, tokens, count in zip(rows.tolist(), token_ids, num_tokens.tolist(), strict=True)
            ]
        )

    def _reader(self, row: int) -> TokenReader:
        if row not in self._readers:
            history = self._texts.row(row) if self._drafter.reads_past_responses else None
            self._readers[row] = self._drafter.reader(history)
        return self._readers[row]


def _draft_sampling(sampled: bool) -> str:
    return "probabilistic" if sampled else "greedy"
