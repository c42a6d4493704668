import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "acceptance",
        "acceptance_rates",
        "draft_verification",
        "latency_model",
        "length_schedule",
        "lenience",
        "prompt_lookup",
        "store",
        "text_history",
    ],
)
def test_examples_run(module):
    outcome = doctest.testmod(import_module(f"lit_specrl.speculation.{module}"))
    assert outcome.attempted > 0
    assert outcome.failed == 0
