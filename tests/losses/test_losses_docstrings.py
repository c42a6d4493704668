import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "advantages",
        "losses.aggregation",
        "losses.importance",
        "losses.kl",
        "losses.loss_types",
        "losses.policy_loss",
        "losses.value_loss",
        "masking",
    ],
)
def test_examples_run(module):
    outcome = doctest.testmod(import_module(f"lit_specrl.{module}"))
    assert outcome.attempted > 0
    assert outcome.failed == 0
