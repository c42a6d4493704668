"""A tiny classifier with a known head as reward."""

import warnings

import pytest
import torch
from tiny_models import SHAPE, build_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification

from lit_specrl.rewards import RewardModel, RewardSet

TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>[{{ m['content'] }}]<|end|>{% endfor %}"


def save(folder, num_labels=1, template=TEMPLATE):
    torch.manual_seed(0)
    LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=num_labels)).save_pretrained(folder)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("classifier"))


@torch.no_grad()
def expected(folder, text, label=0, pair=None):
    """The head on the last hidden state of the text alone."""
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    ids = build_tokenizer()(text, pair, add_special_tokens=pair is not None).input_ids
    return float((model.model(torch.tensor([ids])).last_hidden_state[0, -1] @ model.score.weight.T)[label])


QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 3?"}]
SHOWN = "<|system|>[Be brief.]<|end|><|user|>[2 + 3?]<|end|><|assistant|>[{}]<|end|>"
COMPLETIONS = ["5", "It is 5, I think.", "", "no"]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_reward_is_the_logit_of_the_conversation_in_the_classifiers_own_template(folder, batch_size):
    reward = RewardModel(folder, "cpu", "float32", batch_size)
    with torch.autocast("cpu", torch.bfloat16):  # of the trainer
        scores = RewardSet([reward])(["p"] * 4, COMPLETIONS, prompt_messages=[QUESTION] * 4)
    assert scores.names == ["reward_model"]
    assert scores.values[0] == pytest.approx([expected(folder, SHOWN.format(text)) for text in COMPLETIONS], abs=1e-4)
    assert len(set(scores.values[0])) == 4
    reward.close()
    assert reward([], []) == []


def test_a_prefill_is_part_of_the_answer(folder):
    turns = [*QUESTION, {"role": "assistant", "content": "It is "}]
    found = RewardModel(folder, dtype="float32", device="cpu")(["p"], ["5"], prompt_messages=[turns])
    assert found == pytest.approx([expected(folder, SHOWN.format("It is 5"))], abs=1e-4)


def test_without_a_template_question_and_completion_are_a_pair(tmp_path):
    plain = save(tmp_path / "plain", num_labels=3, template=None)
    found = RewardModel(plain, "cpu", "float32", label=2)(["p"], ["5"], prompt_messages=[QUESTION])
    assert found == pytest.approx([expected(plain, "2 + 3?", 2, pair="5")], abs=1e-4)
    with pytest.raises(ValueError, match="has 3 logits; say by label which one is the reward"):
        RewardModel(plain)
    with pytest.raises(ValueError, match="label must lie between 0 and 2, got 3"):
        RewardModel(plain, label=3)


def test_a_long_text_loses_its_beginning_and_that_is_told_once(folder):
    reward = RewardModel(folder, "cpu", "float32", max_length=12)
    text = build_tokenizer().decode(
        build_tokenizer()(SHOWN.format("It is 5"), add_special_tokens=False).input_ids[-12:]
    )
    with pytest.warns(UserWarning, match="1 of 1 texts are longer than 12 tokens and lose their beginning"):
        assert reward(["p"], ["It is 5"], prompt_messages=[QUESTION]) == pytest.approx(
            [expected(folder, text)], abs=1e-4
        )
    assert reward.counters == {"cut": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward(["p"], ["It is 5"], prompt_messages=[QUESTION])


def test_what_cannot_be_a_reward_model_is_refused(tmp_path, folder):
    with pytest.raises(ValueError, match=r"reward model '.*nothing' cannot be read"):
        RewardModel(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"dtype must be one of auto, .*, got 'fp8'"):
        RewardModel(folder, dtype="fp8")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        RewardModel(folder, batch_size=0)
    same, other = RewardModel(folder, batch_size=2).identity(), RewardModel(folder, max_length=9).identity()
    assert RewardModel(folder).identity() == same != other
