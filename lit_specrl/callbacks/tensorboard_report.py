"""What TensorBoard shows beyond single curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from lit_specrl.algorithms.rlvr import RLVRModule
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

_RESULTS = ("reward", "val_accuracy", "completions/mean_length")
"""Curves whose latest values stand beside the settings in HParams."""
_NOTHING = "(none)"  # a prompt without reference answer, a reward that does not apply


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


class TensorBoardReport(RolloutCallback):
    """Groups the curves, and shows completions, lengths and the settings of the run in TensorBoard.

    Does nothing with other loggers.

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
        for writer in _writers(trainer):
            writer.add_custom_scalars(layout_for(pl_module, trainer.callbacks))  # type: ignore[attr-defined]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        settings = {**getattr(pl_module, "settings", {}), "optimizer": type(trainer.optimizers[0]).__name__}
        group = trainer.optimizers[0].param_groups[0]
        settings["learning_rate"] = float(group.get("initial_lr", group["lr"]))
        settings["batch_size"] = getattr(trainer.datamodule, "batch_size", "none")  # type: ignore[attr-defined]
        for logger in trainer.loggers if trainer.is_global_zero else []:
            if isinstance(logger, TensorBoardLogger):
                _show_settings(logger, settings)
            else:
                logger.log_hyperparams(settings)

    def on_experience_end(
        self, trainer: L.Trainer, pl_module: RLVRModule, rollouts: Rollouts, experience: Experience
    ) -> None:
        if pl_module.step % self.every_n_steps:
            return
        for writer in _writers(trainer):
            lengths = torch.tensor(rollouts.policy_lengths)
            writer.add_histogram("completions/length", lengths, pl_module.step)
            if self.num_completions:
                writer.add_text("completions", completions_table(rollouts, self.num_completions), pl_module.step)


def completions_table(rollouts: Rollouts, limit: int) -> str:
    """Markdown table of completions: the first ones of different prompts before further ones of the same.

    Args:
        rollouts: N rows, scored.
        limit: most rows shown.
    """
    size = rollouts.request.sampling.num_generations
    order = sorted(range(rollouts.num_rows), key=lambda row: (row % size, row))[:limit]
    lines = ["| " + " | ".join(["prompt", "answer", "completion", *rollouts.rewards, "end"]) + " |"]
    lines.append("|" + "---|" * (4 + len(rollouts.rewards)))
    for row in order:
        owner = rollouts.request.prompt_index(row)
        rewards = [values[row] for values in rollouts.rewards.values()]
        cells = [
            _cell(rollouts.prompts.prompts[owner]),
            _cell(_shown(rollouts.prompts.answers[owner])),
            _cell(rollouts.texts[row]),
            *(_NOTHING if reward is None else f"{reward:.3g}" for reward in rewards),
            rollouts.finish_reasons[row],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(answer: str | None) -> str:
    return _NOTHING if answer is None else answer


def _cell(text: str) -> str:
    """Text as it is, inside a Markdown table: special tokens and formulas must not turn into markup."""
    escaped = (
        text.replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace(">", "&gt;")
        .replace("|", "&#124;")
        .replace("`", "&#96;")
    )
    return f"<code>{escaped}</code>".replace("\n", "</code><br><code>")


def _show_settings(logger: TensorBoardLogger, settings: dict[str, Any]) -> None:
    """The row of the run in HParams. Its results are the curves of these names; Lightning's own way would add a first
    point to them."""
    logger.hparams.update(settings)  # for `hparams.yaml`
    for summary in hparams(settings, dict.fromkeys(_RESULTS, 0.0)):
        logger.experiment.file_writer.add_summary(summary)  # type: ignore[attr-defined]


def _writers(trainer: L.Trainer) -> list[Any]:
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
