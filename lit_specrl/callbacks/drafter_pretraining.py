"""A drafter made before the run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.progress import track
from transformers import AutoModelForCausalLM

from lit_specrl.algorithms.rlvr import RLVRModule
from lit_specrl.callbacks.drafter_distillation import default_optimizer
from lit_specrl.callbacks.rollout_callback import RolloutCallback, require_rlvr_module
from lit_specrl.distributed.collectives import gather_objects, sum_over_ranks
from lit_specrl.drafting import Drafter, Eagle3Drafter
from lit_specrl.drafting.distillation.buffer import DistillationBuffer, DistillationSample
from lit_specrl.drafting.distillation.collector import TeacherOutputCollector
from lit_specrl.drafting.distillation.draft_losses import DraftLoss, resolve_draft_loss
from lit_specrl.drafting.distillation.samples import cut, is_held_out
from lit_specrl.drafting.distillation.trainer import DrafterEvaluation, DrafterTrainer
from lit_specrl.drafting.drafter_folders import check_output
from lit_specrl.drafting.eagle3 import build_head, draft_vocabulary
from lit_specrl.drafting.networks import DraftNetwork, Eagle3Network
from lit_specrl.experience import Experience, observation_mask_of, padded_rows
from lit_specrl.masking import pad_right
from lit_specrl.models.pretrained import check_model_exists, load_pretrained
from lit_specrl.types import PromptBatch, check_at_least_one


class DrafterPretraining(RolloutCallback):
    """In place of training the policy, trains a drafter for it on the policy's own responses to the training prompts.
    Then the run ends.

    It is what `lit-specrl drafter` runs. A drafter that has seen the task is worth more than any that learns within the
    run.

    Args:
        output: folder that the drafter goes to, as vLLM takes it: a new one, an empty one, or an older drafter, which
            it replaces.
        drafter: what to start from: an `Eagle3Drafter` or a `DraftModel`; `None` for a new head, grown from the policy.
        num_rollouts: responses to learn from.
        rollouts: JSONL file of responses to take instead: an object per line with `prompt` and `completion`, and maybe
            `completion_ids`, as `RolloutRecorder` writes them. Of several turns it needs `observation_mask`, too.
        vocabulary_size: tokens that a new head can draft: the most frequent ones of the responses. `None` for 4096.
        num_speculative_tokens: tokens that the drafter is trained to draft in a row.
        num_passes: over the responses.
        update_tokens: tokens of an optimizer step.
        num_top: most likely tokens whose log-probs are learned from.
        step_decay: weight of a drafted token relative to the one before; `None` for 0.8, or 1 for "acceptance".
        holdout_fraction: share of the responses kept for evaluation.
        max_bytes: most memory for what the policy says about the responses, on each rank.
        optimizer: makes the optimizer from the drafter's parameters; the rate falls to 0 in a cosine.
        micro_batch_tokens: most tokens, padding included, in one forward and backward pass of the drafter.
        seed: of the order of the responses.
        loss: what the drafter is trained to make small: "kl", ReSpec's divergence; "tv", the probability that a token
            is rejected; "acceptance", the share of a draft's tokens that is lost from its first rejection on, end to
            end (Bebop); or a `DraftLoss` by `class_path`.
        kl_warmup: share of the optimizer steps in which, before another loss, the divergence is made small. Where a
            drafter has hardly anything right, a loss for acceptance has no gradient.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: from `setup`, a folder that holds something else.
    """

    def __init__(
        self,
        output: str,
        drafter: Drafter | None = None,
        num_rollouts: int = 512,
        rollouts: str | None = None,
        vocabulary_size: int | None = None,
        num_speculative_tokens: int = 3,
        num_passes: int = 6,
        update_tokens: int = 4096,
        num_top: int = 64,
        step_decay: float | None = None,
        holdout_fraction: float = 0.1,
        max_bytes: int = 2**32,
        optimizer: OptimizerCallable = default_optimizer,
        micro_batch_tokens: int = 8192,
        seed: int = 0,
        loss: str | DraftLoss = "kl",
        kl_warmup: float = 0.5,
    ) -> None:
        check_at_least_one(
            num_rollouts=num_rollouts,
            num_passes=num_passes,
            update_tokens=update_tokens,
            num_speculative_tokens=num_speculative_tokens,
        )
        if not 0 < holdout_fraction < 1:
            raise ValueError(f"holdout_fraction must lie in (0, 1), got {holdout_fraction}")
        if isinstance(drafter, Eagle3Drafter) and drafter.model is None:  # grown here, where responses are counted
            vocabulary_size, drafter = vocabulary_size or drafter.vocabulary_size, None
        if drafter is not None and vocabulary_size is not None:
            raise ValueError(f"vocabulary_size={vocabulary_size} is of a new head; the drafter given has its own")
        if drafter is not None and type(drafter).network is Drafter.network:
            raise ValueError(f"{type(drafter).__name__} has no weights to train; take an Eagle3Drafter or a DraftModel")
        if not 0 <= kl_warmup <= 1:
            raise ValueError(f"kl_warmup must lie in [0, 1], got {kl_warmup}")
        if rollouts is not None and not Path(rollouts).is_file():
            raise ValueError(
                f"rollouts: there is no file {rollouts!r}; give a JSONL file, or leave it out to let the policy "
                "generate"
            )
        self.output, self.drafter, self.num_rollouts, self.rollouts = output, drafter, num_rollouts, rollouts
        self.vocabulary_size, self.num_speculative_tokens = vocabulary_size, num_speculative_tokens
        self.num_passes, self.update_tokens, self.num_top = num_passes, update_tokens, num_top
        self.step_decay, self.holdout_fraction, self.max_bytes = step_decay, holdout_fraction, max_bytes
        self.make_optimizer, self.micro_batch_tokens, self.seed = optimizer, micro_batch_tokens, seed
        self.is_done = False
        """Whether the drafter is in its folder."""
        self.loss, self.kl_warmup = resolve_draft_loss(loss), kl_warmup

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        module = require_rlvr_module(self, pl_module)
        check_output(self.output if stage == "fit" else None)
        (self.drafter or Eagle3Drafter()).check(check_model_exists(module.model_name))

    def on_train_start(self, trainer: L.Trainer, pl_module: RLVRModule) -> None:  # type: ignore[override]
        responses = list(self._responses(trainer, pl_module))
        network = self._starting_network(pl_module, responses)
        network.module.to(pl_module.device)
        collector = TeacherOutputCollector(network, self.num_top, torch.Generator().manual_seed(self.seed))
        buffer = DistillationBuffer(self.max_bytes, max_age=0)
        with trainer.precision_plugin.train_step_context():
            for part in _tracked(responses, "the policy reads", trainer):
                pl_module.scorer.show(collector, part.to(pl_module.device))
                buffer.put(collector.pop())
            before, after = self._train(trainer, pl_module, network, list(buffer))
        if trainer.is_global_zero:
            network.save(self.output)
            print(
                f"The drafter is in {self.output}. Of drafts of {self.num_speculative_tokens} tokens, "
                f"{_describe(before)} before the training and {_describe(after)} after it, on {after.num_drafts} "
                "places of responses that it has not seen."
            )
            if buffer.num_evicted:
                print(f"{buffer.num_evicted} responses did not fit into max_bytes={self.max_bytes} and were left out.")
        self.is_done = True
        trainer.should_stop = True

    def _train(
        self, trainer: L.Trainer, pl_module: RLVRModule, network: DraftNetwork, samples: list[DistillationSample]
    ) -> tuple[DrafterEvaluation, DrafterEvaluation]:
        held_out = [sample for sample in samples if is_held_out(sample, self.holdout_fraction)]
        trained = [sample for sample in samples if not is_held_out(sample, self.holdout_fraction)]
        training = DrafterTrainer(
            network,
            self.make_optimizer(network.parameters),
            self.num_speculative_tokens,
            pl_module.sampling.temperature,
            self.step_decay,
            self.micro_batch_tokens,
        )
        before = _evaluate(training, held_out)
        generator = torch.Generator().manual_seed(self.seed)
        updates = []
        for _ in range(self.num_passes):
            order = torch.randperm(len(trained), generator=generator).tolist()
            updates += cut([trained[index] for index in order], self.update_tokens)
        num_updates = max(gather_objects(len(updates)))
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(training.optimizer, max(num_updates, 1))
        for index in _tracked(range(num_updates), "the drafter learns", trainer):
            if index >= self.kl_warmup * num_updates:
                training.loss = self.loss
            training.update(updates[index] if index < len(updates) else [])
            scheduler.step()
        return before, _evaluate(training, held_out)

    def _starting_network(self, pl_module: RLVRModule, responses: list[Experience]) -> DraftNetwork:
        """The drafter's, or a new EAGLE-3 head with the vocabulary of the responses of all ranks."""
        if self.drafter is not None:
            self.drafter.prepare(pl_module.model_name)
            return self.drafter.network()
        policy = load_pretrained(AutoModelForCausalLM, pl_module.model_name)
        size = policy.config.get_text_config().vocab_size
        counts = torch.zeros(size, dtype=torch.long)
        for part in responses:
            counts += torch.bincount(part.response_ids[part.policy_mask], minlength=size)
        vocabulary = draft_vocabulary(sum_over_ranks(counts), self.vocabulary_size)
        whole = len(vocabulary) == size
        head = build_head(policy, pl_module.model_name, None if whole else vocabulary, self.num_speculative_tokens)
        return Eagle3Network(head)

    def _responses(self, trainer: L.Trainer, pl_module: RLVRModule) -> Iterator[Experience]:
        if self.rollouts is not None:
            yield from _read(self.rollouts, pl_module, self.num_rollouts, trainer)
            return
        loader: Iterable[PromptBatch] = trainer.train_dataloader  # type: ignore[assignment]
        batches = chain.from_iterable(repeat(loader))
        first = next(batches)
        rows = len(first) * pl_module.sampling.num_generations * trainer.world_size
        num_rounds = math.ceil(self.num_rollouts / rows)
        for index in _tracked(range(num_rounds), "the policy generates", trainer):
            batch = next(batches) if index else first
            rollouts = pl_module.generate(batch, pl_module.sampling, f"drafter/{index}")
            owners = [rollouts.request.prompt_index(row) for row in range(rollouts.num_rows)]
            experience = padded_rows(rollouts.prompts.prompt_ids, owners, rollouts.response_ids)
            experience.observation_mask = observation_mask_of(rollouts)
            yield experience


