"""Kill a training process again and again while it saves checkpoints, resume, and compare with a run that was left alone.

A program of its own, for it forks. Prints how many kills found a run that had begun to train and had not ended.
"""

import os
import random
import signal
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from reuse_runs import fit, grpo, questions, weights_of

from lit_specrl.callbacks import PrefixCache

NUM_STEPS, NUM_KILLS = 24, 5
TRAINING, DONE = b"t", b"d"


class Started(Callback):
    """Tells the parent that training has begun."""

    def __init__(self, pipe):
        self.pipe = pipe

    def on_train_start(self, *arguments):
        os.write(self.pipe, TRAINING)


def newest(folder):
    checkpoints = sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    return checkpoints[-1] if checkpoints else None


def train(model, folder, pipe):
    """Go on from the newest checkpoint, until the end; everything about the cache that is worth a warning is an error."""
    warnings.filterwarnings("error", message=".*prefix cache.*")
    torch.set_num_threads(1)
    module = grpo(model, optimizer=partial(torch.optim.AdamW, lr=3e-3))
    checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=1)
    fit(
        module,
        questions(folder),
        PrefixCache(1.5),
        checkpoint,
        Started(pipe),
        ckpt_path=newest(folder),
        max_epochs=-1,  # Lightning 2.6 loses count of an epoch that is resumed at its last step and once more later
        max_steps=NUM_STEPS,
        default_root_dir=folder,
    )
    torch.save(weights_of(module), folder / "final.pt")
    os.write(pipe, DONE)


def start(model, folder):
    """Train in a child; returns its process and where it tells what it does."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    status = 1
    try:
        train(model, folder, writing)
        status = 0
    finally:
        os._exit(status)


def run_to_the_end(model, folder):
    child, reading = start(model, folder)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert os.read(reading, 2) == TRAINING + DONE


def main(model, folder):
    calm, disturbed = folder / "calm", folder / "disturbed"
    for each in (calm, disturbed):
        each.mkdir()
    started_at = time.perf_counter()
    run_to_the_end(model, calm)
    duration_s = time.perf_counter() - started_at

    randomness, num_hits = random.Random(0), 0
    for _ in range(NUM_KILLS):
        child, reading = start(model, disturbed)
        assert os.read(reading, 1) == TRAINING
        time.sleep(duration_s / NUM_KILLS * randomness.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        num_hits += os.read(reading, 1) != DONE
        os.close(reading)
    run_to_the_end(model, disturbed)
    torch.testing.assert_close(torch.load(disturbed / "final.pt"), torch.load(calm / "final.pt"), rtol=0, atol=0)
    print(num_hits)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
