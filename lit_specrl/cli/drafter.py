"""`lit-specrl drafter`: a drafter for a policy and a task, before the run."""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import yaml

from lit_specrl.checkpoints.locks import ProcessFolder
from lit_specrl.cli.fit_config import Configuration, fit_configuration

_DESCRIPTION = """Make a drafter that knows the task, before training the policy.

The policy of a configuration of `lit-specrl fit` answers its training prompts, and a drafter is trained on what it says. The policy is not
changed. By default the drafter is a new EAGLE-3 head; its folder is what `Eagle3Drafter` takes:

  lit-specrl drafter --config recipes/quickstart.yaml --output drafter
  lit-specrl fit --config recipes/quickstart.yaml --config configs/callbacks/eagle3.yaml

Everything that is not an option of this command is one of `lit-specrl fit`."""


def drafter_command(arguments: list[str]) -> None:
    """`lit-specrl drafter --config FILE --output FOLDER [options of the command and of fit]`."""
    options, fit_arguments = _parser().parse_known_args(arguments)
    from lit_specrl.cli.fit import train  # imports torch, which the help need not wait for

    configuration = pretraining_configuration(fit_configuration(fit_arguments), vars(options))
    with ProcessFolder("configuration") as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(configuration), "utf-8")
        train(["fit", "--config", str(path)])


def pretraining_configuration(configuration: Configuration, options: dict[str, Any]) -> Configuration:
    """The configuration of a run that trains a drafter in place of the policy.

    Args:
        configuration: of `lit-specrl fit`, all settings.
        options: of `lit-specrl drafter`.
    """
    draft_model, rate = options.pop("draft_model"), options.pop("learning_rate")
    head = options.pop("head")
    arguments = {name: value for name, value in options.items() if value is not None}
    arguments["optimizer"] = {
        "class_path": "torch.optim.AdamW",
        "init_args": {"lr": rate, "betas": [0.9, 0.95], "weight_decay": 0.0},
    }
    for kind, model in (("Eagle3Drafter", head), ("DraftModel", draft_model)):
        if model is not None:
            arguments["drafter"] = {"class_path": f"lit_specrl.drafting.{kind}", "init_args": {"model": model}}
    trainer = configuration["trainer"]
    engines = [callback for callback in trainer["callbacks"] if callback["class_path"].endswith(".SpeculativeRollout")]
    for callback in engines:
        callback["init_args"]["drafter"] = None
    pretraining = {"class_path": "lit_specrl.callbacks.DrafterPretraining", "init_args": arguments}
    trainer["callbacks"] = [*engines, pretraining]
    # the run ends before its first step
    trainer |= {"logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0, "min_epochs": 0}
    return configuration


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="lit-specrl drafter",
        usage="%(prog)s --config FILE [--config FILE ...] --output FOLDER [options] [options of lit-specrl fit]",
        description=_DESCRIPTION,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", required=True, help="folder that the drafter goes to")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--head", help="EAGLE-3 head to go on with (default: a new one)")
    start.add_argument("--draft_model", help="small causal language model to train instead of a head")
    parser.add_argument("--rollouts", help="JSONL file of responses to learn from (default: the policy generates)")
    parser.add_argument("--num_rollouts", type=int, default=512, help="responses to learn from (default: 512)")
    parser.add_argument("--num_passes", type=int, default=6, help="passes over them (default: 6)")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="highest learning rate (default: 0.001)")
    parser.add_argument("--vocabulary_size", type=int, help="tokens that a new head can draft (default: 4096)")
    parser.add_argument("--num_speculative_tokens", type=int, help="tokens drafted in a row (default: 3)")
    return parser
