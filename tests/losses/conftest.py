import json
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def oracles():
    """What TRL 1.16.0 and verl 0.9.1 computed: see `record_oracles.py`."""
    return json.loads((Path(__file__).parent / "oracles.json").read_text(), object_hook=_tensors_for_lists)


@pytest.fixture(scope="session")
def inputs(oracles):
    return oracles["inputs"]


@pytest.fixture(scope="session")
def loss_mask(inputs):
    """[8, 6] rows of 6, 3, 0, 1, 5, 6, 2 and 4 tokens."""
    return torch.arange(6) < inputs["lengths"][:, None]


def _tensors_for_lists(entries):
    return {name: _tensor(value) if isinstance(value, list) else value for name, value in entries.items()}


def _tensor(value):
    return torch.tensor(_with_nan(value))


def _with_nan(value):
    if isinstance(value, list):
        return [_with_nan(entry) for entry in value]
    return torch.nan if value is None else value
