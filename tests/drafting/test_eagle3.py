"""The head against the forward pass of speculators, and what it begins as."""

import json

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from lit_specrl.drafting import Eagle3Drafter
from lit_specrl.drafting.eagle3 import (
    build_head,
    check_head,
    draft_vocabulary,
    feature_layers,
    load_head,
    save_head,
    trained_weights,
    unrolled_states,
    vocabulary_of,
)

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
VOCABULARY = torch.arange(3, 120, 4)


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE | {"num_hidden_layers": 6}, tie_word_embeddings=False)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(params=[None, VOCABULARY], ids=["all tokens", "some tokens"])
def head(policy, request):
    head = build_head(policy, "policy", request.param)
    with torch.no_grad():  # as after some training: everything takes part
        generator = torch.Generator().manual_seed(1)
        for _, weight in trained_weights(head):
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return head


def inputs(head, lengths=(9, 6)):
    generator = torch.Generator().manual_seed(2)
    width = len(head.config.eagle_aux_hidden_state_layer_ids) * head.hidden_size
    features = torch.randn(len(lengths), max(lengths), width, generator=generator)
    token_ids = torch.randint(3, 128, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return features, token_ids, mask


@torch.no_grad()
def test_unrolled_drafts_are_those_of_speculators(head):
    """Their forward pass takes the rows one behind the other."""
    features, token_ids, mask = inputs(head)
    own = [head.lm_head(states) for states in unrolled_states(head, features, token_ids, mask, 3)]
    head._attn_impl, head.config.transformer_layer_config._attn_implementation = "eager", "eager"
    head._create_mask_fn = __import__("speculators.models.attention", fromlist=["x"]).create_float_mask
    for row, length in enumerate(mask.sum(-1).tolist()):
        drafted = head(
            features[row : row + 1, :length],
            token_ids[row : row + 1, :length],
            torch.zeros(1, length, dtype=torch.long),
            ttt_steps=3,
        )
        for step, tokens in enumerate(drafted):
            valid = length - step  # of what comes later the tokens are unknown
            assert own[step][row, :valid].argmax(-1).tolist() == tokens[0, :valid].tolist()


@torch.no_grad()
def test_what_comes_later_changes_nothing(head):
    features, token_ids, mask = inputs(head)
    before = [states[:, :4].clone() for states in unrolled_states(head, features, token_ids, mask, 2)]
    features[:, 5:], token_ids[:, 6:] = 0, 7
    after = [states[:, :4] for states in unrolled_states(head, features, token_ids, mask, 2)]
    for first, second in zip(before, after, strict=True):
        torch.testing.assert_close(first, second)


def test_a_new_head_is_grown_from_the_policy(policy):
    """Shown only the high features, it computes what the policy's last layer, norm and output head do with them."""
    head = build_head(policy, "policy", VOCABULARY)
    assert head.config.eagle_aux_hidden_state_layer_ids == [3, 4, 5]
    features, token_ids, mask = inputs(head, lengths=(7,))
    with torch.no_grad():
        states = next(iter(unrolled_states(head, features, token_ids, mask, 1)))
        high = features[..., 2 * head.hidden_size :]
        rotary = policy.model.rotary_emb(high, torch.arange(7)[None])
        causal = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
        expected = policy.model.norm(policy.model.layers[-1](high, attention_mask=causal, position_embeddings=rotary))
    torch.testing.assert_close(states, expected)
    torch.testing.assert_close(head.lm_head(states), policy.lm_head(expected)[..., VOCABULARY])
    assert vocabulary_of(head).tolist() == VOCABULARY.tolist()
    frozen = {name for name, parameter in head.named_parameters() if not parameter.requires_grad}
    assert frozen == {"embed_tokens.weight", "lm_head.weight", "verifier_lm_head.weight", "verifier_norm.weight"}


def test_a_head_is_the_same_after_it_was_saved(head, tmp_path):
    save_head(head, tmp_path / "head")
    save_head(head, tmp_path / "head")  # takes the place of the first
    again = load_head(str(tmp_path / "head"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["head"]
    for first, second in zip(
        unrolled_states(head, *inputs(head), 2), unrolled_states(again, *inputs(again), 2), strict=True
    ):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert torch.equal(again.lm_head.weight, head.lm_head.weight)
    assert (vocabulary_of(again) is None) == (vocabulary_of(head) is None)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == dict(trained_weights(head)).keys()
    assert again.config.speculators_config.verifier.name_or_path == "policy"


@pytest.mark.parametrize("config", [Qwen3Config, Qwen2Config])
def test_heads_grow_from_qwen_too(config):
    """A head has no biases and no norms of queries and keys: it is a Llama's layer."""
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(config(**SHAPE, tie_word_embeddings=True))
    head = build_head(policy, "policy")
    states = next(iter(unrolled_states(head, *inputs(head), 1)))
    assert states.isfinite().all() and head.config.transformer_layer_config.model_type == "llama"


def test_other_architectures_are_refused():
    from transformers import GPT2Config

    policy = AutoModelForCausalLM.from_config(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=32))
    with pytest.raises(ValueError, match="kinds llama, qwen2, qwen3, mistral, this one is 'gpt2'"):
        build_head(policy, "policy")


def test_a_folder_that_is_no_head_is_refused(tmp_path, tiny_model):
    for folder in (str(tmp_path), tiny_model):
        with pytest.raises(ValueError, match="no EAGLE-3 head in the format of speculators"):
            load_head(folder)


def test_a_head_of_another_policy_is_refused(head, policy, tmp_path):
    save_head(head, tmp_path / "head")
    check_head(str(tmp_path / "head"), policy.config)
    with pytest.raises(ValueError, match="the policy has 3 layers of width 64 and 128 tokens; make a head"):
        check_head(str(tmp_path / "head"), LlamaConfig(**SHAPE))


def test_a_head_that_does_not_say_its_layers_reads_those_that_vllm_takes(tmp_path):
    """Heads of speculators may leave them out."""
    policy = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE | {"num_hidden_layers": 8}))
    save_head(build_head(policy, "policy"), tmp_path / "head")
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    assert config.pop("eagle_aux_hidden_state_layer_ids") == [2, 4, 5]
    (tmp_path / "head" / "config.json").write_text(json.dumps(config))
    drafter = Eagle3Drafter(str(tmp_path / "head"))
    drafter.check(policy.config)
    policy.save_pretrained(tmp_path / "policy")
    drafter.prepare(str(tmp_path / "policy"))
    assert drafter.network().layers == (2, 4, 5)


def test_a_head_without_weights_is_refused(head, tmp_path):
    save_head(head, tmp_path / "head")
    (tmp_path / "head" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(
        (ValueError, SafetensorError), match=r"is damaged: model\.safetensors missing or not as written"
    ):
        load_head(str(tmp_path / "head"))


def test_frequent_tokens_can_be_drafted():
    counts = torch.tensor([0, 5, 0, 7, 1, 0])
    assert draft_vocabulary(counts, 3).tolist() == [1, 3, 4]
    assert draft_vocabulary(counts, 5).tolist() == [0, 1, 2, 3, 4]  # lower ids first where nothing was seen
    assert draft_vocabulary(counts).tolist() == [0, 1, 2, 3, 4, 5]


def test_layers_exist_whatever_the_depth():
    for depth in range(3, 40):
        layers = feature_layers(depth)
        assert len(set(layers)) == 3 and all(0 <= layer < depth for layer in layers)
    with pytest.raises(ValueError, match="reads three layers of the policy, this one has 2"):
        feature_layers(2)
