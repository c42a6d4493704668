"""Rollouts that begin with what the policy said last time, as far as it would say it again."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import lightning as L
import xxhash
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lit_specrl.algorithms.rlvr import RLVRModule, require_rlvr_module
from lit_specrl.algorithms.streak_warning import StreakWarning
from lit_specrl.callbacks.rank_store import checkpoint_folder, checkpoints_are_recorded, sweep_rank_files
from lit_specrl.callbacks.rollout_callback import RolloutCallback, require_only_one
from lit_specrl.checkpoints.rank_files import PREFIX_CACHE, RankFiles, load_ranks
from lit_specrl.distributed.collectives import gather_objects
from lit_specrl.drafting import HistoryDrafter
from lit_specrl.engines import TransformersEngine
from lit_specrl.metrics import merge
from lit_specrl.prefix_cache.acceptance import AcceptanceRule, FullReuse, NoReuse, RandomReuse, RatioAcceptance
from lit_specrl.prefix_cache.lenience import AdaptiveLenience
from lit_specrl.prefix_cache.reuse import ReuseRound, control_samples
from lit_specrl.prefix_cache.statistics import ReuseStatistics
from lit_specrl.prefix_cache.store import CachedRollout, RolloutStore
from lit_specrl.seeds import row_uniforms
from lit_specrl.types import Experience, RolloutRequest, Rollouts

Acceptance = Literal["ratio", "sequence", "random", "full", "off"]
_NOT_OF_THE_ARCHITECTURE = {
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype"),
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states"),
}


class PrefixCache(RolloutCallback):
    """Starts each rollout with the verified prefix of the response that the same prompt got last time (SPEC-RL).

    Liu et al. 2025, arXiv 2509.23232. Last epoch's response is scored once under today's policy; tokens are kept while `u < lenience * target /
    draft`, and the policy goes on from the first that is not. Not exact, not even at lenience 1: see `RatioAcceptance`. Validation and test
    always generate afresh.

    Where the policy moves little between two visits of a prompt, a lenience above 1 keeps nearly everything, epoch after epoch, and the policy is
    trained on the same few responses for ever. `max_reuses` renews them; as all prompts are visited equally often, they are renewed in the
    same epoch, which costs less than a few long responses in every step (rows that a control group or `adaptive_lenience` has answered afresh
    in between are renewed later than the others).

    What the verification knows is not computed again: rows that were kept whole bring their rewards, log-probs and reference
    log-probs along and never reach the engine.

    Departs from the paper: uniforms are fresh in every step; `drift_bound` ends the compounding of lenience over epochs, judging by sequence
    that over the tokens of a response; a control group shows what reuse does to the reward.

    Args:
        lenience: factor on the ratio; 1 is the plain ratio test. The paper's best: e^0.5 = 1.65 (GRPO), e^0.3 = 1.35 (PPO),
            e^0.15 = 1.16 (DAPO).
        acceptance: "ratio" tests each token, as in the paper; "sequence" the whole response up to it, so that no text is kept more than `lenience`
            times as often as the policy says it; the paper's baselines "random" (a uniformly random cut) and "full" (everything); or "off", where
            responses are kept for a `HistoryDrafter` alone.
        drift_bound: a token is also rejected when it has lost more than this many nats since it was generated.
        adaptive_lenience: chooses the lenience, and the share of groups that reuse, by how fast the policy moves; then `lenience` is unused.
        max_reuses: how often in a row a response may be a draft before its prompt is answered afresh; `None` for ever.
        control_fraction: share of each group that is generated afresh, to compare rewards with (`prefix_cache/reward_gap`).
        reuse_rewards: take the rewards of rows that were kept whole from the cache. False for rewards that depend on the other rows of
            the group, or are not the same for the same text.
        verifier: "policy" scores cached by the forward pass that training uses; "engine" lets vLLM score them, where a row goes on as soon as it
            is verified and finds its prefix in the engine's KV prefix cache. Temperature 1 only.
        block_length: tokens that are verified at a time; a draft is not looked at beyond the block in which it is rejected. `None` for what has the
            fewest tokens computed where cached are rejected as often as in the step before.
        max_bytes: most memory for cached responses on each rank; the oldest make room.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: from `setup`, for sampling with `top_p` or `top_k`, whose log-probs are not those of the ratio.
    """

    def __init__(
        self,
        lenience: float = 1.0,
        acceptance: Acceptance = "ratio",
        drift_bound: float | None = None,
        adaptive_lenience: AdaptiveLenience | None = None,
        max_reuses: int | None = None,
        control_fraction: float = 0.0,
        reuse_rewards: bool = True,
        verifier: Literal["policy", "engine"] = "policy",
        block_length: int | None = None,
        max_bytes: int = 2**30,
    ) -> None:
        if adaptive_lenience is not None:
            lenience = adaptive_lenience.value
        self.rule = _rule(acceptance, lenience, drift_bound)
        if adaptive_lenience is not None and not isinstance(self.rule, RatioAcceptance):
            raise ValueError(f"adaptive_lenience steers acceptance='ratio' or 'sequence', got {acceptance!r}")
        if max_reuses is not None and max_reuses < 1:
            raise ValueError(f"max_reuses must be at least 1, got {max_reuses}; use acceptance='off' to reuse nothing")
        if not 0 <= control_fraction < 1:
            raise ValueError(f"control_fraction must lie in [0, 1), got {control_fraction}")
        self.adaptive_lenience = adaptive_lenience
        self.max_reuses = math.inf if max_reuses is None else max_reuses
        self.control_fraction = control_fraction
        self.reuse_rewards = reuse_rewards
        if block_length is not None and block_length < 1:
            raise ValueError(f"block_length must be at least 1 token, got {block_length}")
        if verifier not in ("policy", "engine"):
            raise ValueError(f"verifier must be 'policy' or 'engine', got {verifier!r}")
        self.verifier = verifier
        self.block_length = block_length
        self._block_length = block_length or 128
        self.store = RolloutStore(max_bytes)
        self._files = RankFiles(PREFIX_CACHE)
        self._rounds: list[ReuseRound] = []
        self._trained: tuple[Rollouts, Experience]
        self._other_ranks_included = False
        self._drafts_are_useless = StreakWarning(
            5,
            "PrefixCache kept less than 2 % of the cached tokens in {num_steps} steps: verification costs more than it saves. The policy moves "
            "too far between two visits of a prompt; lower the learning rate, raise lenience, or leave PrefixCache out",
        )
        self._responses_are_stale = StreakWarning(
            10,
            "PrefixCache kept more than 98 % of all tokens in {num_steps} steps: the policy learns from the same responses again and again. Set "
            "max_reuses to answer the prompts afresh now and then, or lower lenience",
        )
        self._rewards: list[float] = []  # of the steps since the last validation
        self._validations: list[tuple[float, float]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        sampling = require_rlvr_module(self, pl_module).sampling
        require_only_one(self, trainer)
        if self.verifier == "engine" and sampling.temperature != 1:
            raise MisconfigurationException(
                f"verifier='engine' scores at temperature 1, rollouts are sampled at {sampling.temperature}; use verifier='policy'"
            )
        if sampling.is_truncated and isinstance(self.rule, RatioAcceptance):
            raise MisconfigurationException(
                f"PrefixCache compares log-probs of the whole softmax, but rollouts are sampled with top_p={sampling.top_p} and "
                f"top_k={sampling.top_k}; use top_p=1.0 without top_k, or acceptance='off'"
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._rounds = []

    def on_rollout_start(self, trainer: L.Trainer, pl_module: RLVRModule, request: RolloutRequest) -> None:
        keeps_history = isinstance(getattr(pl_module.engine, "drafter", None), HistoryDrafter)
        if not trainer.training or (isinstance(self.rule, NoReuse) and not keeps_history):
            return
        if keeps_history:
            request.past_responses = self._past_responses(request)
        current = ReuseRound(request, self._find_drafts(request), self.rule)
        if self.verifier == "engine" and self.rule.needs_logprobs:
            current.verify_in_engine(self._block_length)
        else:
            with pl_module.timer("verify"):
                current.verify(partial(pl_module.response_logprobs, block_length=self._block_length))
        request.expected_lengths = current.expected_lengths
        self._rounds.append(current)

    def on_rollout_end(self, trainer: L.Trainer, pl_module: RLVRModule, rollouts: Rollouts) -> None:
        if self._rounds and self._rounds[-1].request is rollouts.request:
            self._rounds[-1].rollouts = rollouts
            rollouts.known = self._rounds[-1].known_rows(self.reuse_rewards, self.verifier == "policy")

    def on_experience_end(
        self, trainer: L.Trainer, pl_module: RLVRModule, rollouts: Rollouts, experience: Experience
    ) -> None:
        if not self._rounds:
            return
        if self.rule.needs_logprobs and self.verifier == "policy":
            with pl_module.timer("old_log_prob"):
                self._record_missing_logprobs(pl_module, rollouts, experience)
        self._trained = rollouts, experience
        found = [current.statistics(pl_module.step) for current in self._rounds]
        statistics = merge([merge(rank) for rank in gather_objects(found)])
        pl_module.step_metrics |= statistics.metrics() | self._lenience_metrics(statistics)
        pl_module.step_metrics["prefix_cache/bytes"] = float(sum(gather_objects(self.store.num_bytes)))
        if self.rule.needs_logprobs:
            pl_module.step_metrics["prefix_cache/block_length"] = float(self._block_length)
        if self.block_length is None and statistics.num_cached:
            self._block_length = statistics.block_length
        self._drafts_are_useless.update(
            statistics.num_cached_tokens > 0 and statistics.num_reused_tokens < 0.02 * statistics.num_cached_tokens
        )
        self._responses_are_stale.update(statistics.num_reused_tokens > 0.98 * statistics.num_tokens)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: RLVRModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the rollouts of the step, with the log-probs that the update has found."""
        if not self._rounds:
            return
        rollouts, experience = self._trained
        assert experience.recorded_logprobs is not None
        recorded = experience.recorded_logprobs.cpu().numpy()
        reference = None if experience.reference_logprobs is None else experience.reference_logprobs.cpu().numpy()
        position = {seed: row for row, seed in enumerate(rollouts.request.seeds)}
        for current in self._rounds:
            self.store.put(current.cached_rows(pl_module.step - 1, position, recorded, reference))
        self._rounds = []
        self._rewards.append(pl_module.step_metrics["reward"])

    def on_validation_end(self, trainer: L.Trainer, pl_module: RLVRModule) -> None:  # type: ignore[override]
        """Compare the reward of reused rollouts with the accuracy of fresh ones."""
        accuracy = pl_module.evaluation.get("val_accuracy")
        if accuracy is None or not self._rewards:
            return
        self._validations.append((sum(self._rewards) / len(self._rewards), accuracy))
        self._rewards = []
        if reward_outruns_accuracy(self._validations):
            rank_zero_warn(
                "training reward rises while validation accuracy falls: the reused rollouts may flatter the policy. Lower lenience, set "
                "drift_bound, or compare with fresh rollouts by control_fraction"
            )
            self._validations = []

    def _past_responses(self, request: RolloutRequest) -> dict[int, list[int]]:
        size = request.sampling.num_generations
        cached = {
            row: self.store.get(request.prompts.uids[request.prompt_index(row)], row % size)
            for row in range(request.num_rows)
        }
        return {row: found.token_ids.tolist() for row, found in cached.items() if found is not None}

    def _find_drafts(self, request: RolloutRequest) -> list[CachedRollout | None]:
        size = request.sampling.num_generations
        if isinstance(self.rule, NoReuse):
            return [None] * request.num_rows
        fraction = self.adaptive_lenience.fraction if self.adaptive_lenience else 1.0
        cached: list[CachedRollout | None] = []
        for group, uid in enumerate(request.prompts.uids):
            seeds = request.seeds[group * size : (group + 1) * size]
            if fraction < 1 and float(row_uniforms(seeds[:1], 1, "reuse")) >= fraction:
                cached += [None] * size
                continue
            control = control_samples(seeds, self.control_fraction)
            rows = [None if sample in control else self.store.get(uid, sample) for sample in range(size)]
            cached += [row if row is not None and row.num_reuses < self.max_reuses else None for row in rows]
        return cached

    def _record_missing_logprobs(self, pl_module: RLVRModule, rollouts: Rollouts, experience: Experience) -> None:
        """Score what no other pass of this step will: rows that the update skips, and groups that were dropped."""
        assert experience.recorded_logprobs is not None
        unknown = experience.recorded_logprobs.isnan().any(-1)  # [N]
        unknown[pl_module.trained_rows(experience)] = False
        rows = unknown.nonzero().squeeze(-1).tolist()
        logprobs = pl_module.token_statistics(pl_module.policy, experience, rows).logprobs
        experience.record_logprobs(logprobs[rows], rows)
        trained = set(rollouts.request.seeds)
        for current in self._rounds:
            current.score_dropped_rows(pl_module.response_logprobs, trained)

    def _lenience_metrics(self, statistics: ReuseStatistics) -> dict[str, float]:
        if not isinstance(self.rule, RatioAcceptance):
            return {}
        metrics = {"prefix_cache/lenience": self.rule.lenience}
        if self.adaptive_lenience is None:
            return metrics
        metrics["prefix_cache/cached_fraction"] = self.adaptive_lenience.fraction
        self.adaptive_lenience.update(statistics.kl_sum, statistics.num_scored)
        self._set_lenience(self.adaptive_lenience.value)
        return metrics

    def _set_lenience(self, lenience: float) -> None:
        assert isinstance(self.rule, RatioAcceptance)
        self.rule = replace(self.rule, lenience=lenience)

    # ---------------------------------------------------------------------------------------------------------- resume

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write each rank's cache into a file beside the checkpoints."""
        module = require_rlvr_module(self, pl_module)
        folder = checkpoint_folder(trainer)
        self._files.save(
            folder,
            self.store,
            self._identity(module),
            step=module.step,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            is_recorded=checkpoints_are_recorded(trainer),
        )
        checkpoint["prefix_cache"] = {
            "folder": str(folder),
            "step": module.step,
            "world_size": trainer.world_size,
            "model": module.model_name,
            "max_completion_length": module.sampling.max_completion_length,
            "rewards": module.rewards.identity(),
            "adaptive_lenience": self.adaptive_lenience.state_dict() if self.adaptive_lenience else None,
            "block_length": self._block_length,
        }

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._files.close(checkpoint_folder(trainer), trainer.global_rank)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        state = checkpoint.get("prefix_cache")
        if state is None:
            rank_zero_warn("the checkpoint comes from a run without PrefixCache; its first epoch generates everything")
            return
        module = require_rlvr_module(self, pl_module)
        if self.adaptive_lenience is not None and state["adaptive_lenience"] is not None:
            self.adaptive_lenience.load_state_dict(state["adaptive_lenience"])
            self._set_lenience(self.adaptive_lenience.value)
        self._block_length = self.block_length or state.get("block_length", self._block_length)  # older ones have none
        self._other_ranks_included = state["world_size"] != trainer.world_size
        self.store = load_ranks(
            [Path(str(trainer.ckpt_path)).parent, Path(state["folder"])],
            range(state["world_size"]) if self._other_ranks_included else [trainer.global_rank],
            self._identity(module),
            step=state["step"],
            world_size=state["world_size"],
            max_bytes=self.store.max_bytes,
        )
        has_other_rewards = state.get("rewards") != module.rewards.identity()
        if has_other_rewards:
            rank_zero_info(
                "the rewards, or their settings, are not those of the checkpoint: kept responses are scored again when they are reused"
            )
        if has_other_rewards or state["max_completion_length"] != module.sampling.max_completion_length:
            self.store.put([replace(row, reward=None, reward_values=None) for row in self.store])
        if state["model"] != module.model_name:  # the policy is the checkpoint's, but the reference may be another one
            self.store.put([replace(row, reference_logprobs=None) for row in self.store])

    def on_train_start(self, trainer: L.Trainer, pl_module: RLVRModule) -> None:  # type: ignore[override]
        sweep_rank_files(self._files, trainer)
        engine = pl_module.engine or TransformersEngine()  # what the module takes where it was given none
        if self.verifier == "engine" and not engine.can_verify:
            raise MisconfigurationException(
                f"verifier='engine' needs SpeculativeRollout(engine=VLLMEngine()) with tensor_parallel_size=1, found {type(engine).__name__}; "
                "use verifier='policy'"
            )
        uids = getattr(trainer.train_dataloader, "uids", None)
        if self._other_ranks_included and uids is not None:
            own = set(uids)
            self.store, _ = self.store.split(2, lambda uid: 0 if uid in own else 1)
        self._other_ranks_included = False

    def _identity(self, module: RLVRModule) -> dict[str, str]:
        """What log-probs and token ids mean: another architecture, tokenizer or temperature makes them worthless.

        The name of the model is no part of it: a folder may be moved, and the weights are the checkpoint's.
        """
        assert module.policy is not None
        config = module.policy.model.config.to_dict()
        architecture = {name: value for name, value in config.items() if name not in _NOT_OF_THE_ARCHITECTURE}
        return {
            "architecture": _digest(architecture),
            "tokenizer": _digest(module.tokenizer.get_vocab()),
            "temperature": str(module.sampling.temperature),
        }


