"""A tiny classifier with a known head as reward."""

import warnings

import pytest
import torch
from tiny_models import SHAPE, build_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

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


def test_a_model_without_a_classifier_is_refused(tmp_path):
    """Its scores were random, and only the report of the loading said so."""
    LlamaForCausalLM(LlamaConfig(**SHAPE, num_labels=1)).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no weights for score\.weight: it is no sequence classifier"):
        RewardModel(str(tmp_path), device="cpu")(["p"], ["5"])


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


ENCODERS = {
    "bert": (BertConfig, BertForSequenceClassification, {}),
    "roberta": (RobertaConfig, RobertaForSequenceClassification, {"pad_token_id": 1}),
    "deberta": (DebertaV2Config, DebertaV2ForSequenceClassification, {}),
}


@pytest.fixture(params=ENCODERS)
def encoder(request, tmp_path):
    """A classifier that reads pairs, with positions for 24 tokens, and its tokenizer."""
    config, model, options = ENCODERS[request.param]
    shape = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    classifier = model(
        config(**shape, intermediate_size=32, max_position_embeddings=24, type_vocab_size=2, num_labels=1, **options)
    )
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{n}" for n in range(50))]
    core = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    core.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
    )
    tokenizer.save_pretrained(tmp_path)
    classifier.save_pretrained(tmp_path)
    return str(tmp_path), AutoModelForSequenceClassification.from_pretrained(tmp_path).eval(), tokenizer


@torch.no_grad()
def test_an_encoder_scores_pairs_as_transformers_does(encoder):
    folder, classifier, tokenizer = encoder
    completions = ["w4 w5", "w6 w7 w8 w9", "w1"]
    assert 1 in tokenizer("w2", "w3").token_type_ids
    expected = [float(classifier(**tokenizer("w2 w3", text, return_tensors="pt")).logits) for text in completions]
    reward = RewardModel(folder, "cpu", "float32")
    assert reward(["w2 w3"] * 3, completions) == pytest.approx(expected, abs=1e-4)
    assert len({round(score, 4) for score in expected}) == 3


@torch.no_grad()
def test_an_encoder_reads_as_much_as_it_has_positions_for_from_its_first_token_on(encoder):
    folder, classifier, tokenizer = encoder
    text = " ".join(f"w{n}" for n in range(10, 40))
    reward = RewardModel(folder, "cpu", "float32")
    with pytest.warns(UserWarning, match="1 of 1 texts are longer than 2[0-9] tokens"):
        (score,) = reward(["w2 w3"], [text])
    pair = tokenizer("w2 w3", text, return_tensors="pt")
    limit = 24 - (2 if classifier.config.model_type == "roberta" else 0)
    kept = [0, *range(pair.input_ids.shape[1] - limit + 1, pair.input_ids.shape[1])]
    assert score == pytest.approx(float(classifier(**{k: v[:, kept] for k, v in pair.items()}).logits), abs=1e-4)


def test_scores_do_not_depend_on_the_batch_where_config_and_tokenizer_pad_otherwise(tmp_path):
    folder = save(tmp_path)
    config = LlamaConfig.from_pretrained(folder)
    config.pad_token_id = 63
    config.save_pretrained(folder)
    alone, together = RewardModel(folder, "cpu", "float32"), RewardModel(folder, "cpu", "float32")
    short, long = "5", "It is 5, and a bit more than that."
    assert together(["p"] * 2, [short, long])[0] == pytest.approx(alone(["p"], [short])[0], abs=1e-4)
