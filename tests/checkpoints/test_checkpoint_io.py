"""A checkpoint is whole or absent, whatever happens while it is written."""

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from lit_specrl import GRPO, PromptDataModule
from lit_specrl.checkpoints.checkpoint_io import AtomicCheckpointIO
from lit_specrl.data import ArithmeticSource


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def dying(content, path):
    path.write_bytes(b"the first half")
    raise KeyboardInterrupt


def test_a_checkpoint_that_is_not_finished_leaves_the_one_before(tmp_path, monkeypatch):
    writer, path = AtomicCheckpointIO(), tmp_path / "deep" / "last.ckpt"
    of_lightning = {"pytorch-lightning_version": "2.6", "rlvr": {}}
    writer.save_checkpoint({"step": 1}, path)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", dying)
        with pytest.raises(KeyboardInterrupt):
            writer.save_checkpoint({"step": 2}, path)
    assert torch.load(path) == {"step": 1}
    assert names(path.parent) == ["last.ckpt"]

    (path.parent / "last.ckpt.partial-abcd1234").mkdir()  # of a process that was killed
    (path.parent / "last.ckpt.partial").write_text("of an earlier version")
    writer.save_checkpoint({"step": 3} | of_lightning, path.with_name("step=3.ckpt"))
    assert names(path.parent) == ["last.ckpt", "step=3.ckpt"]
    assert writer.load_checkpoint(path.with_name("step=3.ckpt")) == {"step": 3} | of_lightning


def test_a_file_takes_the_place_of_a_folder(tmp_path):
    """A run that was sharded goes on unsharded in the same folder."""
    (tmp_path / "last.ckpt").mkdir()
    (tmp_path / "last.ckpt" / "meta.pt").write_text("")
    AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt") == {"step": 1}
    assert names(tmp_path) == ["last.ckpt"]


class Own(TorchCheckpointIO):
    pass


@pytest.mark.parametrize(
    ("plugins", "expected"), [([], AtomicCheckpointIO), ([Own()], Own), ([AsyncCheckpointIO()], AsyncCheckpointIO)]
)
def test_the_module_replaces_the_default_and_nothing_else(tiny_model, tmp_path, plugins, expected):
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=plugins,
    )
    module = GRPO(tiny_model, [lambda completions, **columns: [1.0] * len(completions)], max_completion_length=3)
    trainer.fit(module, datamodule=PromptDataModule(ArithmeticSource(2), batch_size=2, max_prompt_length=64))
    assert type(trainer.strategy.checkpoint_io) is expected
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer.strategy.teardown()
    assert names(tmp_path) == ["last.ckpt"]
