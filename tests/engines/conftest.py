"""Engines that hold the initial weights of a tiny model, and prompts for them."""

import pytest
import torch
from colocated import Colocated, build_engine

PROMPT_LENGTHS = [3, 150, 20, 7]  # the second fills a KV block of 128 tokens, which a sync has to forget


@pytest.fixture(scope="module")
def started(request, tiny_model, tiny_qwen):
    kind, _, model = request.param.partition("-")
    colocated = Colocated(build_engine(kind), tiny_model if model == "llama" else tiny_qwen)
    yield colocated
    colocated.engine.shutdown()


@pytest.fixture
def colocated(started):
    """The engine holding the initial weights."""
    started.policy.load_state_dict(started.initial)
    started.sync()
    return started


@pytest.fixture(scope="session")
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(7, 100, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]
