"""`lit-specrl fit` and its siblings: LightningCLI with this library's classes."""

from __future__ import annotations

import inspect
import logging
import pkgutil
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lit_specrl.cli.environment import check_torchvision

check_torchvision()  # before transformers, whose own message would be about another class

from jsonargparse import ArgumentError, Namespace  # noqa: E402
from lightning.pytorch.callbacks import ProgressBar  # noqa: E402
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI  # noqa: E402
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from lit_specrl.algorithms.rlvr import RLVRModule  # noqa: E402

# Imported for their side effect: the CLI takes short names of classes that are imported.
from lit_specrl.callbacks import CompletionWriter, LoggerReport, RolloutProgressBar, RunPlan  # noqa: E402
from lit_specrl.checkpoints.integrity import naming  # noqa: E402
from lit_specrl.cli.configuration_files import in_short, overwritten, sources  # noqa: E402
from lit_specrl.cli.diagnosis import explain  # noqa: E402
from lit_specrl.cli.early_checks import check_settings  # noqa: E402
from lit_specrl.cli.messages import ConfigurationError  # noqa: E402
from lit_specrl.cli.refusals import Failure, explain_failure  # noqa: E402
from lit_specrl.data import PromptDataModule  # noqa: E402
from lit_specrl.precision import Trainer  # noqa: E402

_MISLEADING_WARNINGS = [
    r".*isinstance.treespec, LeafSpec",  # Lightning 2.6 with torch 2.13, about its own code
    r".*no pre-optimization state",  # about batches of supervised learning; a checkpoint between two steps is complete
    r".*infer the batch indices",  # about loaders that are a DataLoader
    r".*Total length of `list` across ranks is zero",  # a run without validation data
    r".*args parameter is intended to run from within Python",  # the arguments are those of the process, without --debug
    r".*No seed found, seed set to",  # told by the next line
    r".*recommended to use `self.log\(.*sync_dist=True",  # what is logged has been summed over the ranks
    r".*torch.distributed.reduce_op",  # vLLM 0.32, about its own code
]


class LitSpecRLCLI(LightningCLI):
    """The command line: any `RLVRModule`, any data module, and four callbacks that every run has.

    A callback of this library that a later file or option names again takes the place of the earlier one.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        actions: list[Any] = parser._actions
        for action in actions:
            if action.dest == "data":  # files of data are no configurations: one with a single row would be read as one
                action.sub_add_kwargs = {**action.sub_add_kwargs, "sub_configs": False}
        parser.add_lightning_class_args(RunPlan, "plan")
        parser.add_lightning_class_args(RolloutProgressBar, "progress_bar")
        parser.add_lightning_class_args(LoggerReport, "tensorboard")
        parser.add_lightning_class_args(CompletionWriter, "completions")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            given = list(args) if isinstance(args, list) else sys.argv[1:]
            if not given or given[0] not in self._subcommand_parsers:
                raise
            raise explain(self._subcommand_parsers[given[0]], given[1:], error) from error
        self._given = list(args) if isinstance(args, list) else sys.argv[1:]
        trainer = self.config[self.config.subcommand].trainer
        if not isinstance(trainer, Namespace):
            raise ConfigurationError(f"trainer must be a mapping, got {in_short(trainer)}", "trainer")
        check_settings(self.config[self.config.subcommand])
        if trainer.max_epochs is None:  # Lightning's would be a thousand
            trainer.max_epochs = 1 if trainer.max_steps < 0 and trainer.max_time is None else -1
        if isinstance(trainer.callbacks, list):
            _leave_one_last_checkpoint(trainer.callbacks)
            last = {callback.class_path: callback for callback in trainer.callbacks}
            trainer.callbacks = [
                callback
                for callback in trainer.callbacks
                if not callback.class_path.startswith("lit_specrl.") or last[callback.class_path] is callback
            ]

    def _parse_ckpt_path(self) -> None:
        """Lightning reads settings of the module from the checkpoint, whatever that is; name it where it cannot be
        read."""
        path = self.config[self.config.subcommand].get("ckpt_path") if self.config.get("subcommand") else None
        with naming(Path(path)) if path and Path(path).is_file() else nullcontext():
            super()._parse_ckpt_path()

    def before_instantiate_classes(self) -> None:
        for line in overwritten(sources(self._given[1:])):
            rank_zero_info(line)
        self._failures: list[Failure] = []
        self.parser.add_instantiator(self._instantiate, object)  # behind Lightning's own, for model and data

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except Exception as error:
            raise explain_failure(self._failures, self.config[self.config.subcommand], error) from error

    def instantiate_trainer(self, **options: Any) -> Any:
        trainer = self.config[self.subcommand].trainer
        if trainer.enable_progress_bar is False or any(map(_is_progress_bar, _listed(trainer.callbacks))):
            # Lightning refuses a bar beside either
            parser = self._subcommand_parsers[str(self.subcommand)]
            parser.callback_keys = [key for key in parser.callback_keys if key != "progress_bar"]
        return super().instantiate_trainer(**options)

    def _instantiate(self, kind: Any, /, *arguments: Any, **options: Any) -> Any:
        """Make an object of the configuration; remembers what it says when it refuses."""
        try:
            return kind(*arguments, **options)
        except Exception as error:
            self._failures.append(Failure(kind, options, error))
            raise


def _listed(callbacks: Any) -> list[Any]:
    return callbacks if isinstance(callbacks, list) else [] if callbacks is None else [callbacks]


def _is_progress_bar(callback: Any) -> bool:
    kind = pkgutil.resolve_name(callback.class_path)
    return inspect.isclass(kind) and issubclass(kind, ProgressBar)


def _leave_one_last_checkpoint(callbacks: list[Any]) -> None:
    """Where several `ModelCheckpoint`s would write the state of the same step as last of the same folder, the last of
    them does."""
    seen = set()
    for callback in reversed(callbacks):
        settings = callback.get("init_args") or {}
        if not callback.class_path.endswith(".ModelCheckpoint") or not settings.get("save_last"):
            continue
        if settings.get("dirpath") in seen:
            settings["save_last"] = None
            rank_zero_info("Of two ModelCheckpoints with save_last and one folder the later writes last.ckpt.")
        seen.add(settings.get("dirpath"))


def _is_of_interest(record: logging.LogRecord) -> bool:
    """False for lines of Lightning that advertise, or say what the table before the run says."""
    return not record.getMessage().startswith(("GPU available:", "TPU available:", "HPU available:", "💡 Tip:"))


def train(arguments: list[str] | None = None) -> LitSpecRLCLI:
    """Do what the command line says.

    Args:
        arguments: command line without the program's name; by default that of the process.
    """
    for message in _MISLEADING_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_of_interest)
    if not sys.stderr.isatty():
        disable_progress_bar()  # of transformers, for loading weights
    return LitSpecRLCLI(
        RLVRModule,
        PromptDataModule,
        trainer_class=Trainer,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},  # a resumed run writes into the folder of the first
        trainer_defaults={"log_every_n_steps": 1, "num_sanity_val_steps": 0}
        | {"enable_model_summary": False},  # the table of the run says more
        parser_kwargs={
            "prog": "lit-specrl",
            "exit_on_error": False,
            "allow_abbrev": False,  # a typo must not be taken for a shorter name
            "description": "Reinforcement learning with verifiable rewards. `lit-specrl --help` lists all commands.",
        },
        args=arguments,
    )
