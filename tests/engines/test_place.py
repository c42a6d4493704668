"""On which GPU an engine computes: the one of its policy, whatever number the launcher gave the rank."""

import os

import pytest
import torch

from lit_specrl.engines.vllm import startup


class Stopped(Exception):
    """In place of an engine."""


@pytest.fixture
def started(monkeypatch):
    """What vLLM is given, and what it finds in the environment."""
    seen = {}

    class LLM:
        def __init__(self, **options):
            seen.update(options, rank=os.environ.get("RANK"), local_rank=os.environ.get("LOCAL_RANK"))
            raise Stopped

    def start(device, rank=None):
        if rank is not None:
            monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
            monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 16)
            monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        with pytest.raises(Stopped):
            startup.build_llm("no model", torch.device(device))
        return seen

    monkeypatch.setattr("vllm.LLM", LLM)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return start


@pytest.mark.parametrize(("device", "device_ids"), [("cpu", None), ("cuda:0", None), ("cuda:1", [1])])
def test_a_single_engine_computes_where_its_policy_does(started, device, device_ids):
    found = started(device)
    assert found.get("device_ids") == device_ids
    assert (found["rank"], found["local_rank"]) == (None, None)


@pytest.mark.parametrize(
    ("device", "rank", "launched", "local_rank"),
    [("cuda:3", 1, "1", "3"), ("cuda:1", 9, None, "1"), ("cpu", 9, "1", "1"), ("cpu", 9, None, "9")],
    ids=["devices 2 and 3", "Slurm", "torchrun on CPUs", "CPUs"],
)
def test_one_of_several_computes_where_its_rank_does(started, monkeypatch, device, rank, launched, local_rank):
    if launched is not None:
        monkeypatch.setenv("LOCAL_RANK", launched)
    found = started(device, rank)
    assert (found["rank"], found["local_rank"]) == (str(rank), local_rank)
    assert "device_ids" not in found
    assert (os.environ.get("RANK"), os.environ.get("LOCAL_RANK")) == (None, launched)
