"""Rollouts that begin with the verified prefix of an earlier response."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import lightning as L
import numpy as np
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray

from lit_specrl.algorithms.rlvr import RLVRModule
from lit_specrl.algorithms.streak_warning import StreakWarning
from lit_specrl.callbacks.cache_owner import drop_what_is_of_others, identity_of, settings_of
from lit_specrl.callbacks.rank_store import RankStore
from lit_specrl.callbacks.rollout_callback import RolloutCallback, require_only_one, require_rlvr_module
from lit_specrl.checkpoints.rank_files import PREFIX_CACHE
from lit_specrl.distributed.collectives import gather_objects
from lit_specrl.engines.episodes import prompt_of
from lit_specrl.experience import Experience
from lit_specrl.metrics import merge
from lit_specrl.prefix_cache.acceptance import AcceptanceRule, acceptance_rule
from lit_specrl.prefix_cache.lenience import AdaptiveLenience
from lit_specrl.prefix_cache.reuse import ReuseRound
from lit_specrl.prefix_cache.reuse_policy import NO_RESPONSE, ReusePolicy
from lit_specrl.prefix_cache.selection import OfferCounts, Selection, Selector
from lit_specrl.prefix_cache.statistics import ReuseStatistics, reward_outruns_accuracy
from lit_specrl.prefix_cache.store import RolloutStore
from lit_specrl.types import RolloutRequest, Rollouts


class PrefixCache(RolloutCallback):
    """Starts each rollout with the verified prefix of the response that the same prompt got last time (SPEC-RL).

    Liu et al. 2025, arXiv 2509.23232. The cached response is scored once under today's policy. Its tokens are kept
    while `u < lenience * target / previous`, and the policy goes on from the first that is rejected. Not exact, not
    even at lenience 1: see `RatioAcceptance`. Validation and test always generate afresh. With an environment the first
    turn is reused, and what follows an observation is generated afresh.

    Where the policy moves little between two visits of a prompt, a lenience above 1 keeps nearly everything, epoch
    after epoch, and the policy is trained on the same few responses again and again. `max_reuses` renews them. All
    prompts are visited equally often, so that they are renewed in the same epoch, which costs less than a few long
    responses in every step. (Rows that a control group or `adaptive_lenience` has generated afresh in between are
    renewed later.)

    What the verification knows is not computed again: rows that were kept whole bring their rewards, log-probs and
    reference log-probs along and never reach the engine.

    Departs from the paper: uniforms are fresh in every step; `drift_bound` ends the compounding of lenience over
    epochs, judging by sequence that over the tokens of a response; a control group shows what reuse does to the reward.

    Args:
        lenience: factor on the ratio; 1, the default, is the plain ratio test.
        acceptance: the rule, or the name of one: "ratio" tests each token, as in the paper; "sequence" the whole
            response up to it, so that no text is kept more than `lenience` times as often as the policy samples it; the
            paper's baselines "random" (a uniformly random cut) and "full" (everything); or "off", which keeps responses
            only for a drafter that reads them. A rule of one's own derives from `AcceptanceRule`.
        drift_bound: a token is also rejected when it has lost more than this many nats since it was generated.
        adaptive_lenience: chooses the lenience, and the share of groups that reuse, by how fast the policy moves; then
            `lenience` is unused.
        max_reuses: how often in a row a response is offered before its prompt is answered afresh; `None` for no limit.
        control_fraction: share of each group that is generated afresh, for comparison (`prefix_cache/reward_gap`).
        reuse_rewards: take the rewards of rows that were kept whole from the cache. False for rewards that depend on
            the other rows of the group, or are not the same for the same text.
        verifier: "policy" scores cached responses by the forward pass that training uses; "engine" lets vLLM score
            them. There a row goes on as soon as it is verified and finds its prefix in the engine's KV prefix cache.
            Temperature 1 only.
        block_length: tokens that are verified at a time; scoring of a response ends with the block of the rejection.
            `None` for the length that needs the fewest tokens, if rejections are as frequent as in the step before.
        max_bytes: most memory for cached responses on each rank; the oldest make room.
        log_lenience: the logarithm of the lenience, in nats, in place of `lenience`. The paper's best: 0.5 (GRPO),
            0.3 (PPO), 0.15 (DAPO).
        reuse_policy: chooses, before any verification, which rows may reuse, and how much of their responses; by what
            reuse costs in learning. `None` offers every response whole, as in the paper.
        load_cache: take the responses of a checkpoint along; False answers every prompt afresh once.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: from `setup`, for sampling with `top_p`, `top_k`, `min_p` or `repetition_penalty`,
            whose log-probs are not those of the ratio.

    Example::

        PrefixCache(log_lenience=0.5, max_reuses=2)
        PrefixCache(acceptance=RatioAcceptance(level="sequence"))
    """

    def __init__(
        self,
        lenience: float | None = None,
        acceptance: str | AcceptanceRule = "ratio",
        drift_bound: float | None = None,
        adaptive_lenience: AdaptiveLenience | None = None,
        max_reuses: int | None = None,
        control_fraction: float = 0.0,
        reuse_rewards: bool = True,
        verifier: Literal["policy", "engine"] = "policy",
        block_length: int | None = None,
        max_bytes: int = 2**30,
        log_lenience: float | None = None,
        reuse_policy: ReusePolicy | None = None,
        load_cache: bool = True,
    ) -> None:
        if log_lenience is not None:
            if lenience is not None:
                raise ValueError(
                    f"lenience={lenience} and log_lenience={log_lenience} say the same thing; leave one of them out"
                )
            lenience = math.exp(log_lenience)
        if adaptive_lenience is not None:
            lenience = adaptive_lenience.value
        self.rule = acceptance_rule(acceptance, lenience, drift_bound)
        if adaptive_lenience is not None and self.rule.lenience is None:
            raise ValueError(
                f"adaptive_lenience steers acceptance='ratio' or 'sequence', got {acceptance!r}, which has no lenience"
            )
        if block_length is not None and block_length < 1:
            raise ValueError(f"block_length must be at least 1 token, got {block_length}")
        if verifier not in ("policy", "engine"):
            raise ValueError(f"verifier must be 'policy' or 'engine', got {verifier!r}")
        self.acceptance = acceptance if isinstance(acceptance, str) else type(acceptance).__name__
        self.adaptive_lenience = adaptive_lenience
        self.max_reuses, self.reuse_policy, self.reuse_rewards = max_reuses, reuse_policy, reuse_rewards
        self.load_cache = load_cache
        self._selector = Selector(reuse_policy, max_reuses, control_fraction)
        self.verifier, self.block_length = verifier, block_length
        self._block_length = block_length or 128
        self.max_bytes, self.store = max_bytes, RolloutStore(max_bytes)
        self._files = RankStore(PREFIX_CACHE)
        self._rounds: list[ReuseRound] = []
        self._offers = OfferCounts()
        self._trained: tuple[Rollouts, Experience]
        self._other_ranks_included = False
        self._owner: tuple[dict[str, str], dict[str, Any]] | None = None  # identity and settings of the last fit
        self._reuse_is_rare = StreakWarning(
            5,
            "PrefixCache kept less than 2 % of the cached tokens in {num_steps} steps: verification costs more than it "
            "saves. The policy moves too far between two visits of a prompt; lower the learning rate, raise lenience, or "
            "leave PrefixCache out",
        )
        self._responses_are_stale = StreakWarning(
            10,
            "PrefixCache kept more than 98 % of all tokens in {num_steps} steps: the policy learns from the same responses "
            "again and again. Set max_reuses to answer the prompts afresh now and then, or lower lenience",
        )
        self._rewards: list[float] = []  # of the steps since the last validation
        self._validations: list[tuple[float, float]] = []

    def describe(self, trainer: L.Trainer) -> dict[str, str]:
        """Rule, lenience and exactness, such as "ratio, lenience 1.65, approximate"."""
        parts = [self.acceptance, *([type(self.reuse_policy).__name__] if self.reuse_policy else [])]
        if self.adaptive_lenience is not None:
            parts.append(f"lenience {self.adaptive_lenience.low:.3g} to {self.adaptive_lenience.high:.3g} (adaptive)")
        elif self.rule.lenience is not None:
            parts.append(f"lenience {self.rule.lenience:.3g}")
        is_exact = self.rule.is_exact and (self.reuse_policy is None or self.reuse_policy.is_exact)
        return {"prefix cache": ", ".join([*parts, "exact" if is_exact else "approximate"])}

    def memory(self, trainer: L.Trainer, num_parameters: int) -> dict[str, int]:
        if trainer.strategy.root_device.type != "cpu":  # the cache is on the host
            return {}
        return {"prefix cache, at most": self.max_bytes}

    def charts(self) -> dict[str, dict[str, list[Any]]]:
        return {
            "prefix cache": {
                "reused": ["Multiline", ["prefix_cache/(hit|reuse|full_reuse)_fraction"]],
                "tokens": ["Multiline", ["prefix_cache/(generated|saved)_tokens"]],
                "drift and KL": ["Multiline", ["prefix_cache/(drift|kl)"]],
            }
        }

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        sampling = require_rlvr_module(self, pl_module).sampling
        require_only_one(self, trainer)
        if self.verifier == "engine" and sampling.temperature != 1:
            raise MisconfigurationException(
                f"verifier='engine' scores at temperature 1, rollouts are sampled at {sampling.temperature}; use "
                "verifier='policy'"
            )
        if sampling.is_truncated and self.rule.needs_logprobs and not self.rule.allows_truncated_sampling:
            raise MisconfigurationException(
                "PrefixCache compares log-probs of the whole softmax, but rollouts are sampled with "
                f"{sampling.departure}; use top_p=1.0, min_p=0.0 and repetition_penalty=1.0 without top_k, or "
                "acceptance='off'"
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._rounds, self._offers = [], OfferCounts()

    def on_rollout_start(self, trainer: L.Trainer, pl_module: RLVRModule, request: RolloutRequest) -> None:
        drafter = None if pl_module.engine is None else pl_module.engine.drafter
        drafter_reads = drafter is not None and drafter.reads_past_responses
        if not trainer.training or (self.rule.keeps_nothing and not drafter_reads):
            return
        if drafter_reads:
            request.past_responses = self._past_responses(request)
        selection = self._select(request)
        self._offers += selection.counts
        current = ReuseRound(request, selection.cached, self.rule, selection.limits, selection.num_equal)
        if self.verifier == "engine" and self.rule.needs_logprobs:
            current.verify_in_engine(self._block_length)
        else:
            with pl_module.timer("verify"):
                current.verify(partial(pl_module.scorer.response_logprobs, block_length=self._block_length))
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
        if self.reuse_policy is not None:
            pl_module.step_metrics |= sum(gather_objects(self._offers), OfferCounts()).metrics()
        pl_module.step_metrics["prefix_cache/bytes"] = float(sum(gather_objects(self.store.num_bytes)))
        if self.rule.needs_logprobs:
            pl_module.step_metrics["prefix_cache/block_length"] = float(self._block_length)
        if self.block_length is None and statistics.num_cached:
            self._block_length = statistics.block_length
        self._reuse_is_rare.update(
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
        reference_logprobs = experience.reference_logprobs
        if pl_module.reference.is_on:  # it will have moved when the rows are met again
            reference_logprobs = None
        reference = None if reference_logprobs is None else reference_logprobs.cpu().numpy()
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
                "training reward rises while validation accuracy falls: the reused rollouts may flatter the policy. "
                "Lower lenience, set drift_bound, or compare with fresh rollouts by control_fraction"
            )
            self._validations = []

    def _past_responses(self, request: RolloutRequest) -> dict[int, NDArray[np.int32]]:
        size = request.sampling.num_generations
        cached = {
            row: self.store.get(request.prompts.uids[request.prompt_index(row)], row % size)
            for row in range(request.num_rows)
        }
        return {row: found.token_ids for row, found in cached.items() if found is not None}

    def _select(self, request: RolloutRequest) -> Selection:
        if self.rule.keeps_nothing:
            return Selection([None] * request.num_rows, [NO_RESPONSE] * request.num_rows)
        fraction = self.adaptive_lenience.fraction if self.adaptive_lenience else 1.0
        return self._selector.select(request, self.store, fraction)

    def _record_missing_logprobs(self, pl_module: RLVRModule, rollouts: Rollouts, experience: Experience) -> None:
        """Score the rows that no other pass of this step scores: those that the update skips, and dropped groups."""
        assert experience.recorded_logprobs is not None
        unknown = experience.recorded_logprobs.isnan().any(-1)  # [N]
        unknown[pl_module.trained_rows(experience)] = False
        rows = unknown.nonzero().squeeze(-1).tolist()
        logprobs = pl_module.scorer.token_statistics(experience, rows).logprobs
        experience.record_logprobs(logprobs[rows], rows)
        trained = set(rollouts.request.seeds)
        for current in self._rounds:
            current.score_dropped_rows(pl_module.scorer.response_logprobs, trained)

    def _lenience_metrics(self, statistics: ReuseStatistics) -> dict[str, float]:
        if self.rule.lenience is None:
            return {}
        metrics = {"prefix_cache/lenience": self.rule.lenience}
        if self.adaptive_lenience is None:
            return metrics
        metrics["prefix_cache/cached_fraction"] = self.adaptive_lenience.fraction
        self.adaptive_lenience.update(statistics.kl_sum, statistics.num_scored)
        self.rule = self.rule.with_lenience(self.adaptive_lenience.value)
        return metrics

    # ---------------------------------------------------------------------------------------------------------- resume

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write each rank's cache into a file beside the checkpoints."""
        module = require_rlvr_module(self, pl_module)
        checkpoint["prefix_cache"] = {
            **self._files.save(trainer, self.store, identity_of(module), module.step),
            **settings_of(module),
            "adaptive_lenience": self.adaptive_lenience.state_dict() if self.adaptive_lenience else None,
            "block_length": self._block_length,
        }

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._files.close(trainer)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self.store, self._owner = RolloutStore(self.max_bytes), None  # without the rows of another fit
        state = checkpoint.get("prefix_cache")
        if state is None:
            rank_zero_warn("the checkpoint comes from a run without PrefixCache; its first epoch generates everything")
            return
        module = require_rlvr_module(self, pl_module)
        if self.adaptive_lenience is not None and state["adaptive_lenience"] is not None:
            self.adaptive_lenience.load_state_dict(state["adaptive_lenience"])
            self.rule = self.rule.with_lenience(self.adaptive_lenience.value)
        self._block_length = self.block_length or state.get("block_length", self._block_length)  # older ones have none
        if not self.load_cache:
            rank_zero_info("load_cache=False: the responses of the checkpoint are left out")
            return
        self._other_ranks_included = state["world_size"] != trainer.world_size
        identity = identity_of(module)
        stores = self._files.load(
            trainer,
            state,
            lambda path: RolloutStore.load(path, identity),
            "the prefix cache of rank {rank} cannot be used, its prompts are generated afresh once: {error}",
            range(state["world_size"]) if self._other_ranks_included else None,
        )
        # the limit is for the rows of one rank, which are chosen in `on_train_start`
        self.store = RolloutStore.merge(stores, None if self._other_ranks_included else self.max_bytes)
        drop_what_is_of_others(self.store, state, module)

    def on_train_start(self, trainer: L.Trainer, pl_module: RLVRModule) -> None:  # type: ignore[override]
        self._files.sweep(trainer)
        engine = pl_module.engine
        if self.verifier == "engine" and (engine is None or not engine.can_verify):
            found = "TransformersEngine" if engine is None else type(engine).__name__  # the module's default
            raise MisconfigurationException(
                "verifier='engine' needs SpeculativeRollout(engine=VLLMEngine()) with tensor_parallel_size=1, "
                f"found {found}; use verifier='policy'"
            )
        if self._other_ranks_included:
            self._keep_own_rows(getattr(trainer.train_dataloader, "uids", None))
        self._other_ranks_included = False
        owner = identity_of(pl_module), settings_of(pl_module)
        if self._owner is not None:  # of an earlier fit
            if self._owner[0] == owner[0]:
                drop_what_is_of_others(self.store, self._owner[1], pl_module)
            else:
                self.store = RolloutStore(self.max_bytes)
            self.store.put([replace(row, step=min(row.step, pl_module.step)) for row in self.store])  # steps begin anew
        self._owner = owner

    def _keep_own_rows(self, uids: list[str] | None) -> None:
        """Of the rows of all ranks of a former run those whose prompts are this rank's, as far as memory allows."""
        own = self.store
        if uids is not None:
            prompts = set(uids)
            own, _ = self.store.split(2, lambda uid: 0 if prompt_of(uid) in prompts else 1)
        self.store = RolloutStore.merge([own], self.max_bytes)
