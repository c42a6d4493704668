"""What both engines promise of responses that end with a stop string or a stop token, and of altered softmaxes."""

from dataclasses import replace

import pytest
import torch
from colocated import STOP_TOKEN_IDS, with_engines
from tiny_models import build_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    MinPLogitsWarper,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
)

from lit_specrl.data.end_of_turn import end_of_turn_id
from lit_specrl.engines.stop_strings import StopStrings

ONE_OF_EACH = ["transformers-llama", "vllm-llama"]
TOKENIZER = build_tokenizer()


def stopping(request, stop):
    return replace(request, sampling=replace(request.sampling, stop=stop), text_end=StopStrings(TOKENIZER, stop))


def text_of(token_ids):
    return TOKENIZER.decode(token_ids)


def first_end(token_ids, stop):
    """By decoding every beginning of the response."""
    lengths = range(1, len(token_ids) + 1)
    return next((length for length in lengths if any(text in text_of(token_ids[:length]) for text in stop)), None)


# --------------------------------------------------------------------------------------------------------- the engines


@with_engines(ONE_OF_EACH)
def test_a_response_ends_with_the_token_that_completes_a_stop_string(colocated, prompts):
    whole = colocated.generate(prompts, group=8, length=20)
    stop = [text_of(response[5:8]) for response in whole.response_ids[::3] if len(response) > 8]
    rollouts = colocated.engine.generate(stopping(colocated.request(prompts, group=8, length=20), stop))
    ends = [first_end(response, stop) for response in whole.response_ids]
    assert 0 < ends.count(None) < len(ends)
    assert rollouts.response_ids == [response[:end] for response, end in zip(whole.response_ids, ends, strict=True)]
    assert rollouts.finish_reasons == [
        reason if end is None else "stop" for reason, end in zip(whole.finish_reasons, ends, strict=True)
    ]
    for found, expected in zip(rollouts.sampling_logprobs, whole.sampling_logprobs, strict=True):
        torch.testing.assert_close(found, expected[: len(found)], atol=1e-4, rtol=0)
    again = colocated.generate(prompts, group=8, length=20)  # the engine has forgotten the rows that were ended
    assert again.response_ids == whole.response_ids


@with_engines(ONE_OF_EACH)
def test_further_stop_tokens_end_a_response(colocated, prompts):
    whole = colocated.generate(prompts, group=8, length=20)
    token = next(response[4] for response in whole.response_ids if len(response) > 5)
    rollouts = colocated.generate(prompts, group=8, length=20, stop_token_ids=[token])
    stops = {token, *STOP_TOKEN_IDS}
    for found, expected, reason in zip(rollouts.response_ids, whole.response_ids, rollouts.finish_reasons, strict=True):
        end = next((place for place, own in enumerate(expected, 1) if own in stops), None)
        assert found == expected[:end]
        assert reason == ("length" if end is None else "stop")
    assert any(response[-1] == token for response in rollouts.response_ids)


@with_engines(ONE_OF_EACH)
def test_a_prefix_ends_at_the_stop_string_that_it_holds_and_a_continuation_may_complete_one(colocated, prompts):
    inside, across, apart = [40, 41, 42, 43, 44], [50, 51, 52], [70, 71]
    request = replace(colocated.request(prompts[2:3], group=3, length=12), prefixes=[inside, across, apart])
    plain = colocated.engine.generate(request)
    continued = plain.response_ids[1]
    assert len(continued) > len(across) + 2
    stop = [text_of(inside[1:3]), text_of(continued[len(across) - 2 : len(across) + 2])]
    request = replace(colocated.request(prompts[2:3], group=3, length=12), prefixes=[inside, across, apart])
    rollouts = colocated.engine.generate(stopping(request, stop))
    assert rollouts.response_ids == [inside[:3], continued[: len(across) + 2], plain.response_ids[2]]
    assert rollouts.finish_reasons[:2] == ["stop", "stop"]
    assert rollouts.request.prefixes == [inside[:3], across, apart]


