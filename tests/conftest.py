"""Tiny models built in memory, with a tokenizer of their own, saved as folders that every engine loads."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may depend on a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# tiny models; more threads only wait for each other, also in child processes
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from lit_specrl.allocator import give_back_freed_memory

torch.set_num_threads(1)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # wide enough for a peaked, non-uniform softmax
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module", autouse=True)
def _freed_memory_goes_back():
    """Training on a CPU makes the process keep what it frees; each worker would hold the peak of all its files."""
    yield
    gc.collect()
    give_back_freed_memory()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, 128 in all."""
    special = ["<|pad|>", "<|bos|>", "<|end|>", "<|unk|>", "<|user|>", "<|assistant|>", "<|system|>"]
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: index for index, token in enumerate(special + characters)}
    vocabulary |= {f"<|extra{index}|>": index for index in range(len(vocabulary), 128)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", bos_token="<|bos|>", eos_token="<|end|>", unk_token="<|unk|>"
    )
    wrapped.add_special_tokens({"additional_special_tokens": special[4:]})
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def save_model(folder, config) -> str:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


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
