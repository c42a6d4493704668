"""`lit-specrl drafter`: a drafter for a policy and a task, before the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_specrl.checkpoints.locks import ProcessFolder
from lit_specrl.cli.fit_config import Configuration, fit_configuration


def make_drafter(
    fit_arguments: Sequence[str],
    output: str,
    head: str | None = None,
    draft_model: str | None = None,
    rollouts: str | None = None,
    num_rollouts: int = 512,
    num_passes: int = 6,
    learning_rate: float = 1e-3,
    vocabulary_size: int | None = None,
    num_speculative_tokens: int | None = None,
    loss: str = "kl",
) -> None:
    """Make a drafter that knows the task, before training the policy.

    The policy of a configuration of `lit-specrl fit` answers its training prompts, and a drafter is trained on the
    responses. The policy is not changed. By default the drafter is a new EAGLE-3 head. `Eagle3Drafter` takes its
    folder:

      lit-specrl drafter --config recipes/quickstart.yaml --output drafter
      lit-specrl fit --config recipes/quickstart.yaml --config configs/callbacks/eagle3.yaml

    Args:
        fit_arguments: configurations and options of `lit-specrl fit`.
        output: folder that the drafter goes to: a new one, an empty one, or an older drafter, which it replaces.
        head: EAGLE-3 head to go on with; by default a new one.
        draft_model: small causal language model to train instead of a head.
        rollouts: JSONL file of responses to learn from; by default the policy generates them.
        num_rollouts: responses to learn from.
        num_passes: passes over them.
        learning_rate: highest learning rate.
        vocabulary_size: tokens that a new head can draft; by default 4096.
        num_speculative_tokens: tokens drafted in a row; by default 3.
        loss: what training makes small: the divergence from the policy ("kl"), the probability that a token is rejected
            ("tv"), or the share of a draft that is lost from its first rejection on ("acceptance").

    Raises:
        ValueError: both a head and a draft model, a value that `DrafterPretraining` refuses, or a run that ended before
            the drafter was trained.
    """
    if head is not None and draft_model is not None:
        raise ValueError("--head and --draft_model are two drafters; give one of them")
    options = {
        "output": output,
        "head": head,
        "draft_model": draft_model,
        "rollouts": rollouts,
        "num_rollouts": num_rollouts,
        "num_passes": num_passes,
        "learning_rate": learning_rate,
        "vocabulary_size": vocabulary_size,
        "num_speculative_tokens": num_speculative_tokens,
        "loss": loss,
    }
    configuration = pretraining_configuration(fit_configuration(fit_arguments), options)
    with ProcessFolder("configuration") as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(configuration), "utf-8")
        from lit_specrl.cli.fit import train  # imports torch, which the help need not wait for

        run = train(["fit", "--config", str(path)])
    if not any(getattr(callback, "is_done", False) for callback in run.trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError(
            f"no drafter was written to {output}: the run ended before it was trained. Check that the configuration "
            "has training prompts and that trainer.limit_train_batches is not 0"
        )


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
    # the run ends before its first step, also where it goes on from a run that has ended
    trainer |= {"logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0, "min_epochs": 0}
    trainer |= {"max_epochs": -1, "max_steps": -1, "min_steps": None, "max_time": None}
    return configuration
