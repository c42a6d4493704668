"""What was written can be loaded again, without trust in the file, or nothing was written."""

import datetime
import enum
import io
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lit_specrl import GRPO, PromptDataModule
from lit_specrl.checkpoints.checkpoint_io import AtomicCheckpointIO
from lit_specrl.checkpoints.content import loadable
from lit_specrl.data import ArithmeticSource


def reload(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Colour(enum.StrEnum):
    RED = "red"


class Meters(int):
    pass


Point = namedtuple("Point", "x y")
PLAIN = [
    *(1, 2.5, True, None, "text", b"bytes", 1 + 2j, torch.float32, torch.device("cpu"), torch.Size([2])),
    *([1, [2.0]], (1, "two"), {1, 2}, {"a": {"b": [None]}}, OrderedDict(a=1), Counter("aab"), torch.arange(3)),
]
NUMBERS = [
    *(np.float64(0.1), np.float32(0.1), np.float16(0.5), np.int64(3), np.uint8(3), np.bool_(True), np.str_("text")),
    *([np.float64(1)], (1, np.int32(2)), {np.int64(1): np.float64(2)}, {np.float64(1.5)}, {"a": [{"b": np.int8(1)}]}),
    OrderedDict(a=np.float64(1)),
]
REFUSED = [
    *(np.ones(2), np.datetime64("2020-01-01"), np.longdouble(1), datetime.date(2020, 1, 1), Colour.RED, Meters(3)),
    *(
        Point(1, 2),
        defaultdict(list),
        deque([1]),
        frozenset([1]),
        range(3),
        print,
        lambda: None,
        torch.nn.ReLU(),
        object(),
    ),
]


@pytest.mark.parametrize("content", PLAIN, ids=repr)
def test_what_torch_reads_stays_as_it_is(content):
    assert loadable(content) is content
    assert str(reload({"": content})) == str({"": content})


@pytest.mark.parametrize("content", NUMBERS, ids=repr)
def test_numbers_of_numpy_become_numbers_of_python(content):
    """The state of a schedule had some, and no run with it could be resumed or exported."""
    found = loadable({"callbacks": {"Mine": content}})["callbacks"]["Mine"]
    assert found == content
    assert type(found) is type(content) or isinstance(content, np.generic)
    assert reload({"": found}) == {"": found}


@pytest.mark.parametrize("content", REFUSED, ids=lambda content: type(content).__name__)
def test_anything_else_is_refused_by_its_place_and_type(content):
    with pytest.raises(TypeError, match=r"^callbacks\.Mine\.found\.0 holds a .*\." + type(content).__name__):
        loadable({"callbacks": {"Mine": {"found": [content]}}})


def test_an_array_is_told_from_other_things():
    with pytest.raises(
        TypeError, match=r"^state\.1\.2 holds a numpy\.ndarray.*torch\.from_numpy\(array\) or array\.tolist\(\)"
    ):
        loadable({"state": [0, {2: np.ones(1)}]})


def test_the_state_of_a_module_keeps_its_attributes():
    state = torch.nn.Linear(1, 1).state_dict()
    assert loadable({"state_dict": state, "best": np.float64(1)})["state_dict"] is state


class Remembers(Callback):
    """A callback of the user with a state."""

    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"best": self.value}

    def load_state_dict(self, state_dict):
        self.value = state_dict["best"]


def fit(model, folder, value, ckpt_path=None, plugins=None):
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=1 if ckpt_path is None else 2,
        max_epochs=-1,
        logger=False,
        callbacks=[Remembers(value), ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)],
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=plugins,
    )
    module = GRPO(model, [lambda completions, **columns: [1.0] * len(completions)], max_completion_length=3)
    data = PromptDataModule(ArithmeticSource(2), batch_size=2, max_prompt_length=64)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer.callbacks[0].value


@pytest.mark.parametrize("plugins", [None, AsyncCheckpointIO], ids=["default", "async"])
def test_a_callback_of_the_user_may_count_in_numpy(tiny_model, tmp_path, plugins):
    fit(tiny_model, tmp_path, np.float64(0.25), plugins=plugins and [plugins()])
    torch.load(tmp_path / "step=1.ckpt", weights_only=True)
    assert fit(tiny_model, tmp_path, None, tmp_path / "step=1.ckpt") == 0.25


def test_a_checkpoint_that_could_not_be_loaded_is_not_written(tiny_model, tmp_path):
    with pytest.raises(
        TypeError, match=r"^callbacks\.Remembers\.best holds a numpy\.ndarray, with which the checkpoint"
    ):
        fit(tiny_model, tmp_path, np.ones(3))
    assert not list(tmp_path.iterdir())


def test_nothing_takes_the_place_of_a_checkpoint_before_it_is_known_to_be_loadable(tmp_path):
    AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    with pytest.raises(TypeError, match=r"^best holds a"):
        AtomicCheckpointIO().save_checkpoint({"step": 2, "best": np.ones(1)}, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt") == {"step": 1}