def _digest(value: dict[str, Any]) -> str:
    """The same for the same content, in whatever order it was written."""
    return xxhash.xxh3_64_hexdigest(json.dumps(value, sort_keys=True, default=str).encode())


def reward_outruns_accuracy(validations: Sequence[tuple[float, float]]) -> bool:
    """Whether training reward rose, and validation accuracy fell, from each of the last three validations to the next.

    Args:
        validations: (mean training reward since the validation before, accuracy), in order.

    Example:
        >>> reward_outruns_accuracy([(0.5, 0.40), (0.6, 0.38), (0.7, 0.35)])
        True
    """
    latest = validations[-3:]
    return len(latest) == 3 and all(
        reward > reward_before and accuracy < accuracy_before
        for (reward_before, accuracy_before), (reward, accuracy) in pairwise(latest)
    )


def _rule(acceptance: Acceptance, lenience: float, drift_bound: float | None) -> AcceptanceRule:
    if acceptance in ("ratio", "sequence"):
        return RatioAcceptance(lenience, drift_bound, "token" if acceptance == "ratio" else "sequence")
    if lenience != 1:
        rank_zero_warn(
            f"lenience={lenience} belongs to acceptance='ratio' or 'sequence' and is ignored by {acceptance!r}"
        )
    if drift_bound is not None:
        raise ValueError(
            f"drift_bound={drift_bound} belongs to acceptance='ratio' or 'sequence' and would be ignored by {acceptance!r}"
        )
    rules: dict[str, AcceptanceRule] = {"random": RandomReuse(), "full": FullReuse(), "off": NoReuse()}
    if acceptance not in rules:
        raise ValueError(f"acceptance must be 'ratio', 'sequence', 'random', 'full' or 'off', got {acceptance!r}")
    return rules[acceptance]
