"""The text part of a composite model alone, as vLLM generates with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lit_specrl.models.pretrained import check_model_exists

_PART = "language_model."


def text_options(model: str, merge_adapters: bool = True) -> dict[str, Any]:
    """Arguments of `vllm.LLM` with which it builds the text part of a composite model; none for other models.

    What reads images would take memory, wait for weights, and need the packages that prepare images.

    Args:
        model: hub name or folder, maybe a `ModelName`.
        merge_adapters: as of `VLLMEngine`.

    Raises:
        ValueError: adapters are not merged, so that vLLM would read the weights of the text part itself.
    """
    config = check_model_exists(model)
    text = config.get_text_config()
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text.model_type)
    if text is config or architecture is None:
        return {}
    if not merge_adapters:
        raise ValueError(f"merge_adapters=False is not for composite models such as {model!r}; leave it out")

    def text_part(config: PretrainedConfig) -> PretrainedConfig:
        part = config.get_text_config()
        part.architectures = [architecture]
        return part

    return {"hf_overrides": text_part}


def text_weights(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Weights of the text part, under the names that they would have in a model of its own.

    Args:
        weights: of a composite model, or of its text part, as its files name them.

    Example:
        >>> names = "language_model.model.norm.weight", "model.language_model.norm.weight", "vision_tower.norm.weight"
        >>> [name for name, _ in text_weights((name, None) for name in names)]
        ['model.norm.weight', 'model.norm.weight']
    """
    for name, weight in weights:
        if _PART in name or name.startswith("lm_head."):
            yield name.replace(_PART, "", 1), weight
