import itertools
import json
from functools import partial

import pytest
import training
from reuse_runs import fit, grpo, questions

from lit_specrl import GRPO, PromptDataModule
from lit_specrl.data import FileSource

QUESTIONS = ["Hi", "Why?", "2 | 3", "<b>"]


@pytest.fixture
def source(tmp_path):
    """Four questions, the first without an answer."""
    path = tmp_path / "questions.jsonl"
    answers = [None, "one", "two", "three"]
    rows = [{"question": question, "answer": answer} for question, answer in zip(QUESTIONS, answers, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FileSource(str(path))


@pytest.fixture
def data(source):
    """Two steps an epoch, of two prompts with two rows each."""
    return PromptDataModule(
        source, validation=source, predict=source, batch_size=2, eval_batch_size=4, max_prompt_length=64, shuffle=False
    )


@pytest.fixture
def module(tiny_model):
    """Calls of its reward give 0, 1, 2, ... in the first row of every group and the same plus 2 in the second."""
    calls = itertools.count()

    def counting(completions, **columns):
        call = next(calls)
        return [float(call + 2 * (row % 2)) for row in range(len(completions))]

    def long(completion_ids, **columns):
        return [0.0 if len(ids) > 1 else None for ids in completion_ids]

    return GRPO(tiny_model, [counting, long], num_generations=2, max_completion_length=6)


@pytest.fixture
def make_trainer(tmp_path):
    """A trainer on the CPU that logs every step."""
    return partial(training.make_trainer, default_root_dir=tmp_path, limit_val_batches=0)


@pytest.fixture
def run(model_folder, tmp_path):
    """Train on the questions for three epochs; returns the module and what happened."""

    def run(*callbacks, module=None, data=None, max_epochs=3, trainer=None, **options):
        module = module or grpo(model_folder, **options)
        data = data or questions(tmp_path)
        return module, fit(module, data, *callbacks, max_epochs=max_epochs, **trainer or {})

    return run
