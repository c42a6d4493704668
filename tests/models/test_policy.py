import pytest
import torch
from rows import PROMPT_INDEX, PROMPTS, RESPONSES, gradients, padded, row_logprobs
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    MistralConfig,
)

from lit_specrl.drafting.distillation.collector import CaptureSpec, capture_teacher_outputs
from lit_specrl.experience import padded_rows
from lit_specrl.models.policy import Policy
from lit_specrl.models.pretrained import check_model_exists

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture(params=["llama", "qwen"])
def folder(request, tiny_model, tiny_qwen):
    return {"llama": tiny_model, "qwen": tiny_qwen}[request.param]


@pytest.mark.parametrize("share_prompts", [False, True], ids=["plain", "shared"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_each_row_gets_the_logprobs_it_has_alone_and_zeros_on_padding(folder, temperature, share_prompts):
    policy = Policy.build(folder)
    out = policy(*padded(), temperature=temperature, share_prompts=share_prompts)
    assert out.logprobs.shape == out.entropy.shape == (6, 6)
    for row, (owner, response) in enumerate(zip(PROMPT_INDEX, RESPONSES, strict=True)):
        logprobs, entropy = row_logprobs(policy.model, PROMPTS[owner], response, temperature)
        torch.testing.assert_close(out.logprobs[row, : len(response)], logprobs, rtol=0, atol=1e-5)
        torch.testing.assert_close(out.entropy[row, : len(response)], entropy, rtol=0, atol=1e-5)
        assert out.logprobs[row, len(response) :].count_nonzero() == 0
        assert out.entropy[row, len(response) :].count_nonzero() == 0


@pytest.mark.parametrize(
    "batch",
    [
        (PROMPTS, PROMPT_INDEX, RESPONSES),
        (PROMPTS, [2, 0, 2, 1, 0, 2], RESPONSES),
        (PROMPTS, [0, 0, 1, 2], [[21], [22], [23], [24]]),
        ([[5, 6, 7]], [0, 0, 0], [[21, 22], [23], [24, 25, 26]]),
    ],
    ids=["uneven", "rows in any order", "one token each", "one prompt"],
)
def test_sharing_prompts_changes_neither_values_nor_gradients(folder, batch):
    policy, batch = Policy.build(folder), padded(*batch)
    plain, shared = policy(*batch), policy(*batch, share_prompts=True)
    torch.testing.assert_close(shared.logprobs, plain.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(shared.entropy, plain.entropy, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradients(policy, batch, True), gradients(policy, batch, False), rtol=1e-4, atol=1e-5)


def test_sharing_prompts_is_exact_with_a_sliding_window():
    """The window is shorter than the prompts: the cache must not lose what later tokens still see."""
    torch.manual_seed(0)
    config = MistralConfig(**SMALL, num_key_value_heads=1, sliding_window=3, initializer_range=0.2)
    policy, batch = Policy(AutoModelForCausalLM.from_config(config)), padded()
    torch.testing.assert_close(policy(*batch, share_prompts=True).logprobs, policy(*batch).logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradients(policy, batch, True), gradients(policy, batch, False), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share_prompts", [False, True], ids=["plain", "shared"])
def test_positions_begin_at_the_first_token_of_a_prompt_and_not_at_its_padding(share_prompts):
    """Absolute positions tell; rotary ones look the same when all of a row is shifted."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2)
    policy = Policy(AutoModelForCausalLM.from_config(config)).eval()
    out = policy(*padded(), share_prompts=share_prompts)
    for row, (owner, response) in enumerate(zip(PROMPT_INDEX, RESPONSES, strict=True)):
        logprobs, _ = row_logprobs(policy.model, PROMPTS[owner], response)
        torch.testing.assert_close(out.logprobs[row, : len(response)], logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("share_prompts", [False, True], ids=["plain", "shared"])
def test_what_stands_on_padding_does_not_matter(folder, share_prompts):
    policy = Policy.build(folder)
    prompt_ids, prompt_mask, prompt_index, response_ids, response_mask = batch = padded()
    noise = (
        prompt_ids.masked_fill(~prompt_mask, 77),
        prompt_mask,
        prompt_index,
        response_ids.masked_fill(~response_mask, 99),
        response_mask,
    )
    torch.testing.assert_close(policy(*noise, share_prompts=share_prompts), policy(*batch, share_prompts=share_prompts))
    torch.testing.assert_close(gradients(policy, noise, share_prompts), gradients(policy, batch, share_prompts))


def test_a_row_without_tokens_is_all_zeros(tiny_model):
    out = Policy.build(tiny_model)(*padded(PROMPTS, [0, 1], [[21, 22], []]))
    assert out.logprobs[1].tolist() == [0, 0]


def test_gradient_checkpointing_rules_sharing_out_and_leaves_gradients_as_they_are(tiny_model):
    plain, checkpointed = Policy.build(tiny_model), Policy.build(tiny_model, gradient_checkpointing=True)
    assert plain.can_share_prompts
    assert not checkpointed.can_share_prompts
    calls = []
    checkpointed.model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append("norm"))
    torch.testing.assert_close(gradients(checkpointed, padded(), False), gradients(plain, padded(), False))
    assert calls == ["norm", "norm"]  # forward, and again in the backward pass


def test_training_mode_is_deterministic_in_a_model_with_dropout():
    config = GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=2, attn_pdrop=0.0, resid_pdrop=0.5, embd_pdrop=0.5)
    policy = Policy(AutoModelForCausalLM.from_config(config)).train()
    torch.testing.assert_close(policy(*padded()).logprobs, policy(*padded()).logprobs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("generation", "model", "expected"),
    [([2, 7], 2, {2, 7}), (7, 2, {7}), (None, 2, {2}), (None, None, set())],
    ids=["list", "number", "of the model", "none"],
)
def test_end_of_text_tokens_come_from_the_generation_config_first(tiny_model, generation, model, expected):
    policy = Policy.build(tiny_model)
    policy.model.generation_config.eos_token_id, policy.model.config.eos_token_id = generation, model
    assert policy.eos_token_ids == expected


def test_weights_go_by_their_transformers_names_and_survive_saving(folder, tmp_path):
    policy = Policy.build(folder)
    policy.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    weights = dict(policy.named_weights())
    assert not any(weight.requires_grad for weight in weights.values())
    torch.testing.assert_close(weights, {name: parameter.detach() for name, parameter in saved.named_parameters()})
    assert ("lm_head.weight" in weights) == (not policy.model.config.tie_word_embeddings)


def test_weights_have_the_dtype_asked_for(tiny_model):
    assert {weight.dtype for weight in Policy.build(tiny_model, dtype="bfloat16").parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in Policy.build(tiny_model).parameters()} == {torch.float32}


@pytest.mark.parametrize("find", [Policy.build, check_model_exists], ids=["build", "check"])
@pytest.mark.parametrize("kind", ["hub name", "misspelt folder", "empty folder"])
def test_a_model_that_cannot_be_had_is_named_with_what_to_do(find, kind, tmp_path):
    names = {"hub name": "nobody/nothing", "misspelt folder": tmp_path / "x" / "y" / "z", "empty folder": tmp_path}
    name = str(names[kind])
    with pytest.raises(ValueError, match="is neither a folder in the transformers format") as raised:
        find(name)
    assert str(raised.value).startswith(f"model {name!r} is neither")
    assert str(raised.value).endswith(f"`hf download {name}`")


def captured(spec, layers, outputs, temperature=1.0):
    """Arguments of the forward pass that keep what a drafter learns from."""
    part = padded_rows(PROMPTS, PROMPT_INDEX, RESPONSES)

    def observe(states, head):
        outputs.extend(capture_teacher_outputs(spec, part, states, head, temperature))

    return {"observe": observe, "observed_layers": layers}


@pytest.mark.parametrize("share_prompts", [False, True], ids=["plain", "shared"])
@pytest.mark.parametrize("vocabulary", [None, torch.arange(1, 128, 3)], ids=["all tokens", "some tokens"])
def test_what_is_kept_for_a_drafter_is_what_the_model_says(folder, share_prompts, vocabulary):
    policy, temperature = Policy.build(folder).eval(), 0.7
    spec, outputs = CaptureSpec(rows=[0, 1, 3], vocabulary=vocabulary, num_top=5), []
    policy(
        *padded(), temperature=temperature, share_prompts=share_prompts, **captured(spec, (0, 1), outputs, temperature)
    )
    assert [output.row for output in outputs] == spec.rows
    for row, features, top_tokens, top_logprobs, log_mass in outputs:
        prompt, response = PROMPTS[PROMPT_INDEX[row]], RESPONSES[row]
        with torch.no_grad():
            alone = policy.model(torch.tensor([prompt + response]), output_hidden_states=True)
        expected = torch.cat([alone.hidden_states[0], alone.hidden_states[1]], dim=-1)[0, :-1]
        torch.testing.assert_close(features.float(), expected, rtol=0.01, atol=1e-3)  # kept in bfloat16
        logprobs = (alone.logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
        drafted = logprobs if vocabulary is None else logprobs[:, vocabulary]
        assert top_tokens.tolist() == drafted.topk(5).indices.tolist()
        torch.testing.assert_close(top_logprobs, drafted.topk(5).values, rtol=0, atol=1e-4)
        torch.testing.assert_close(log_mass, drafted.logsumexp(-1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("share_prompts", [False, True], ids=["plain", "shared"])
def test_an_observer_changes_no_gradient(folder, share_prompts):
    """Layers of a drafter that needs no hidden states are none."""
    found = []
    for spec, layers in ((None, ()), (CaptureSpec([0, 4], None, 3), (1,)), (CaptureSpec([2], None, 3), ())):
        policy, outputs = Policy.build(folder), []
        options = {} if spec is None else captured(spec, layers, outputs)
        out = policy(*padded(), share_prompts=share_prompts, **options)
        out.logprobs.sum().backward()
        found.append([parameter.grad for parameter in policy.parameters()])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=0)
    assert [output.features.shape[-1] for output in outputs] == [0]
