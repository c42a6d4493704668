"""What loggers show beyond single curves: one report to all loggers of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L

from lit_specrl.algorithms.rlvr import RLVRModule
from lit_specrl.callbacks.log_sinks import LogSink, Table, sink_of
from lit_specrl.callbacks.rollout_callback import RolloutCallback
from lit_specrl.experience import Experience
from lit_specrl.types import Rollouts

LAYOUT: dict[str, dict[str, list[Any]]] = {
    "reward": {
        "reward": ["Multiline", ["^reward$", "reward_std", "rewards/.*/mean"]],
        "groups without signal": ["Multiline", ["frac_reward_zero_std"]],
        "held-out accuracy": ["Multiline", ["val_accuracy", "val-core/.*"]],
    },
    "rollout": {
        "response length": ["Multiline", ["completions/(mean|min|max)_length"]],
        "cut at the limit": ["Multiline", ["completions/clipped_ratio"]],
        "tokens per second": ["Multiline", ["perf/.*_tokens_per_s"]],
        "engine against policy": ["Multiline", ["sampling/sampling_logp_difference/.*"]],
    },
    "time": {"seconds by stage": ["Multiline", ["timing_s/.*"]]},
    "optimisation": {
        "loss": ["Multiline", ["^loss$"]],
        "gradient norm": ["Multiline", ["actor/grad_norm"]],
        "entropy and KL": ["Multiline", ["^entropy$", "^kl$"]],
        "clipped ratios": ["Multiline", ["clip_ratio/.*"]],
        "padding": ["Multiline", ["perf/padding_fraction"]],
    },
}
"""Tab of the custom scalars page -> chart -> names of the curves in it, as regular expressions."""
CRITIC_LAYOUT = {
    "critic": {
        "value loss": ["Multiline", ["critic/vf_loss"]],
        "explained variance": ["Multiline", ["critic/vf_explained_var"]],
        "values and returns": ["Multiline", ["critic/(values|returns)/mean"]],
        "clipped values": ["Multiline", ["critic/vf_clipfrac"]],
    }
}
ENVIRONMENT_LAYOUT = {
    "environment": {
        "turns": ["Multiline", ["environment/turns"]],
        "tokens that it wrote": ["Multiline", ["environment/observation_tokens"]],
        "rows cut": ["Multiline", ["environment/cut_by_(length|turns)"]],
    }
}
DYNAMIC_SAMPLING_LAYOUT = {
    "dynamic sampling": {
        "rounds": ["Multiline", ["dynamic_sampling/rounds"]],
        "groups": ["Multiline", ["dynamic_sampling/.*_groups"]],
    }
}


def layout_for(module: L.LightningModule, callbacks: Sequence[L.Callback] = ()) -> dict[str, dict[str, list[Any]]]:
    """Tabs for what a module and the callbacks of a run report."""
    layout = dict(LAYOUT)
    for callback in callbacks:
        if isinstance(callback, RolloutCallback):
            layout |= callback.charts()
    if getattr(module, "critic", None) is not None:
        layout |= CRITIC_LAYOUT
    if getattr(module, "environment", None) is not None:
        layout |= ENVIRONMENT_LAYOUT
    if getattr(module, "dynamic_sampling", None):
        layout |= DYNAMIC_SAMPLING_LAYOUT
    return layout


class LoggerReport(RolloutCallback):
    """Groups the curves, and shows completions, lengths and the settings of the run, in each logger as far as it can.

    | logger | curves | settings | completions | response lengths |
    |---|---|---|---|---|
    | `TensorBoardLogger` | tabs of charts | HParams | text | histogram |
    | `WandbLogger` | sections by name | config | table | histogram |
    | `MLFlowLogger` | yes | parameters | Markdown files of the run | JSON files of the run |
    | `CSVLogger` | `metrics.csv` | `hparams.yaml` | `completions.csv` | `completions_length.csv` |
    | another one | yes | `log_hyperparams` | `log_table`, where it has it | `log_histogram`, where it has it |

    Args:
        num_completions: completions shown per report, with prompt, reference answer and rewards; 0 shows none.
        every_n_steps: steps between reports of completions and lengths.
    """

    def __init__(self, num_completions: int = 4, every_n_steps: int = 1) -> None:
        if num_completions < 0 or every_n_steps < 1:
            raise ValueError(
                f"expected num_completions >= 0 and every_n_steps >= 1, got {num_completions} and {every_n_steps}"
            )
        self.num_completions, self.every_n_steps = num_completions, every_n_steps

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for sink in _sinks(trainer):
            sink.charts(layout_for(pl_module, trainer.callbacks))  # type: ignore[attr-defined]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        settings = {**getattr(pl_module, "settings", {}), "optimizer": type(trainer.optimizers[0]).__name__}
        group = trainer.optimizers[0].param_groups[0]
        settings["learning_rate"] = float(group.get("initial_lr", group["lr"]))
        settings["batch_size"] = getattr(trainer.datamodule, "batch_size", "none")  # type: ignore[attr-defined]
        for sink in _sinks(trainer):
            sink.settings(settings)

    def on_experience_end(
        self, trainer: L.Trainer, pl_module: RLVRModule, rollouts: Rollouts, experience: Experience
    ) -> None:
        if pl_module.step % self.every_n_steps:
            return
        for sink in _sinks(trainer):
            sink.histogram("completions/length", rollouts.policy_lengths, pl_module.step)
            if self.num_completions:
                sink.table("completions", completions_table(rollouts, self.num_completions), pl_module.step)


class TensorBoardReport(LoggerReport):
    """`LoggerReport` under its earlier name.

    Args:
        num_completions: as of `LoggerReport`.
        every_n_steps: as of `LoggerReport`.
    """


def completions_table(rollouts: Rollouts, limit: int) -> Table:
    """Completions with their prompts and rewards: the first ones of different prompts before further ones of the same.

    Args:
        rollouts: N rows, scored.
        limit: most rows shown.
    """
    size = rollouts.request.sampling.num_generations
    order = sorted(range(rollouts.num_rows), key=lambda row: (row % size, row))[:limit]
    rows = []
    for row in order:
        owner = rollouts.request.prompt_index(row)
        rewards = [values[row] for values in rollouts.rewards.values()]
        texts = [rollouts.prompts.prompts[owner], rollouts.prompts.answers[owner], rollouts.texts[row]]
        rows.append(
            [*texts, *(None if reward is None else float(reward) for reward in rewards), rollouts.finish_reasons[row]]
        )
    return Table(["prompt", "answer", "completion", *rollouts.rewards, "end"], rows)


def _sinks(trainer: L.Trainer) -> list[LogSink]:
    """Of the rank that logs."""
    return [sink_of(logger) for logger in trainer.loggers] if trainer.is_global_zero else []
