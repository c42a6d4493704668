"""A policy of two layers that writes sums out and often errs: the test bed on which a run takes half a minute."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lit_specrl.allocator import keep_freed_memory
from lit_specrl.bench.report import Report, check_at_least_one, describe_hardware
from lit_specrl.checkpoints.atomic_files import partial_folder, replace_atomically

NUM_TERMS = 9
"""Terms of a question, each of one digit. Nine make an answer of 65 tokens, and no sum has three digits."""
_SPECIAL = ["<|pad|>", "<|end|>", "<|unk|>"]
_WORDS = ["What", "is", "?", "+", "=", ".", *"0123456789"]
_BATCH = 64
_HARD_SHARE = 0.25  # of the pairs of a last digit and a term
_NUM_TRIED = 500  # questions that tell how often the finished policy is right


def bench_toy_policy(folder: str, steps: int = 1500, error_rate: float = 0.5, seed: int = 0) -> Report:
    """Make the tiny policy of recipes/toy_sums.yaml, and measure how often it is right.

    The policy (GPT-2, two layers, 64 wide, digits as tokens) is taught to write sums out, as in "What is 4 + 9 + 3?"
    and "04+9=13.13+3=16.". Its teacher errs by one in a share of the sums that depends on the last digit and the term,
    so that some questions are hard and others easy. What is left to learn by rewards is to say what is right.

    Args:
        folder: where the policy goes, in the transformers format; it must not exist.
        steps: supervised updates.
        error_rate: share of errors in the hardest sums; the mean over all is a third of it.
        seed: of weights and examples.

    Raises:
        ValueError: a number out of its range, or a folder that is there already.
    """
    check_at_least_one(steps=steps)
    if not 0 <= error_rate < 1:
        raise ValueError(f"--error_rate must lie in [0, 1), got {error_rate}")
    if Path(folder).exists():
        raise ValueError(f"--folder {folder} is there already; take another, or use the policy that it holds")
    keep_freed_memory()
    started_at = time.perf_counter()
    teacher = Teacher(error_rate, random.Random(seed))
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), seed)
    loss = teach(model, teacher.batches(tokenizer, steps))
    elapsed_s = time.perf_counter() - started_at
    with partial_folder(Path(folder)) as partial:
        model.save_pretrained(partial / "policy")
        tokenizer.save_pretrained(partial / "policy")
        replace_atomically(partial / "policy", Path(folder))
    questions = [teacher.terms() for _ in range(_NUM_TRIED)]
    row = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": elapsed_s,
        "loss_nats_per_token": loss,
        "teacher_right": sum(is_right(terms, teacher.answer(terms)) for terms in questions) / _NUM_TRIED,
        "policy_right": sum(map(is_right, questions, answers(model, tokenizer, questions))) / _NUM_TRIED,
    }
    return Report(
        hardware=describe_hardware("cpu"),
        torch_version=torch.__version__,
        settings={
            "benchmark": "toy-policy",
            "folder": folder,
            "steps": steps,
            "error_rate": error_rate,
            "seed": seed,
        },
        tables={"made": [row]},
        notes=[
            f"Right means that the last sum is right, in {_NUM_TRIED} questions. Train it by "
            f"lit-specrl fit --config recipes/toy_sums.yaml --model.init_args.model {folder}"
        ],
    )


class Teacher:
    """Writes sums out, some of them wrong.

    Args:
        error_rate: share of errors in the hardest sums.
        generator: of questions and errors.

    Example:
        >>> Teacher(0.0, random.Random(0)).answer([4, 9, 3])
        '04+9=13.13+3=16.'
    """

    def __init__(self, error_rate: float, generator: random.Random) -> None:
        self._error_rate, self._generator = error_rate, generator

    def terms(self) -> list[int]:
        """A question."""
        return [self._generator.randint(1, 9) for _ in range(NUM_TERMS)]

    def answer(self, terms: Sequence[int]) -> str:
        """The sum of the terms, one after the other; goes on from what was written, be it wrong."""
        total, text = terms[0], ""
        for term in terms[1:]:
            result = total + term
            if self._generator.random() < self.rate_of(total, term):
                result += self._generator.choice([-1, 1])
            text += f"{total:02d}+{term}={result:02d}."
            total = result
        return text

    def rate_of(self, total: int, term: int) -> float:
        """Share of errors in this sum: nothing or the error rate, by its last digit and the term."""
        uniform = xxhash.xxh3_64_intdigest(f"{total % 10}+{term}".encode()) / 2**64
        return self._error_rate if uniform < _HARD_SHARE else 0.0

    def batches(self, tokenizer: PreTrainedTokenizerFast, num_batches: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Token ids [b, T] of questions with answers, and labels [b, T], -100 on the questions."""
        for _ in range(num_batches):
            questions = [self.terms() for _ in range(_BATCH)]
            texts = [f"{question(terms)}{self.answer(terms)}<|end|>" for terms in questions]
            ids = torch.tensor(tokenizer(texts)["input_ids"])  # all are equally long
            labels = ids.clone()
            labels[:, : len(tokenizer(question(questions[0]))["input_ids"])] = -100
            yield ids, labels


def question(terms: Sequence[int]) -> str:
    """As `ArithmeticSource` asks it."""
    return f"What is {' + '.join(map(str, terms))}?"


def is_right(terms: Sequence[int], answer: str) -> bool:
    """Whether the last sum of an answer is that of the terms."""
    return answer.endswith(f"={sum(terms):02d}.")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each digit, sign and word of questions and answers; white space counts for nothing.

    Example:
        >>> build_tokenizer().decode(build_tokenizer()("04+9=13. 13")["input_ids"])
        '04+9=13.13'
    """
    vocabulary = {token: index for index, token in enumerate(_SPECIAL + _WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[0-9?+=.]"), "isolated")]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", unk_token="<|unk|>"
    )


def build_model(vocab_size: int, seed: int) -> GPT2LMHeadModel:
    """Positions are learned: which term comes next is a question of where it stands."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=256,
        n_embd=64,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=_SPECIAL.index("<|end|>"),
        pad_token_id=_SPECIAL.index("<|pad|>"),
        activation_function="relu",  # the default computes a tanh, which takes longer
    )
    return GPT2LMHeadModel(config)


def teach(model: GPT2LMHeadModel, batches: Iterator[tuple[Tensor, Tensor]]) -> float:
    """One update for each batch, the learning rate falling to zero; returns the last loss in nats a token."""
    examples = list(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=len(examples) + 1)
    loss = torch.zeros(())
    for ids, labels in examples:
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return float(loss.detach())


@torch.no_grad()
def answers(model: Any, tokenizer: PreTrainedTokenizerFast, questions: Sequence[Sequence[int]]) -> list[str]:
    """Sampled at temperature 1, with torch's global generator."""
    ids = torch.tensor(tokenizer([question(terms) for terms in questions])["input_ids"])
    said = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=8 * NUM_TERMS
    )
    return tokenizer.batch_decode(said[:, ids.shape[1] :], skip_special_tokens=True)
