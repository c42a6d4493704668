"""A scheduler over the end of a process, in a real run with vLLM."""

import random

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from reuse_runs import fit, grpo, questions
from training import make_trainer, with_many_stops

from lit_specrl.callbacks import AdaptiveScheduler, SpeculativeRollout
from lit_specrl.cli.export import export_checkpoint
from lit_specrl.drafting import NGramDrafter
from lit_specrl.drafting.scheduler.length_schedule import DecodeStep, LengthSchedule
from lit_specrl.engines import VLLMEngine


def test_a_run_in_which_no_draft_paid_is_resumed_and_exported(tiny_model, tmp_path):
    """24 steps with drafts that are seldom accepted left numbers of numpy in the checkpoint, which was refused from
    then on."""
    model, randomness = with_many_stops(tiny_model, tmp_path / "model"), random.Random(0)
    texts = ["".join(randomness.choices("abcdefghijklmnopqrstuvwxyz", k=8)) for _ in range(8)]
    engine_options = {"dtype": "float32", "max_num_seqs": 16, "cpu_kv_cache_gib": 0.25, "max_model_len": 128}

    def go_on(max_epochs, ckpt_path=None):
        scheduler = AdaptiveScheduler()
        scheduler.schedule = LengthSchedule(3)
        scheduler.schedule.profile(
            [
                DecodeStep(num_active=8, length=length, seconds=100.0 if length else 1e-4, num_tokens=8)
                for length in (0, 1, 3)
                for _ in range(16)
            ]
        )
        saver = ModelCheckpoint(
            tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True
        )
        callbacks = [SpeculativeRollout(VLLMEngine(**engine_options), NGramDrafter()), scheduler, saver]
        data = questions(tmp_path, texts)
        fit(grpo(model), data, *callbacks, max_epochs=max_epochs, ckpt_path=ckpt_path)

    go_on(6)
    state = torch.load(tmp_path / "epoch=5.ckpt", weights_only=True)["adaptive_scheduler"]
    assert any(group["decoding_s"] > 0 for group in state["ages"])  # steps in which nothing paid
    go_on(7, tmp_path / "epoch=5.ckpt")
    export_checkpoint(str(tmp_path / "epoch=6.ckpt"), str(tmp_path / "exported"))


def test_a_second_fit_with_drafts_of_another_length_has_a_new_schedule(tiny_model):
    """It kept the longest draft of the first drafter."""
    scheduler, module = AdaptiveScheduler(), grpo(tiny_model)

    def schedule(num_speculative_tokens):
        drafter = NGramDrafter(num_speculative_tokens)
        trainer = make_trainer(SpeculativeRollout(VLLMEngine(), drafter), scheduler)
        scheduler.setup(trainer, module, "fit")
        return scheduler.schedule

    first = schedule(2)
    assert first.max_length == 2
    assert schedule(2) is first  # what it has learnt stays
    assert schedule(4).max_length == 4
