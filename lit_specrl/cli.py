"""`lit-specrl`: LightningCLI with this library's classes, and the commands beside training."""

from __future__ import annotations

import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

from lit_specrl.environment import check_torchvision

check_torchvision()  # before transformers, whose own message would be about another class

from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI  # noqa: E402

# Imported for their side effect: the CLI takes short names of classes that are imported.
import lit_specrl.algorithms  # noqa: E402
import lit_specrl.callbacks  # noqa: E402
import lit_specrl.critic  # noqa: E402
import lit_specrl.rewards  # noqa: E402
import lit_specrl.rollout  # noqa: E402, F401
from lit_specrl.callbacks import CompletionWriter, RolloutProgressBar, RunPlan, TensorBoardReport  # noqa: E402
from lit_specrl.checkpoint_check import naming  # noqa: E402
from lit_specrl.data import PromptDataModule  # noqa: E402
from lit_specrl.module import RLVRModule  # noqa: E402

_MISLEADING_WARNINGS = [
    r".*isinstance.treespec, LeafSpec",  # Lightning 2.6 with torch 2.13, about its own code
    r".*no pre-optimization state",  # about batches of supervised learning; a checkpoint between two steps is complete
    r".*infer the batch indices",  # about loaders that are a DataLoader
    r".*Total length of `list` across ranks is zero",  # a run without validation data
]


class LitSpecRLCLI(LightningCLI):
    """The command line: any `RLVRModule`, any data module, and four callbacks that every run has.

    A callback of this library that a later file or option names again takes the place of the earlier one.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(RunPlan, "plan")
        parser.add_lightning_class_args(RolloutProgressBar, "progress_bar")
        parser.add_lightning_class_args(TensorBoardReport, "tensorboard")
        parser.add_lightning_class_args(CompletionWriter, "completions")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        trainer = self.config[self.config.subcommand].trainer
        if isinstance(trainer.callbacks, list):
            last = {callback.class_path: callback for callback in trainer.callbacks}
            trainer.callbacks = [
                callback
                for callback in trainer.callbacks
                if not callback.class_path.startswith("lit_specrl.") or last[callback.class_path] is callback
            ]

    def _parse_ckpt_path(self) -> None:
        """Lightning reads settings of the module from the checkpoint, whatever that is; name it where it cannot be read."""
        path = self.config[self.config.subcommand].get("ckpt_path") if self.config.get("subcommand") else None
        with naming(Path(path)) if path and Path(path).is_file() else nullcontext():
            super()._parse_ckpt_path()


def run(arguments: list[str] | None = None) -> LitSpecRLCLI:
    """Do what the command line says.

    Args:
        arguments: command line without the program's name; by default that of the process.
    """
    for message in _MISLEADING_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    return LitSpecRLCLI(
        RLVRModule,
        PromptDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},  # a resumed run writes into the folder of the first
        trainer_defaults={"log_every_n_steps": 1, "num_sanity_val_steps": 0, "max_epochs": 1},
        parser_kwargs={
            "prog": "lit-specrl",
            "description": "Reinforcement learning with verifiable rewards. "
            "`lit-specrl export --help` turns a checkpoint into a HuggingFace folder. "
            "`lit-specrl bench --help` measures the library on this machine. "
            "`lit-specrl drafter --help` makes a drafter for speculative rollouts.",
        },
        args=arguments,
    )


def main() -> None:
    """Entry point of `lit-specrl`."""
    if sys.argv[1:2] == ["export"]:
        from lit_specrl.export import export_command

        export_command(sys.argv[2:])
    elif sys.argv[1:2] == ["bench"]:
        from lit_specrl.bench.command import bench_command

        bench_command(sys.argv[2:])
    elif sys.argv[1:2] == ["drafter"]:
        from lit_specrl.drafter_command import drafter_command

        drafter_command(sys.argv[2:])
    else:
        run()


if __name__ == "__main__":
    main()
