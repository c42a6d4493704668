"""Weights under the names, and in the pieces, that files of a model have, which is how engines read them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

_LAYER = re.compile(r".*?\.\d+\.")  # "model.layers.3."


def saved_weights(model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """What `save_pretrained` would write of given weights, a layer at most at a time.

    transformers 5 computes with the experts of a layer in one tensor, and with the text part of a composite model under
    shorter names. Its files keep the old pieces and names.

    Args:
        model: whose weights they are.
        weights: (name in the model, whole tensor) pairs, in the model's order.
    """
    conversions = cast(Any, model)._weight_conversions if hasattr(model, "_weight_conversions") else None
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    if not conversions:
        yield from weights
        return
    has_pieces = any(isinstance(conversion, WeightConverter) for conversion in conversions)
    group, layer = dict[str, Tensor](), ""
    for name, weight in weights:
        found = _LAYER.match(name)
        here = found.group() if has_pieces and found else name
        if group and here != layer:
            yield from revert_weight_conversion(model, group).items()
            group = {}
        group[name], layer = weight, here
    yield from revert_weight_conversion(model, group).items()
