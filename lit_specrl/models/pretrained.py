"""Loading a model from the hub or a local folder, and what to say where that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from lit_specrl.models.model_files import check_weights, is_out_of_reach
from lit_specrl.models.model_name import hub_options


def load_pretrained(
    auto_class: Any,
    name_or_path: str,
    dtype: str = "float32",
    gradient_checkpointing: bool = False,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Load a model for training from the hub or a local folder; arguments as those of `Policy.build`.

    Args:
        auto_class: `AutoModelForCausalLM`, or `AutoModel` for the backbone alone.
        name_or_path: a `ModelName` where a revision is meant, or code of the model may run.

    Raises:
        ValueError: the model can neither be found locally nor fetched.
    """
    config = check_model_exists(name_or_path)
    for name in _DROPOUT.intersection(vars(config.get_text_config())):  # some models apply it as a function
        setattr(config.get_text_config(), name, 0.0)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "config": config} | hub_options(name_or_path)
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    check_weights(name_or_path)
    try:
        model = auto_class.from_pretrained(name_or_path, **options)
    except OSError as error:
        if Path(name_or_path).is_dir():
            raise ValueError(f"the model folder {name_or_path} cannot be loaded: {_first_line(error)}") from error
        raise ValueError(unreachable_model_message(name_or_path)) from error
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


_DROPOUT = {"attention_dropout", "dropout", "activation_dropout", "hidden_dropout", "layerdrop"}


def unreachable_model_message(name_or_path: str) -> str:
    revision = hub_options(name_or_path).get("revision")
    if revision is not None:
        return (
            f"the hub does not deliver revision {revision!r} of model {name_or_path!r} now; check the spelling, or "
            f"fetch it where there is a network with `hf download {name_or_path} --revision {revision}`"
        )
    return (
        f"model {name_or_path!r} is neither a folder in the transformers format (with config.json) nor a model that "
        "the hub delivers now; check the spelling, pass a local folder, or fetch it where there is a network with "
        f"`hf download {name_or_path}`"
    )


def check_model_exists(name_or_path: str) -> PretrainedConfig:
    """The configuration of a model; fails early, before weights are read, when it cannot be had.

    Raises:
        ValueError: neither a local folder with a config nor a model that the hub delivers.
    """
    if is_out_of_reach(name_or_path):
        raise ValueError(unreachable_model_message(name_or_path))
    try:
        return AutoConfig.from_pretrained(name_or_path, **{"trust_remote_code": False} | hub_options(name_or_path))
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"model {name_or_path!r} comes with modelling code of its own; read it, and let it run with "
                "trust_remote_code: true"
            ) from error
        if (Path(name_or_path) / "config.json").is_file():
            raise ValueError(
                f"the configuration of model {name_or_path!r} cannot be used: {_first_line(error)}"
            ) from error
        raise ValueError(unreachable_model_message(name_or_path)) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def disable_dropout(model: nn.Module) -> None:
    """Old and new log-probs, or values, must come from the same function."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
