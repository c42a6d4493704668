"""Inside the micro-batches of a step, the host never waits for the device: it would have nothing to do meanwhile, and
the device then nothing until the host has caught up."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training import arithmetic, grpo, make_trainer

from lit_specrl import PPO
from lit_specrl.models.critic import SeparateCritic, SharedTrunkCritic
from lit_specrl.models.scorer import Scorer

WAITING = {  # the host needs a number of the device, or the size of a result
    *("_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "masked_select", "bincount"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave.Tensor"),
    "lift_fresh",  # a tensor made of Python's numbers, which would have to be copied
}
BY_MASK, MASKS = {"index", "index_put", "index_put_", "_index_put_impl_"}, {torch.bool, torch.uint8}


class Waits(TorchDispatchMode):
    """Notes the operations for which the host would wait, were the tensors on a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, overload = function._schema.name.removeprefix("aten::"), function._schema.overload_name
        by_mask = name in BY_MASK and any(getattr(index, "dtype", None) in MASKS for index in args[1])
        waits = {name, f"{name}.{overload}"} & WAITING and not (name == "lift_fresh" and not args[0].numel())
        if by_mask or waits:
            self.found.append(name + (" by mask" if by_mask else ""))
        return function(*args, **kwargs or {})


@contextmanager
def noted_on_a_cpu(monkeypatch, found):
    """Notes waits; `tolist` and the like read the memory of the host, which no dispatch shows."""
    with monkeypatch.context() as patch, Waits() as waits:
        for name in ("tolist", "numpy", "cpu"):
            method = getattr(torch.Tensor, name)
            patch.setattr(
                torch.Tensor, name, lambda *given, name=name, method=method: found.append(name) or method(*given)
            )
        yield
    found += waits.found


@contextmanager
def refused_on_a_gpu():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def watch_micro_batches(monkeypatch, watching):
    """Watch all micro-batches, from the first pass on: before it, the numbers of all rows are copied."""
    counts = []
    micro_batches = Scorer.micro_batches

    def watched(self, *arguments):
        iterator = micro_batches(self, *arguments)
        found = next(iterator, None)
        counts.append(0)
        with watching():
            while found is not None:
                counts[-1] += 1
                yield found
                found = next(iterator, None)

    monkeypatch.setattr(Scorer, "micro_batches", watched)
    return counts


RUNS = {
    "grpo": lambda model, **options: grpo(model, **options),
    "temperature and truncation": lambda model, **options: grpo(
        model, temperature=0.7, loss_type="grpo", mask_truncated_completions=True, **options
    ),
    "old and reference log-probs": lambda model, **options: grpo(
        model, beta=0.1, num_minibatches=2, num_iterations=2, **options
    ),
    "ratios by sequence": lambda model, **options: grpo(model, loss_type="gspo", epsilon=3e-4, **options),
    "checkpointed": lambda model, **options: grpo(model, gradient_checkpointing=True, **options),
    "adapters": lambda model, **options: grpo(
        model, beta=0.1, lora={"r": 4, "target_modules": "all-linear"}, **options
    ),
    "a critic": lambda model, **options: PPO(
        model, [small_rewards], critic=SeparateCritic(), max_completion_length=12, num_generations=4, **options
    ),
    "a head": lambda model, **options: PPO(
        model, [small_rewards], critic=SharedTrunkCritic(), max_completion_length=12, num_generations=4, **options
    ),
}


def small_rewards(completions, **columns):
    return [len(set(text)) / 10 for text in completions]


@pytest.mark.parametrize("micro_batch_tokens", [50, 10**6], ids=["several passes", "prompts shared"])
@pytest.mark.parametrize("run", RUNS)
def test_no_micro_batch_waits(model_folder, monkeypatch, run, micro_batch_tokens):
    found = []
    counts = watch_micro_batches(monkeypatch, lambda: noted_on_a_cpu(monkeypatch, found))
    module = RUNS[run](model_folder, micro_batch_tokens=micro_batch_tokens)
    make_trainer(limit_train_batches=2).fit(module, datamodule=arithmetic())
    assert max(counts) >= (3 if micro_batch_tokens == 50 else 1)
    assert found == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here; the same is looked at on a CPU above")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("run", RUNS)
def test_no_micro_batch_waits_on_a_gpu(model_folder, monkeypatch, run, precision):
    counts = watch_micro_batches(monkeypatch, refused_on_a_gpu)
    module = RUNS[run](model_folder, micro_batch_tokens=50)
    trainer = make_trainer(accelerator="gpu", precision=precision, limit_train_batches=2)
    trainer.fit(module, datamodule=arithmetic())
    assert max(counts) >= 3


def test_waits_are_noted(monkeypatch):
    found = []
    numbers, mask = torch.tensor([0.0, 2.0]), torch.tensor([False, True])
    with noted_on_a_cpu(monkeypatch, found):
        float(numbers[1])
        bool(mask.any())
        numbers[mask]
        numbers[mask] = 1.0
        numbers[[0, 1]]
        mask.nonzero()
        torch.tensor(3)
        numbers.tolist()
        numbers.cpu()
    assert set(found) >= {"_local_scalar_dense", "index by mask", "nonzero", "lift_fresh", "tolist", "cpu"}
    assert len(found) >= 9
