"""Two processes on one machine: different prompts, rewards that apply on one rank only, one policy."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

SCRIPT = """
import sys
import lightning as L, torch
from lightning.pytorch.strategies import DDPStrategy
from lit_specrl import GRPO, PromptDataModule
from lit_specrl.data import ArithmeticSource

def small(prompts, completions, completion_ids, **columns):
    return [sum(token < 60 for token in ids) / len(ids) for ids in completion_ids]

def even_sums(prompts, completions, answer, **columns):
    return [None if int(value) % 2 else 0.5 for value in answer]

if __name__ == "__main__":
    trainer = L.Trainer(
        strategy=DDPStrategy(process_group_backend="gloo"), accelerator="cpu", devices=2, max_epochs=1, limit_train_batches=3,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, log_every_n_steps=1,
    )
    module = GRPO(
        sys.argv[1], rewards=[small, even_sums], num_generations=4, max_completion_length=12, micro_batch_tokens=64,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
    )
    data = PromptDataModule(ArithmeticSource(16), validation=ArithmeticSource(6, split="validation"), batch_size=2, max_prompt_length=64)
    trainer.fit(module, datamodule=data)
    weights = torch.cat([parameter.detach().flatten() for parameter in module.policy.parameters()])
    torch.save(
        {"weights": weights, "reward": module.step_metrics["reward"], "accuracy": module.evaluation["val_accuracy"]},
        f"{sys.argv[2]}/rank{trainer.global_rank}.pt",
    )
"""


def test_two_ranks_learn_one_policy_from_their_own_prompts(tiny_model, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run(
        [sys.executable, str(script), tiny_model, str(tmp_path)], env=environment, check=True, timeout=240, cwd=tmp_path
    )
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    assert first["reward"] != second["reward"]
    assert first["accuracy"] == second["accuracy"]
    start = AutoModelForCausalLM.from_pretrained(tiny_model).parameters()
    assert not torch.equal(first["weights"], torch.cat([parameter.detach().flatten() for parameter in start]))
