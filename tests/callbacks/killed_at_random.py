"""Kill a run with everything on at random moments, resume it, and count what is left behind.

A program of its own, for it starts processes. Arguments: model, folder, number of kills, random seed. Temporary files
of the run go into a folder of their own. Prints, as JSON, for each process the step it began at, how it ended, and the
files and bytes that it left in the folder of the run and in that for temporary files.
"""

import getpass
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

STEPS = "steps.txt"


def train(model, folder):
    """Go on from the last checkpoint, for ever, as `configs/trainer/resumable.yaml` does."""
    import torch
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from reuse_runs import fit, grpo, questions

    from lit_specrl.callbacks import AdaptiveScheduler, DrafterDistillation, PrefixCache, SpeculativeRollout
    from lit_specrl.drafting import Eagle3Drafter
    from lit_specrl.engines import VLLMEngine

    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            self.tell(f"start {pl_module.step}")

        def on_train_batch_end(self, trainer, pl_module, *arguments):
            self.tell(f"step {pl_module.step}")

        def tell(self, text):
            with (folder.parent / STEPS).open("a") as file:
                file.write(f"{text}\n")

    torch.set_num_threads(1)
    adam = partial(torch.optim.AdamW, lr=3e-3)
    learner = DrafterDistillation(optimizer=adam, update_tokens=24, holdout_fraction=0.3)
    engine = VLLMEngine(dtype="float32", max_num_seqs=16, cpu_kv_cache_gib=0.25, max_model_len=128)
    last = folder / "last.ckpt"
    fit(
        grpo(model, optimizer=adam),
        questions(folder.parent / "data"),
        SpeculativeRollout(engine, Eagle3Drafter(num_speculative_tokens=2)),
        PrefixCache(1.5),
        AdaptiveScheduler(),
        learner,
        ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=1, save_on_train_epoch_end=False),
        Watch(),
        ckpt_path=last if last.exists() else None,
        max_epochs=-1,
        max_steps=-1,
        default_root_dir=folder,
    )


def left_behind(folder):
    """Number of files, and their bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}


def wait_for(folder, process, word, count):
    """Until the process has told of so many starts or steps."""
    path = folder / STEPS
    while process.poll() is None:
        if path.exists() and path.read_text().split().count(word) >= count:
            return True
        time.sleep(0.02)
    return False


def main(model, folder, num_kills, seed):
    (run := folder / "run").mkdir(parents=True)
    (temporary := folder / "temporary").mkdir()
    (folder / "data").mkdir()
    compiled = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"  # where it would be by itself
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(compiled)} | os.environ | {"TMPDIR": str(temporary)}
    randomness, found = random.Random(seed), []
    for number in range(num_kills):
        (folder / STEPS).unlink(missing_ok=True)
        process = subprocess.Popen(
            [sys.executable, __file__, "train", model, str(run)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=(folder / f"errors-{number}.txt").open("w"),
        )
        began = wait_for(folder, process, "start", 1) if randomness.random() < 0.9 or not number else False
        if began:
            wait_for(folder, process, "step", randomness.randrange(4))
        time.sleep(randomness.random())  # a part of them before training
        process.send_signal(signal.SIGKILL)
        status = process.wait()
        lines = (folder / STEPS).read_text().splitlines() if (folder / STEPS).exists() else []
        own = [path.name for path in temporary.iterdir() if path.name.startswith(("lit_specrl", "vllm"))]
        found.append(
            {
                "status": status,
                "began_at": next((int(line.split()[1]) for line in lines if line.startswith("start")), None),
                "ended_at": next((int(line.split()[1]) for line in reversed(lines) if line.startswith("step")), None),
                "checkpoints": sorted(path.name for path in run.glob("*.ckpt")),
                "run": left_behind(run),
                "temporary": sorted(own),
            }
        )
        print(json.dumps(found[-1]), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train(sys.argv[2], Path(sys.argv[3]))
    else:
        main(sys.argv[1], Path(sys.argv[2]), *(int(argument) for argument in sys.argv[3:]))
