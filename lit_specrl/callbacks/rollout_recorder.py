"""Every rollout of a run on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import lightning as L

from lit_specrl.algorithms.rlvr import RLVRModule
from lit_specrl.callbacks.rollout_callback import RolloutCallback
from lit_specrl.checkpoints.atomic_files import atomic_file
from lit_specrl.experience import Experience
from lit_specrl.types import Rollouts


class RolloutRecorder(RolloutCallback):
    """Writes the rollouts of each step into a file of their own and deletes the oldest files beyond a limit.

    Files are called `step-00000012.jsonl`, with the rank in the name when there are several, and appear whole.

    Args:
        dirpath: folder of the files; by default `rollouts` in the folder of the logger.
        file_format: "jsonl" or "parquet".
        max_bytes: most bytes kept in the folder by this rank; the newest step is always kept.
    """

    def __init__(
        self, dirpath: str | None = None, file_format: Literal["jsonl", "parquet"] = "jsonl", max_bytes: int = 2**30
    ) -> None:
        if file_format not in ("jsonl", "parquet"):
            raise ValueError(f"file_format must be 'jsonl' or 'parquet', got {file_format!r}")
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be positive, got {max_bytes}")
        self.dirpath, self.file_format, self.max_bytes = dirpath, file_format, max_bytes

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = trainer.logger.log_dir if trainer.logger is not None and self.dirpath is None else None
        self.folder = Path(self.dirpath or Path(folder or trainer.default_root_dir, "rollouts"))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._rank = f"-rank{trainer.global_rank}" if trainer.world_size > 1 else ""

    def on_experience_end(
        self, trainer: L.Trainer, pl_module: RLVRModule, rollouts: Rollouts, experience: Experience
    ) -> None:
        path = self.folder / f"step-{pl_module.step:08d}{self._rank}.{self.file_format}"
        records = rollout_records(rollouts, experience, pl_module.step)
        with atomic_file(path) as partial:
            if self.file_format == "jsonl":
                partial.write_text(
                    "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8"
                )
            else:
                import pyarrow as pa
                import pyarrow.parquet as pq

                pq.write_table(pa.Table.from_pylist(records), partial)
        self._delete_oldest()

    def _delete_oldest(self) -> None:
        files = self.folder.glob(f"step-{'[0-9]' * 8}{self._rank}.{self.file_format}")
        kept_bytes = 0
        for index, file in enumerate(sorted(files, key=lambda file: -file.stat().st_mtime_ns)):
            kept_bytes += file.stat().st_size
            if index and kept_bytes > self.max_bytes:
                file.unlink()


def rollout_records(rollouts: Rollouts, experience: Experience, step: int) -> list[dict[str, Any]]:
    """One record per row, of plain values; its advantage is the mean over the tokens that have one.

    Args:
        rollouts: N rows, scored.
        experience: of the same N rows.
        step: training step they belong to.
    """
    # the same for all tokens of a row, but 0 where `top_entropy_quantile` leaves tokens out; by token under GAE
    learned = experience.advantages != 0  # [N, R]
    advantages = (experience.advantages.sum(-1) / learned.sum(-1).clamp(min=1)).tolist()
    prompts = rollouts.prompts
    return [
        {
            "step": step,
            "policy_version": rollouts.policy_version,
            "uid": prompts.uids[owner],
            "source": prompts.sources[owner],
            "prompt": prompts.prompts[owner],
            "answer": prompts.answers[owner],
            "completion": rollouts.texts[row],
            "completion_ids": rollouts.response_ids[row],
            "finish_reason": rollouts.finish_reasons[row],
            "reward": rollouts.total_rewards[row],
            "advantage": advantages[row],
            **_of_turns(rollouts, row),
            **{f"reward/{name}": values[row] for name, values in rollouts.rewards.items()},
        }
        for row in range(rollouts.num_rows)
        for owner in [rollouts.request.prompt_index(row)]
    ]


def _of_turns(rollouts: Rollouts, row: int) -> dict[str, Any]:
    """What the policy said of a row with an environment, and which tokens it read."""
    if not rollouts.episodes:
        return {}
    episode = rollouts.episodes[row]
    return {"turns": episode.turns, "observation_mask": [int(observed) for observed in episode.observation_mask]}