def _read(path: str, pl_module: RLVRModule, num_rollouts: int, trainer: L.Trainer) -> Iterator[Experience]:
    """This rank's share of the responses of a file, 32 at a time; shares are equal, for sharded ranks read them
    together."""
    with open(path, encoding="utf-8") as lines:
        numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
        records = [_record(path, number, line) for number, line in islice(numbered, num_rollouts)]
    size = len(records) // trainer.world_size
    if not size:
        raise MisconfigurationException(
            f"{path} holds {len(records)} responses, at least one for each of {trainer.world_size} ranks is needed"
        )
    tokenizer, stop_strings = pl_module.tokenizer, pl_module.sampling.stop_strings
    own = records[trainer.global_rank :: trainer.world_size][:size]
    for start in range(0, len(own), 32):
        part = own[start : start + 32]
        prompts = _prompt_ids([record["prompt"] for record in part], tokenizer, trainer)
        responses = [_response(record, tokenizer, stop_strings) for record in part]
        experience = padded_rows(prompts, list(range(len(part))), responses)
        observed = [
            record.get("observation_mask") or [0] * len(ids) for record, ids in zip(part, responses, strict=True)
        ]
        experience.observation_mask = pad_right(observed, dtype=torch.bool)[0]
        yield experience


def _prompt_ids(texts: list[str], tokenizer: Any, trainer: L.Trainer) -> list[list[int]]:
    """Token ids of rendered prompts, with the special tokens that the data's template gives them."""
    template = getattr(getattr(trainer, "datamodule", None), "template", None)
    if template is None:
        return tokenizer(texts, add_special_tokens=False).input_ids
    return template.tokenize(texts, tokenizer)


