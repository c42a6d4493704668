"""Kinds of models: right, or refused with a sentence, when the policy is built."""

import pytest
import torch
from rows import PROMPT_INDEX, PROMPTS, RESPONSES, gradients, padded, row_logprobs
from tiny_models import SHAPE, build_tokenizer, save_model
from training import History, arithmetic, grpo, make_trainer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3Config,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    PhiConfig,
    Qwen3_5Config,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from lit_specrl import PPO
from lit_specrl.models.critic import SeparateCritic
from lit_specrl.models.policy import Policy

WITHOUT_HEAD_DIM = {name: value for name, value in SHAPE.items() if name != "head_dim"}
FOUR_LAYERS = {"num_hidden_layers": 4}
LINEAR = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 1,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}

HYBRID = {
    "Qwen3.5": lambda: Qwen3_5TextConfig(**SHAPE | FOUR_LAYERS, **LINEAR),
    "Qwen3-Next": lambda: Qwen3NextConfig(
        **SHAPE | FOUR_LAYERS, **LINEAR, **EXPERTS, shared_expert_intermediate_size=32
    ),
    "LFM2": lambda: Lfm2Config(**WITHOUT_HEAD_DIM | FOUR_LAYERS, layer_types=["conv", "full_attention"] * 2),
    "Falcon-H1": lambda: FalconH1Config(**SHAPE, **MAMBA, lm_head_multiplier=1.0),
}
COMPOSITE = {
    "Qwen3.5": lambda: Qwen3_5Config(
        text_config={**SHAPE, **FOUR_LAYERS, **LINEAR},
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
        },
    ),
    "Gemma3": lambda: Gemma3Config(
        text_config=dict(SHAPE),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
    ),
}
REFUSED = {
    "Gemma2": (lambda: Gemma2Config(**SHAPE, final_logit_softcapping=2.0), "final_logit_softcapping"),
    "Granite": (lambda: GraniteConfig(**WITHOUT_HEAD_DIM, logits_scaling=8.0), "logits_scaling"),
    "Cohere": (lambda: CohereConfig(**WITHOUT_HEAD_DIM, logit_scale=0.5), "logit_scale"),
    "Falcon-H1": (lambda: FalconH1Config(**SHAPE, **MAMBA, lm_head_multiplier=0.4), "lm_head_multiplier"),
    "Phi": (lambda: PhiConfig(**WITHOUT_HEAD_DIM | {"num_key_value_heads": 2}), "a head with bias"),
}


def random_model(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model


@pytest.mark.parametrize(("config", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_model_that_does_more_than_multiply_with_its_head_is_refused(config, reason):
    """Phi trained on log-probs that were wrong by up to 2.2 nats, Falcon-H1 by 1.8."""
    model = random_model(config())
    with pytest.raises(ValueError, match=rf"{type(model).__name__} does more .*\({reason}\).* nats from"):
        Policy(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cap_is_refused_where_it_does_not_show_yet(dtype):
    """Small logits, and the rounding of bfloat16, hide a cap of 30."""
    config = Gemma2Config(**SHAPE | {"initializer_range": 0.02}, final_logit_softcapping=30.0)
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        Policy(random_model(config).to(dtype))


@pytest.mark.parametrize("config", [GraniteConfig(**WITHOUT_HEAD_DIM, logits_scaling=1.0), LlamaConfig(**SHAPE)])
def test_a_scale_of_one_is_no_scale(config):
    Policy(random_model(config))


def test_a_model_without_a_head_is_refused():
    model = random_model(LlamaConfig(**SHAPE))
    model.get_output_embeddings = lambda: None
    with pytest.raises(ValueError, match="LlamaForCausalLM has no output head"):
        Policy(model)


@pytest.mark.parametrize("config", HYBRID.values(), ids=HYBRID)
def test_a_cache_that_cannot_be_repeated_is_not_shared(config):
    policy = Policy(random_model(config()))
    assert not policy.can_share_prompts
    out = policy(*padded())
    for row, (owner, response) in enumerate(zip(PROMPT_INDEX, RESPONSES, strict=True)):
        logprobs, _ = row_logprobs(policy.model, PROMPTS[owner], response)
        torch.testing.assert_close(out.logprobs[row, : len(response)], logprobs, rtol=0, atol=1e-4)


def test_mixtures_of_experts_share_prompts():
    policy = Policy(random_model(Qwen3MoeConfig(**SHAPE, **EXPERTS)))
    assert policy.can_share_prompts
    torch.testing.assert_close(gradients(policy, padded(), True), gradients(policy, padded(), False))


def saved(kind, name, folder):
    if kind == "hybrid":
        return save_model(folder, HYBRID[name]())
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(COMPOSITE[name]()).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "name"), [*[("hybrid", name) for name in HYBRID], *[("composite", name) for name in COMPOSITE]]
)
def test_it_trains_on_the_logprobs_that_it_samples_with(kind, name, tmp_path):
    """Prompts of unequal length, several rows a prompt, responses that end at different tokens."""
    module, history = grpo(saved(kind, name, tmp_path / "model"), max_completion_length=24), History()
    make_trainer(history, default_root_dir=tmp_path, limit_train_batches=2).fit(module, datamodule=arithmetic())
    assert module.policy_version == 2
    for metrics in history.steps.values():
        assert metrics["sampling/sampling_logp_difference/max"] < 1e-3


def test_a_critic_whose_cache_cannot_be_repeated_reads_whole_rows(tiny_model, tmp_path):
    critic = SeparateCritic(model=save_model(tmp_path / "critic", HYBRID["LFM2"]()))
    module = PPO(
        tiny_model,
        [lambda completions, **_: [float(len(text)) for text in completions]],
        max_completion_length=24,
        critic=critic,
    )
    make_trainer(default_root_dir=tmp_path, limit_train_batches=1).fit(module, datamodule=arithmetic())
    assert module.policy.can_share_prompts
    assert module.policy_version == 1
