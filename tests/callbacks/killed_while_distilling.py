"""Train with a drafter that learns, from the newest checkpoint on, in processes that kill themselves.

A program of its own, for it forks. Arguments: model, and for each process "FOLDER:WHERE". WHERE is "train", "publish"
or "never": the third drafter's update, or the second publication, of this process is never finished. Prints how each
has ended.
"""

import os
import signal
import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import torch
from forked_ranks import Ranks, import_vllm
from lightning.pytorch.callbacks import ModelCheckpoint
from reuse_runs import fit, grpo, questions
from training import weights_of

from lit_specrl.callbacks import DrafterDistillation, SpeculativeRollout
from lit_specrl.drafting import Eagle3Drafter
from lit_specrl.drafting.distillation.trainer import DrafterTrainer
from lit_specrl.engines import VLLMEngine

NUM_STEPS = 8


def dies_at(function, number):
    """The function, whose call of this number begins and never ends."""
    calls = []

    def call(self, first, *arguments):
        calls.append(None)
        if len(calls) == number:
            if not isinstance(first, list):  # weights, of which the engine has got the first
                next(iter(first))
            os.kill(os.getpid(), signal.SIGKILL)
        return function(self, first, *arguments)

    return call


def main(model, folder, where):
    torch.set_num_threads(1)
    if where == "train":
        DrafterTrainer.update = dies_at(DrafterTrainer.update, 3)
    if where == "publish":
        VLLMEngine.load_drafter_weights = dies_at(VLLMEngine.load_drafter_weights, 2)
    learner = DrafterDistillation(
        max_step_fraction=None, optimizer=partial(torch.optim.AdamW, lr=3e-3), update_tokens=24, holdout_fraction=0.3
    )
    engine = VLLMEngine(dtype="float32", max_num_seqs=16, cpu_kv_cache_gib=0.25, max_model_len=128)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=1)
    checkpoints = sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    module = grpo(model, optimizer=partial(torch.optim.AdamW, lr=3e-3))
    fit(
        module,
        questions(folder),
        SpeculativeRollout(engine, Eagle3Drafter(num_speculative_tokens=2)),
        learner,
        saver,
        ckpt_path=checkpoints[-1] if checkpoints else None,
        max_epochs=-1,
        max_steps=NUM_STEPS,
        default_root_dir=folder,
    )
    drafter = {f"drafter.{name}": weight for name, weight in learner.network.weights()}
    torch.save(weights_of(module) | drafter | {"version": torch.tensor(learner.version)}, folder / "final.pt")


if __name__ == "__main__":
    import_vllm()
    statuses = []
    for folder, _, where in (argument.rpartition(":") for argument in sys.argv[2:]):
        process = Ranks(1, lambda tell, folder=Path(folder), where=where: main(sys.argv[1], folder, where))
        statuses += process.end()
    print(*statuses)
