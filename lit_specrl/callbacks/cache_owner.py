"""What the rows of a prefix cache belong to, and what of them another run may take."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import xxhash
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_specrl.algorithms.rlvr import RLVRModule
from lit_specrl.models.model_name import full_name
from lit_specrl.prefix_cache.store import RolloutStore

_NOT_OF_THE_ARCHITECTURE = {
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype"),
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states"),
}


def identity_of(module: RLVRModule) -> dict[str, str]:
    """What log-probs and token ids belong to: with another architecture, tokenizer or temperature they mean nothing.

    The name of the model is no part of it: a folder may be moved, and the weights are the checkpoint's.
    """
    assert module.policy is not None
    config = module.policy.model.config.to_dict()
    architecture = {name: value for name, value in config.items() if name not in _NOT_OF_THE_ARCHITECTURE}
    return {
        "architecture": _digest(architecture),
        "tokenizer": _digest(module.tokenizer.get_vocab()),
        "temperature": str(module.sampling.temperature),
    }


def settings_of(module: RLVRModule) -> dict[str, Any]:
    """What rewards and reference log-probs belong to beside it."""
    return {
        "model": full_name(module.model_name),
        "max_completion_length": module.sampling.max_completion_length,
        "rewards": module.worker.scored_by,
    }


def drop_what_is_of_others(store: RolloutStore, before: dict[str, Any], module: RLVRModule) -> None:
    """Forget rewards and reference log-probs that are not those of a module.

    Args:
        store: rows of a run of the same identity.
        before: `settings_of` its module.
        module: of the run that goes on with them.
    """
    now = settings_of(module)
    has_other_rewards = before.get("rewards") != now["rewards"]
    if has_other_rewards:
        rank_zero_info("rewards or their settings are not those of the cached rows: reused rows are scored again")
    if has_other_rewards or before["max_completion_length"] != now["max_completion_length"]:
        store.put([row.without_rewards() for row in store])
    if before["model"] != now["model"]:  # the policy goes on, or is the checkpoint's; the reference is another one
        store.put([replace(row, reference_logprobs=None) for row in store])


def _digest(value: dict[str, Any]) -> str:
    """The same for the same content, in whatever order it was written."""
    return xxhash.xxh3_64_hexdigest(json.dumps(value, sort_keys=True, default=str).encode())
