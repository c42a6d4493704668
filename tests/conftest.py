"""Fixtures of all tests: folders of tiny models, and memory that goes back after each file."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may depend on a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# tiny models; more threads only wait for each other, also in child processes
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from garbage import leave_out_what_is_there, look_at_everything
from rendezvous import OF_A_LAUNCHED_RANK
from tiny_models import SHAPE, save_model
from training import with_many_stops, write_questions
from transformers import LlamaConfig, Qwen3Config

from lit_specrl.allocator import give_back_freed_memory

collect_ignore_glob = ["*/killed_*.py", "*/sharded_runs.py", "*/record_oracles.py"]  # programs without examples
torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _freed_memory_goes_back():
    """Training on a CPU makes the process keep what it frees; each worker would hold the peak of all its files."""
    leave_out_what_is_there()
    yield
    look_at_everything()
    gc.collect()
    give_back_freed_memory()


@pytest.fixture(scope="module", autouse=True)
def _no_file_makes_a_launched_rank():
    """A sharded trainer leaves `LOCAL_RANK` behind, and a later one takes itself for a rank that somebody launched."""
    yield
    for name in OF_A_LAUNCHED_RANK:
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """Folder of a two-layer Llama with separate input and output embeddings."""
    return save_model(tmp_path_factory.mktemp("tiny-llama"), LlamaConfig(**SHAPE, tie_word_embeddings=False))


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory):
    """Makes folders of Llamas that differ from the tiny model in some settings."""

    def make(**settings) -> str:
        return save_model(tmp_path_factory.mktemp("llama"), LlamaConfig(**SHAPE | settings, tie_word_embeddings=False))

    return make


@pytest.fixture(scope="session")
def make_qwen(tmp_path_factory):
    """Makes folders of Qwens with tied embeddings that differ from the tiny one in some settings."""

    def make(**settings) -> str:
        return save_model(tmp_path_factory.mktemp("qwen"), Qwen3Config(**SHAPE | settings, tie_word_embeddings=True))

    return make


@pytest.fixture(scope="session")
def tiny_qwen(make_qwen) -> str:
    """Folder of a two-layer Qwen3 with tied embeddings."""
    return make_qwen()


@pytest.fixture(scope="session")
def model_folder(tiny_model, tmp_path_factory) -> str:
    """Folder of the tiny model whose responses differ in length."""
    return with_many_stops(tiny_model, tmp_path_factory.mktemp("stops") / "model")


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> str:
    """The four questions, with 5 for all answers."""
    return write_questions(tmp_path_factory.mktemp("questions") / "questions.jsonl")
