"""Fixtures of rows that the prefix cache keeps."""

import dataclasses

import numpy as np
import pytest

from lit_specrl.prefix_cache.store import CachedRollout


@pytest.fixture
def cached():
    """Builds a row; log-probs are -0.1 for each token when generated and -0.2 now, unless given."""

    def build(uid="a", sample=0, token_ids=(8, 2), step=0, **fields):
        defaults = {
            "previous_logprobs": np.full(len(token_ids), -0.2, np.float32),
            "generation_logprobs": np.full(len(token_ids), -0.1, np.float32),
            "finish_reason": "stop",
            "policy_version": step,
        }
        return CachedRollout(
            uid=uid, sample=sample, token_ids=np.array(token_ids, np.int32), step=step, **(defaults | fields)
        )

    return build


@pytest.fixture
def plain():
    """All rows of a store as plain values, in the order of writing."""

    def as_plain(store):
        fields = [field.name for field in dataclasses.fields(CachedRollout)]
        rows = [{name: getattr(row, name) for name in fields} for row in store]
        return [
            {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in row.items()}
            for row in rows
        ]

    return as_plain


@pytest.fixture
def varied_rows(cached):
    """Rows that differ in every optional field; the third is empty."""
    return [
        cached("a", 0, [8, 2], step=3, reward=0.1, reward_values={"exact": 0.1, "format": None}, data="4f"),
        cached("a", 1, [8, 8, 8], step=1, finish_reason="length", num_reuses=2, num_equal=3),
        cached("b-1", 0, [], step=2, reward=-1.0, reward_values={}),
        cached("c", 7, [5], step=2, reference_logprobs=np.array([-1.5]), generation_logprobs=np.array([-np.inf])),
    ]
