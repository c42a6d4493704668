"""What `test_fsdp2.py` compares: runs of two processes with sharded weights, and the same runs of one. A program of its
own, for it forks.

Arguments: model, folder. Writes `NAME-NUM_RANKS-RANK.pt` for each of `RUNS`, and a checkpoint of one of them.
"""

import os
import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import torch
from forked_ranks import Ranks, import_vllm
from killed_while_training import learned
from lightning.pytorch.callbacks import ModelCheckpoint
from reuse_runs import GROUP, MAX_LENGTH, fit, grpo, questions, rows_of
from training import small_tokens

from lit_specrl import DAPO, PPO, DynamicSampling, SeparateCritic
from lit_specrl.callbacks import PrefixCache, SpeculativeRollout
from lit_specrl.distributed.fsdp2 import FSDP2Strategy
from lit_specrl.engines import VLLMEngine


def spread_on_the_first_rank(completions, **columns):
    """Rows of a group differ on rank 0 and nowhere else."""
    return [float(row % 2) * (os.environ.get("RANK", "0") == "0") for row in range(len(completions))]


SGD = partial(torch.optim.SGD, lr=0.1)
RUNS = {
    "grpo": partial(grpo, beta=0.1),
    "ppo": lambda model: PPO(
        model,
        [small_tokens],
        critic=SeparateCritic(optimizer=SGD),
        num_generations=GROUP,
        max_completion_length=MAX_LENGTH,
        lam=0.9,
        optimizer=SGD,
    ),
    "lora": partial(grpo, lora={"r": 4, "target_modules": "all-linear"}, beta=0.1),
    "dapo": lambda model: DAPO(
        model,
        [spread_on_the_first_rank],
        num_generations=GROUP,
        max_completion_length=MAX_LENGTH,
        dynamic_sampling=DynamicSampling(max_rounds=2),
        overlong_buffer=0,
        optimizer=SGD,
    ),
    "offload": partial(grpo, gradient_checkpointing=True),
    "bf16": grpo,
    "one engine": grpo,
}


class KeptEngine(VLLMEngine):
    """Outlives the runs that use it, for a start takes seconds."""

    def start(self, *arguments):
        if self.llm is None:
            super().start(*arguments)

    def shutdown(self):
        self.policy_version = None


engine = partial(KeptEngine, dtype="float32", max_num_seqs=16, cpu_kv_cache_gib=0.25, max_model_len=128)
OF_TWO_RANKS = {
    "one engine": partial(engine, tensor_parallel_size=2),
    "lora": partial(engine, merge_adapters=False),  # one rank's are merged
}


def run(name, model, data, engine, num_ranks, *callbacks, **options):
    """Three epochs of one step, which sees all questions; the second and third begin with what the first has said."""
    strategy = FSDP2Strategy(cpu_offload=name == "offload") if num_ranks > 1 else "auto"
    module = RUNS[name](model)
    trace = fit(
        module,
        data,
        SpeculativeRollout(engine),
        PrefixCache(1.5),
        *callbacks,
        devices=num_ranks,
        precision="bf16-mixed" if name == "bf16" else "32-true",
        **{"max_epochs": 3, "strategy": strategy} | options,
    )
    return {
        "weights": {weight: tensor.clone() for weight, tensor in module.policy.named_weights()},
        "dtypes": {parameter.dtype for parameter in module.policy.parameters()},
        "steps": [learned(metrics) for metrics in trace.metrics],
        "hits": trace.of_cache("hit_fraction"),
        "reuse": trace.of_cache("reuse_fraction"),
        "tokens": {
            (epoch, *row): tokens
            for epoch, (rollouts, *_) in enumerate(trace.rounds)
            for row, tokens in zip(rows_of(rollouts), rollouts.response_ids, strict=True)
        },
    }


def main(model, folder, data, num_ranks, names, tell):
    torch.set_num_threads(1)
    rank, own = os.environ.get("RANK", "0"), (OF_TWO_RANKS if num_ranks == 2 else {}).get(names[0], engine)()
    for name in names:
        saver = ModelCheckpoint(folder / f"{name}-{num_ranks}", filename="last") if name in ("grpo", "lora") else None
        found = run(name, model, data, own, num_ranks, *filter(None, [saver]))
        torch.save(found, folder / f"{name}-{num_ranks}-{rank}.pt")
    if num_ranks == 1:  # goes on with what two have saved
        checkpoint = folder / "grpo-2" / "last.ckpt"
        found = run("grpo", model, data, own, 1, max_epochs=5, strategy="fsdp2", ckpt_path=checkpoint)
        torch.save(found, folder / "resumed-1-0.pt")


if __name__ == "__main__":
    model, folder = sys.argv[1], Path(sys.argv[2])
    data = questions(folder, batch_size=4)
    import_vllm()
    of_two = [[name for name in RUNS if name not in OF_TWO_RANKS], *([name] for name in OF_TWO_RANKS)]
    for num_ranks, names in [*((2, names) for names in of_two), (1, [name for name in RUNS if name != "dapo"])]:
        assert not any(Ranks(num_ranks, partial(main, model, folder, data, num_ranks, names)).end())
