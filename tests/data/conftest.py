import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lit_specrl.types import PromptBatch

WORDS = [
    "[UNK]",
    "<s>",
    "<user>",
    "<assistant>",
    "<system>",
    "<end>",
    "<silent>",
    "A",
    "B",
    "C",
    "Q",
    ":",
    "1",
    "2",
    "3",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if silent %} <silent>{% endif %}{% endif %}"
)


@pytest.fixture
def letters():
    """One token per character, and one for each special word."""
    vocabulary = {chr(code): code for code in [10, *range(32, 127)]}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    tokenizer.add_special_tokens({"additional_special_tokens": [word for word in WORDS if word[0] == "<"]})
    return tokenizer


@pytest.fixture
def tokenizer():
    """One token per word, in the order of WORDS; `<s>` is put before plain text."""
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", chat_template=CHAT_TEMPLATE)


@pytest.fixture
def base_tokenizer(tokenizer):
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture
def make_prompts():
    """Build prompts with the given uids; the n-th has token n."""

    def make(uids):
        return PromptBatch(
            uids=list(uids),
            prompt_ids=[[n] for n in range(len(uids))],
            prompts=[f"prompt {n}" for n in range(len(uids))],
            answers=[str(n) for n in range(len(uids))],
            sources=["letters"] * len(uids),
            columns=[{"n": n} for n in range(len(uids))],
        )

    return make
