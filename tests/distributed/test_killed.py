"""Runs of one and of two processes that are killed at random moments and go on."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import GenerationConfig

KILLED = Path(__file__).with_name("killed_while_training.py")


@pytest.fixture(scope="module")
def model(make_llama):
    """Three layers, which a drafter's head reads, and many end-of-text tokens."""
    folder = make_llama(num_hidden_layers=3)
    GenerationConfig(eos_token_id=list(range(2, 14))).save_pretrained(folder)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork, process groups and /dev/shm")
@pytest.mark.parametrize(
    ("what", "how", "num_ranks", "num_kills", "num_hits"),
    [
        ("cached", "kill", 1, 30, 20),
        ("plain", "kill", 2, 3, 1),
        ("everything", "kill", 1, 1, 1),
        ("sharded", "kill", 2, 1, 1),
        ("cached", "terminate", 1, 2, 1),
        ("plain", "terminate", 2, 2, 1),
    ],
)
def test_a_run_that_is_stopped_again_and_again_ends_as_one_that_was_not(
    model, tmp_path, what, how, num_ranks, num_kills, num_hits
):
    """The same weights and the same metrics in every step, to the bit; and nothing is left behind."""
    numbers = [str(number) for number in (num_ranks, num_kills, 0)]
    program = [sys.executable, str(KILLED), model, str(tmp_path), what, how, *numbers]
    outcome = subprocess.run(program, capture_output=True, text=True, timeout=300, check=False)
    assert outcome.returncode == 0, outcome.stderr[-5000:]
    assert int(outcome.stdout.split()[-1]) >= num_hits  # kills that found the run in the middle