@with_engines(["vllm-llama"])
def test_a_cached_response_that_the_engine_verifies_ends_at_its_stop_string(colocated, prompts):
    cached = [40, 41, 42, 43, 44, 45]
    request = stopping(colocated.request(prompts[2:3], length=12), [text_of(cached[2:4])])
    request = replace(request, cached_responses={0: list(cached)}, accept=lambda row, logprobs: len(logprobs))
    rollouts = colocated.engine.generate(request)
    assert rollouts.response_ids == [cached[:4]] and rollouts.finish_reasons == ["stop"]


@with_engines(["transformers-llama"])
def test_stop_strings_without_a_tokenizer_are_refused(colocated, prompts):
    with pytest.raises(ValueError, match="needs text_end=StopStrings"):
        colocated.generate(prompts, stop=["a"])


@with_engines(ONE_OF_EACH)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprobs_are_of_the_softmax_under_penalty_and_min_p(colocated, prompts, temperature):
    """Against the processors of transformers; one of the prompts goes on from a prefix."""
    request = colocated.request(
        prompts[2:], group=4, length=10, temperature=temperature, min_p=0.05, repetition_penalty=1.7
    )
    request.prefixes = [[9, 9, 11]] + [[] for _ in range(7)]
    rollouts = colocated.engine.generate(request)
    penalty, min_p = RepetitionPenaltyLogitsProcessor(1.7), MinPLogitsWarper(0.05)
    num_left_out = 0
    for row, response in enumerate(rollouts.response_ids):
        prompt, expected = prompts[2:][row // 4], []
        for place in range(len(request.prefix(row)), len(response)):
            before = prompt + response[:place]
            raw = colocated.policy.model(torch.tensor([before], device=colocated.policy.device)).logits[0, -1:].detach()
            logits = penalty(torch.tensor([before]), raw)
            logits = logits if temperature == 0 else min_p(None, logits / temperature)
            num_left_out += int(logits.isinf().sum())
            expected.append(float(logits.log_softmax(-1)[0, response[place]]))
            assert temperature > 0 or response[place] == int(logits.argmax())
        found = rollouts.sampling_logprobs[row][len(request.prefix(row)) :]
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert (num_left_out > 0) == (temperature > 0)
    plain = colocated.generate(prompts[2:], group=4, length=10, temperature=temperature)
    assert plain.response_ids != rollouts.response_ids


# --------------------------------------------------------------------------------------------------------- the strings


@pytest.fixture(scope="module")
def pieces():
    """A tokenizer of pieces of bytes, some of which are whole words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"]
    )
    tokenizer.train_from_iterator(["the answer is done. <answer> 42 </answer> now"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("the answer is <answer> 42 </answer> now", ["</answer>"]),
        ("the answer is done. now", ["wer i"]),  # ends inside a token
        ("über 5 € für 7 €", ["€"]),  # a character of three tokens
        ("5 € 6", [" "]),
        ("one\n\ntwo", ["\n\n"]),
        ("the answer<|end|> is", ["<|end|>"]),
        ("nothing here", ["###", "now"]),
    ],
)
def test_stop_strings_are_found_where_the_whole_text_holds_them(pieces, text, stop):
    token_ids = pieces(text, add_special_tokens=False).input_ids
    expected = next(
        (
            count
            for count in range(1, len(token_ids) + 1)
            if any(own in pieces.decode(token_ids[:count], skip_special_tokens=False) for own in stop)
        ),
        None,
    )
    found = StopStrings(pieces, stop)
    assert found(token_ids) == expected
    if expected is not None:
        for start in range(expected):
            assert found(token_ids, start) == expected
            tail = token_ids[max(0, expected - 1 - found.reach) :]  # what the loop of vLLM keeps
            assert found(tail, min(found.reach, expected - 1)) == len(tail) - len(token_ids) + expected


CHATML = "{% for m in messages %}<|user|>{{ m['role'] }}\n{{ m['content'] | trim }} <|extra120|>\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "token"),
    [
        (TOKENIZER.chat_template, "<|end|>"),
        (CHATML, "<|extra120|>"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", None),
        ("{{ raise_exception('only one turn') }}", None),
        (None, None),
    ],
)
def test_the_token_that_ends_a_turn_is_read_from_the_template(template, token):
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|extra120|>"]})
    tokenizer.chat_template = template
    assert end_of_turn_id(tokenizer) == (None if token is None else tokenizer.convert_tokens_to_ids(token))
