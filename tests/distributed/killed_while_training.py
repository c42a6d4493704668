"""Kill a run again and again at random moments, resume it, and compare with a run that was left alone.

A program of its own, for it forks. Arguments: model, folder, what is trained, "kill" or "terminate", number of ranks,
of kills, and the random seed. Runs that are killed save a checkpoint in every step; those that are terminated (SIGTERM)
when they are told to end. Prints how many kills found a run that had begun to train and had not ended.
"""

import contextlib
import json
import os
import random
import sys
import time
import warnings
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import torch
from forked_ranks import Ranks, import_vllm
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from reuse_runs import fit, grpo, questions
from training import QUESTIONS

from lit_specrl.callbacks import AdaptiveScheduler, DrafterDistillation, PrefixCache, SpeculativeRollout
from lit_specrl.drafting import Eagle3Drafter
from lit_specrl.engines import VLLMEngine

ADAM = partial(torch.optim.AdamW, lr=3e-3)


def cached():
    return [PrefixCache(1.5)]


def everything():
    """All that learns, decides or remembers."""
    engine = VLLMEngine(dtype="float32", max_num_seqs=16, cpu_kv_cache_gib=0.25, max_model_len=128)
    learner = DrafterDistillation(
        max_step_fraction=None, optimizer=ADAM, update_tokens=24, holdout_fraction=0.3, every_n_steps=2
    )
    drafter = Eagle3Drafter(num_speculative_tokens=2, sampled=False)
    return [SpeculativeRollout(engine, drafter), PrefixCache(1.5), AdaptiveScheduler(), learner]


RUNS = {  # callbacks, strategy of several ranks, steps
    "plain": (list, "ddp", 20),
    "cached": (cached, "ddp", 40),
    "sharded": (everything, "fsdp2", 6),
    "everything": (everything, "auto", 8),
}


class Watch(Callback):
    """Tells that training has begun, and keeps what each step reports."""

    def __init__(self, folder, tell):
        self.folder, self.tell = folder, tell

    def on_train_start(self, trainer, pl_module):
        if trainer.is_global_zero:
            self.tell()

    def on_train_batch_end(self, trainer, pl_module, *arguments):
        if trainer.is_global_zero:
            (self.folder / f"metrics-{pl_module.step:03d}.json").write_text(json.dumps(learned(pl_module.step_metrics)))


def learned(metrics):
    """What a step reports, without what depends on the clock."""
    clock = ("timing_s/", "perf/", "speculation/", "drafter/train_s")
    return {name: value for name, value in metrics.items() if not name.startswith(clock)}


def newest(folder):
    checkpoints = sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    return checkpoints[-1] if checkpoints else None


def train(model, data, folder, what, how, num_ranks, tell):
    """Go on from the newest checkpoint, until the end; everything that is worth a warning about what is kept is an
    error."""
    for message in (".*prefix cache.*", ".*responses that the drafter.*"):
        warnings.filterwarnings("error", message=message)
    torch.set_num_threads(1)
    callbacks, strategy, num_steps = RUNS[what]
    module = grpo(model, optimizer=ADAM)
    checkpoint = ModelCheckpoint(
        folder,
        filename="{step}",
        every_n_train_steps=1 if how == "kill" else num_steps,
        save_top_k=1,
        save_on_exception=how == "terminate",
    )
    fit(
        module,
        data,
        *callbacks(),
        checkpoint,
        Watch(folder, tell),
        ckpt_path=newest(folder),
        max_epochs=num_steps // (len(QUESTIONS) // data.batch_size),
        default_root_dir=folder,
        strategy=strategy if num_ranks > 1 else "auto",
        devices=num_ranks,
    )
    torch.save(dict(module.policy.named_weights()), folder / f"final-{os.environ.get('RANK', 0)}.pt")


def left_in_shared_memory():
    """Names that no living process has mapped; those of tests that run beside this one are in use."""
    names = set(os.listdir("/dev/shm"))
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # the process has ended, or is another user's
            text = maps.read_text("utf-8", "replace")
            names = {name for name in names if f"/dev/shm/{name}" not in text}
    return names


def main(model, folder, what, how, num_ranks, num_kills, seed):
    calm, disturbed = folder / "calm", folder / "disturbed"
    for each in (calm, disturbed):
        each.mkdir()
    data = questions(folder, batch_size=2 * num_ranks)

    def start(folder):
        return Ranks(num_ranks, partial(train, model, data, folder, what, how, num_ranks))

    if RUNS[what][0] is everything:
        import_vllm()
    shared_memory = left_in_shared_memory()
    ranks = start(calm)
    assert ranks.wait_for_training()
    started_at = time.perf_counter()
    assert not any(ranks.end())
    duration_s = time.perf_counter() - started_at

    randomness, num_hits = random.Random(seed), 0
    for _ in range(num_kills):
        ranks = start(disturbed)
        if ranks.wait_for_training():  # otherwise there is nothing left to do
            time.sleep(duration_s / num_kills / 2 * randomness.random())  # a part of it is the end of the process
        num_hits += ranks.kill() if how == "kill" else ranks.terminate()
    ranks = start(disturbed)
    assert not any(ranks.end())

    for expected in calm.glob("final-*.pt"):
        found = torch.load(disturbed / expected.name)
        torch.testing.assert_close(found, torch.load(expected), rtol=0, atol=0)
    reports = sorted(calm.glob("metrics-*.json"))
    assert len(reports) == RUNS[what][2]
    for report in reports:
        assert json.loads((disturbed / report.name).read_text()) == json.loads(report.read_text()), report.name
    assert not list(disturbed.rglob("*.partial*")), list(disturbed.rglob("*.partial*"))
    assert not (left := left_in_shared_memory() - shared_memory), left
    print(num_hits)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:5], *(int(argument) for argument in sys.argv[5:]))