def _record(path: str, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise MisconfigurationException(f"{path}, line {number} is no JSON object: {error}") from error
    if not isinstance(record, dict):
        raise MisconfigurationException(f"{path}, line {number} must be a JSON object, got {line.strip()[:60]}")
    missing = {"prompt", "completion"} - record.keys()
    if missing:
        raise MisconfigurationException(
            f"{path}, line {number}: no {' and no '.join(sorted(missing))}; found {', '.join(sorted(record))}"
        )
    tokens, observed = record.get("completion_ids"), record.get("observation_mask")
    if observed is None and len(record.get("turns") or ()) > 1:
        raise MisconfigurationException(
            f"{path}, line {number}: a response of several turns needs completion_ids and observation_mask, which tell "
            "what the environment wrote; take a file of RolloutRecorder"
        )
    if observed is not None and (tokens is None or len(observed) != len(tokens)):
        raise MisconfigurationException(
            f"{path}, line {number}: observation_mask needs completion_ids and one entry for each, got {len(observed)} "
            f"for {'none' if tokens is None else len(tokens)}"
        )
    return record


def _response(record: dict[str, Any], tokenizer: Any, stop_strings: Sequence[str]) -> list[int]:
    """Token ids of a response; a text that ended by itself ends with end-of-text, unless a stop string ended it."""
    if "completion_ids" in record:
        return list(record["completion_ids"])
    text: str = record["completion"]
    token_ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    is_cut = record.get("finish_reason", "stop") != "stop" or text.endswith(tuple(stop_strings))
    return token_ids if is_cut else [*token_ids, tokenizer.eos_token_id]


def _tracked(values: Iterable[Any], title: str, trainer: L.Trainer) -> Iterable[Any]:
    return track(values, title, disable=not trainer.is_global_zero)


def _evaluate(training: DrafterTrainer, samples: list[DistillationSample]) -> DrafterEvaluation:
    ranks = gather_objects(training.evaluate(samples))
    return sum(ranks[1:], start=ranks[0])


def _describe(found: DrafterEvaluation) -> str:
    if not found.num_drafts:
        return "nothing is known"
    shares = " / ".join(f"{share:.2f}" for share in found.acceptance)
    return f"{shares} of the 1st, 2nd, ... are accepted ({found.acceptance_length:.2f} tokens a step)"
