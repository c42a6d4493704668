"""The data of a run as Lightning takes it."""

from __future__ import annotations

import copy
from collections import Counter
from difflib import get_close_matches
from typing import Any, Literal, TypeAlias

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lit_specrl.data.evaluation_loader import EvaluationLoader
from lit_specrl.data.files import FileSource
from lit_specrl.data.hub import HubSource
from lit_specrl.data.loader import PromptLoader
from lit_specrl.data.presets import PRESETS, DataName, resolve_source
from lit_specrl.data.prompts import OF_ENVIRONMENTS, REWARD_ARGUMENTS, build_prompts
from lit_specrl.data.schedule import PromptSchedule
from lit_specrl.data.sources import PromptSource
from lit_specrl.data.template import PromptTemplate
from lit_specrl.types import PromptBatch, SamplingConfig

Source: TypeAlias = DataName | PromptSource | str
Sources: TypeAlias = Source | list[Source] | dict[str, Source]

STAGES = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("predict",)}
"""The splits each stage reads; the first one is indispensable."""


class PromptDataModule(L.LightningDataModule):
    """Prompts for training and evaluation, rendered and tokenised with the tokenizer of the LightningModule.

    Data is given by the name of a preset (`deepmath`, `gsm8k`, `math500`, ...), by the path of a file, by a source, or
    by several of these: a list, or a dict whose keys are the names that results are reported under. All data is read,
    checked and cut into batches in `setup`, before a model is loaded.

    Args:
        train: what to learn from.
        validation: what to evaluate on during training.
        test: what `trainer.test` evaluates on.
        predict: what `trainer.predict` answers. Answers may be missing. A file that is given by its path alone has the
            columns of `train`, where that is a single source.
        template: how a question becomes a prompt; the tokenizer's chat template by default.
        batch_size: prompts per step over all ranks, each sampled `num_generations` times.
        eval_batch_size: the same for validation, test and predict; `batch_size` by default.
        max_prompt_length: longest prompt, in tokens.
        overlong: leave longer prompts out and say how many, or refuse them.
        seed: decides the order of prompts together with the epoch.
        shuffle: train on a new order in each epoch.
        schedule: which prompts an epoch of training visits, and their order: `Mixture` (sources in fixed shares),
            `Curriculum` (easy ones first), `SkipSolved`, or one of your own. In place of `shuffle`.
        validation_sampling: how to sample during validation; `None` leaves it to the LightningModule.
        test_sampling: the same for test and predict.

    Attributes:
        num_dropped: prompts left out because of their length, by split; filled by `setup`.
        num_train_prompts: training prompts of all ranks; filled by `setup`.

    Raises:
        ValueError: for unknown presets, and from `setup` for data that cannot be read, rendered or cut into batches, or
            whose columns rewards could not be given.
        MisconfigurationException: from `setup`, when the stage has no data, the LightningModule no tokenizer, or a
            reward no answers to compare with, or not the columns that it needs.

    Example::

        PromptDataModule("deepmath", validation=["math500", "gsm8k_test"])
        PromptDataModule(
            ArithmeticSource(256), validation=ArithmeticSource(64, split="validation"),
            template=PromptTemplate(examples=[{"question": "What is 2 + 6?", "answer": "2 + 6 = 8. Answer: 8"}]),
        )
    """

    def __init__(
        self,
        train: Sources | None = None,
        validation: Sources | None = None,
        test: Sources | None = None,
        predict: Sources | None = None,
        template: PromptTemplate | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_prompt_length: int = 1024,
        overlong: Literal["drop", "raise"] = "drop",
        seed: int = 0,
        shuffle: bool = True,
        validation_sampling: SamplingConfig | None = None,
        test_sampling: SamplingConfig | None = None,
        schedule: PromptSchedule | None = None,
    ) -> None:
        super().__init__()
        if schedule is not None and not shuffle:
            raise ValueError(
                f"shuffle=False and schedule={type(schedule).__name__} both give an order; leave shuffle out, and give"
                " the schedule rest=InOrder(), or Mixture shuffle=False"
            )
        if overlong not in ("drop", "raise"):
            raise ValueError(f"overlong must be 'drop' or 'raise', got {overlong!r}")
        for name, value in {"batch_size": batch_size, "eval_batch_size": eval_batch_size}.items():
            if (value is None and name == "batch_size") or (value is not None and value < 1):
                raise ValueError(f"{name} must be at least 1 prompt, got {value}")
        if max_prompt_length < 1:
            raise ValueError(f"max_prompt_length must be at least 1 token, got {max_prompt_length}")
        self.sources = {
            "train": named_sources(train),
            "validation": named_sources(validation),
            "test": named_sources(test),
            "predict": _unanswered(predict, train),
        }
        self.template = template or PromptTemplate()
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.max_prompt_length = max_prompt_length
        self.overlong: Literal["drop", "raise"] = overlong
        self.seed = seed
        self.shuffle, self.schedule = shuffle, schedule
        self.sampling = {"validation": validation_sampling, "test": test_sampling, "predict": test_sampling}
        self.num_dropped: dict[str, int] = {}
        self.num_train_prompts: int | None = None
        self._train_loader: PromptLoader | None = None
        self._eval_loaders: dict[str, EvaluationLoader] = {}

    def prepare_data(self) -> None:
        """Download what the stage needs, once per node."""
        stage = self._trainer().state.fn
        for split in self._splits(stage.value if stage else None):
            for source in self.sources[split].values():
                source.download()

    def setup(self, stage: str | None = None) -> None:
        """Read, render, tokenise and check the data of the stage."""
        for split in self._splits(stage):
            if split == "train":
                self._train_loader = self._make_train_loader(self._prompts(split))
            elif self.sources[split]:
                self._eval_loaders[split] = self._make_eval_loader(split, self._prompts(split))

    def train_dataloader(self) -> PromptLoader:
        assert self._train_loader is not None
        return self._train_loader

    def val_dataloader(self) -> EvaluationLoader | list[Any]:
        return self._eval_loaders.get("validation", [])

    def test_dataloader(self) -> EvaluationLoader:
        return self._eval_loaders["test"]

    def predict_dataloader(self) -> EvaluationLoader:
        return self._eval_loaders["predict"]

    def state_dict(self) -> dict[str, Any]:
        """Position in the training data.

        Lightning saves the loader's state too, but leaves it out when it resumes at the end of an epoch.
        """
        return {} if self._train_loader is None else {"train": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue training with the prompts that come next."""
        if self._train_loader is not None and "train" in state_dict:
            self._train_loader.load_state_dict(state_dict["train"])

    def _splits(self, stage: str | None) -> tuple[str, ...]:
        splits = STAGES[stage] if stage else tuple(split for split in self.sources if self.sources[split])
        if stage and not self.sources[splits[0]]:
            raise MisconfigurationException(
                f"PromptDataModule has no data for `{stage}`: give `{splits[0]}` a preset, a file or a source"
            )
        return splits

    def _prompts(self, split: str) -> PromptBatch:
        rows = {name: source.load() for name, source in self.sources[split].items()}
        environment = getattr(self._trainer().lightning_module, "environment", None)
        template = self.template.with_tools(getattr(environment, "schemas", []))
        prompts, num_dropped = build_prompts(
            rows, template, self._tokenizer(), self.max_prompt_length, self.overlong, rewarded=split != "predict"
        )
        if split != "predict":
            self._check_answers(split, prompts)
            self._check_columns(split, prompts)
        self.num_dropped[split] = num_dropped
        if num_dropped:
            rank_zero_warn(
                f"{split} data: {num_dropped} of {num_dropped + len(prompts)} prompts are longer than"
                f" max_prompt_length={self.max_prompt_length} tokens and were left out."
            )
        return prompts

    def _check_answers(self, split: str, prompts: PromptBatch) -> None:
        """Refuse prompts without any reference answer where a reward compares with it, and count the single ones."""
        rewards = getattr(getattr(self._trainer().lightning_module, "rewards", None), "rewards", [])
        needing = ", ".join(repr(reward.name) for reward in rewards if getattr(reward, "needs_answer", False))
        without = [source for source, answer in zip(prompts.sources, prompts.answers, strict=True) if answer is None]
        if not needing or not without:
            return
        counts = ", ".join(f"{number} from {source!r}" for source, number in Counter(without).items())
        if len(without) == len(prompts):
            raise MisconfigurationException(
                f"{split} data: none of the {len(prompts)} prompts ({counts}) has a reference answer, which reward "
                f"{needing} compares with; name the column that holds it by `answer` of the source, or use other "
                "rewards"
            )
        rank_zero_warn(
            f"{split} data: {len(without)} of {len(prompts)} prompts ({counts}) have no reference answer; reward "
            f"{needing} does not apply to them."
        )

    def _check_columns(self, split: str, prompts: PromptBatch) -> None:
        """Refuse rewards that would be called without an argument which they need."""
        rewards = getattr(getattr(self._trainer().lightning_module, "rewards", None), "rewards", [])
        present = sorted({name for columns in prompts.columns for name in columns})
        has_turns = getattr(self._trainer().lightning_module, "environment", None) is not None
        arguments = set(REWARD_ARGUMENTS) - (set() if has_turns else OF_ENVIRONMENTS)
        for reward in rewards:
            if missing := sorted(reward.needed_columns() - set(present) - arguments):
                if missing[0] in REWARD_ARGUMENTS:
                    raise MisconfigurationException(
                        f"reward {reward.name!r} needs {missing[0]!r}, {REWARD_ARGUMENTS[missing[0]]}; the module has "
                        "no environment. Give it one, or give the argument a default"
                    )
                similar = get_close_matches(missing[0], [*present, *REWARD_ARGUMENTS], 1)
                raise MisconfigurationException(
                    f"{split} data: reward {reward.name!r} needs the column {missing[0]!r}, which no prompt has; "
                    + (f"did you mean {similar[0]!r}? " if similar else "")
                    + f"Columns present: {', '.join(present) or 'none'}. Keep it by `columns` of the source, or give the "
                    "argument a default"
                )

    def _make_train_loader(self, prompts: PromptBatch) -> PromptLoader:
        if self._trainer().overfit_batches:  # type: ignore[attr-defined]  # set in a helper of Trainer.__init__
            raise MisconfigurationException(
                "overfit_batches does not work with PromptDataModule, whose training data is one stream over all "
                "epochs; give the source a `limit` instead"
            )
        loader = PromptLoader(
            prompts, self.batch_size, seed=self.seed, shuffle=self.shuffle, schedule=self.schedule, **self._ranks()
        )
        self.num_train_prompts = loader.num_prompts
        left_over = f"; {loader.num_left_over} prompts sit out each epoch" if loader.num_left_over else ""
        scheduled = f", {loader.num_prompts} of them in an epoch" if loader.num_prompts < len(prompts) else ""
        rank_zero_info(f"train data: {len(prompts)} prompts{scheduled}, {len(loader)} steps an epoch{left_over}.")
        return loader

    def _make_eval_loader(self, split: str, prompts: PromptBatch) -> EvaluationLoader:
        loader = EvaluationLoader(prompts, self.eval_batch_size, sampling=self.sampling[split], **self._ranks())
        rank_zero_info(f"{split} data: {len(prompts)} prompts in {len(loader)} steps.")
        return loader

    def _ranks(self) -> dict[str, int]:
        """Rank and number of ranks among those that see different prompts (tensor-parallel peers see the same)."""
        ranks = self._trainer().distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        return {"rank": ranks["rank"], "world_size": ranks["num_replicas"]}

    def _tokenizer(self) -> Any:
        module = self._trainer().lightning_module
        tokenizer = getattr(module, "tokenizer", None)
        if tokenizer is None:
            raise MisconfigurationException(
                f"{type(module).__name__} has no `tokenizer`; PromptDataModule renders prompts with the policy's "
                "tokenizer"
            )
        return tokenizer

    def _trainer(self) -> L.Trainer:
        if self.trainer is None:
            raise MisconfigurationException(
                "PromptDataModule works inside a Trainer: `trainer.fit(module, datamodule)`"
            )
        return self.trainer


def _unanswered(predict: Sources | None, train: Sources | None) -> dict[str, PromptSource]:
    """Sources whose answers may be missing; a bare path has the columns of the training data."""
    answered = list(named_sources(train).values())
    like = answered[0] if len(answered) == 1 else None

    def resolved(source: Source) -> PromptSource:
        if isinstance(source, str) and source not in PRESETS and isinstance(like, (FileSource, HubSource)):
            source = FileSource(source, like.question, like.answer, like.answer_format)
        source = copy.copy(resolve_source(source))
        source.needs_answer = False
        return source

    if isinstance(predict, dict):
        return named_sources({name: resolved(source) for name, source in predict.items()})
    sources = [] if predict is None else predict if isinstance(predict, list) else [predict]
    return named_sources([resolved(source) for source in sources])


def named_sources(sources: Sources | None) -> dict[str, PromptSource]:
    """Bring all ways of giving data into one: source by name.

    Raises:
        ValueError: for an unknown preset, and for two sources of one name.

    Example:
        >>> list(named_sources({"easy": "train.jsonl", "hard": "gsm8k"}))
        ['easy', 'hard']
    """
    if sources is None:
        return {}
    if isinstance(sources, dict):
        return {name: resolve_source(source) for name, source in sources.items()}
    resolved = [resolve_source(source) for source in (sources if isinstance(sources, list) else [sources])]
    names = [source.name for source in resolved]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"several sources are called {repeated}; give each a `name` of its own, or give a dict of them by name"
        )
    return dict(zip(names, resolved, strict=True))
