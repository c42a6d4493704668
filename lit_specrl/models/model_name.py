"""The name of a model, with what else decides which model that is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from transformers import AutoModelForCausalLM, PretrainedConfig


class ModelName(str):
    """A hub name or local folder that remembers which revision of it is meant, and whether its own code may run.

    It is a string, and goes wherever one goes: to config, tokenizer, weights, reference, engine and drafter.

    Args:
        name: hub name or local folder, in the transformers format.
        revision: branch, tag or commit on the hub; `None` for the main branch.
        trust_remote_code: run the modelling code that the repository or folder brings along.

    Raises:
        ValueError: a revision of a local folder.

    Example:
        >>> hub_options(ModelName("Qwen/Qwen3-0.6B", revision="c1899de")), hub_options("Qwen/Qwen3-0.6B")
        ({'revision': 'c1899de'}, {})
    """

    revision: str | None
    trust_remote_code: bool

    def __new__(cls, name: str, revision: str | None = None, trust_remote_code: bool = False) -> ModelName:
        if revision is not None and Path(name).is_dir():
            raise ValueError(
                f"revision={revision!r} is of a model on the hub, and {name!r} is a folder; leave revision out, or "
                "give the model's hub name"
            )
        self = super().__new__(cls, name)
        self.revision, self.trust_remote_code = revision, trust_remote_code
        return self


def hub_options(model: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` beside the name; none for a plain string.

    Args:
        model: hub name or folder, maybe a `ModelName`.
    """
    revision = getattr(model, "revision", None)
    trust = {"trust_remote_code": True} if getattr(model, "trust_remote_code", False) else {}
    return ({} if revision is None else {"revision": revision}) | trust


def code_options(model: str, config: PretrainedConfig) -> dict[str, Any]:
    """Arguments of `from_config` for a model of which no weights are read.

    Args:
        model: as of `hub_options`.
        config: of the model.
    """
    options = hub_options(model)
    if not options.get("trust_remote_code") or not hasattr(config, "auto_map"):
        return {}
    code_revision = {"code_revision": options["revision"]} if "revision" in options else {}
    # transformers 5.19 takes no revision of code that it has read before
    was_read = type(config).__module__.startswith("transformers_modules") and type(config) in _known_configs()
    return {"trust_remote_code": True} | ({} if was_read else code_revision)


def _known_configs() -> Any:
    return cast(Any, AutoModelForCausalLM)._model_mapping


def full_name(model: str) -> str:
    """The name with its revision, if it has one, as in "Qwen/Qwen3-0.6B@c1899de"."""
    revision = hub_options(model).get("revision")
    return str(model) if revision is None else f"{model}@{revision}"
