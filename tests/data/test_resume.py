"""Resume through the real Trainer: which prompts each training step sees."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_specrl.data import FileSource, PromptDataModule, PromptTemplate


class Recorder(L.LightningModule):
    """Notes the uids of each training step, with those that the step draws."""

    def __init__(self, tokenizer, manual, drawing):
        super().__init__()
        self.drawing = drawing
        self.tokenizer = tokenizer
        self.automatic_optimization = not manual
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch):
        drawn = self.trainer.train_dataloader.draw(1 + self.global_step % 3).uids if self.drawing else []
        self.seen.append(batch.uids + drawn)
        loss = self.weight.sum()
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def validation_step(self, batch):
        self.log("val_accuracy", 0.5, batch_size=len(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "letters.jsonl"
    path.write_text("".join(f'{{"question": "A {n}", "answer": "{n}"}}\n' for n in range(11)))
    return str(path)


@pytest.fixture
def run(tokenizer, questions, tmp_path):
    def fit(folder, checkpoint=None, manual=False, drawing=False, saving=None, **trainer_arguments):
        module = Recorder(tokenizer, manual, drawing)
        data = PromptDataModule(
            FileSource(questions), validation=FileSource(questions, limit=2), template=PromptTemplate(), batch_size=3
        )
        saver = ModelCheckpoint(tmp_path / folder, filename="{step}-{epoch}", save_top_k=-1, **(saving or {}))
        trainer = L.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[saver],
            **trainer_arguments,
        )  # fmt: skip
        trainer.fit(module, data, ckpt_path=checkpoint)
        return module.seen

    return fit


SAVING = {
    "after each step": {"every_n_train_steps": 1},
    "after each validation": {"monitor": "val_accuracy"},
    "after each epoch": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
}
LENGTH = {"steps": {"max_steps": 8, "max_epochs": -1}, "epochs": {"max_epochs": 3}}
VALIDATION = {"each epoch": {}, "each step": {"val_check_interval": 1}, "never": {"limit_val_batches": 0}}


@pytest.mark.parametrize(
    ("saving", "validating"),
    [
        (saving, validating)
        for saving in SAVING
        for validating in VALIDATION
        if not (saving == "after each validation" and validating == "never")
    ],
)
@pytest.mark.parametrize("length", LENGTH)
@pytest.mark.parametrize(("manual", "drawing"), [(False, False), (True, False), (True, True)])
def test_resuming_from_any_checkpoint_continues_the_uninterrupted_run(
    run, tmp_path, manual, drawing, saving, length, validating
):
    arguments = {"manual": manual, "drawing": drawing, **LENGTH[length], **VALIDATION[validating]}
    whole = run("whole", saving=SAVING[saving], **arguments)
    checkpoints = {int(path.stem.split("-")[0].removeprefix("step=")): path for path in (tmp_path / "whole").iterdir()}
    assert checkpoints
    got = {
        step: run("resumed", checkpoint=path, saving=SAVING[saving], **arguments) for step, path in checkpoints.items()
    }
    assert got == {step: whole[step:] for step in checkpoints}
