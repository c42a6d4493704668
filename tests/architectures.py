"""Families of models, each as the configuration of a tiny one."""

import torch
from tiny_models import SHAPE, build_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Glm4Config,
    GptOssConfig,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3_5Config,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SmolLM3Config,
)

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

DENSE = {
    "Llama": lambda: LlamaConfig(**SHAPE),
    "Mistral": lambda: MistralConfig(**SHAPE),
    "Qwen2": lambda: Qwen2Config(**WITHOUT_HEAD_DIM),
    "Qwen3": lambda: Qwen3Config(**SHAPE),
    "SmolLM3": lambda: SmolLM3Config(**WITHOUT_HEAD_DIM),
    "OLMo 2": lambda: Olmo2Config(**WITHOUT_HEAD_DIM),
    "OLMo 3": lambda: Olmo3Config(**WITHOUT_HEAD_DIM, sliding_window=16),
    "Phi-3": lambda: Phi3Config(**WITHOUT_HEAD_DIM),
    "GLM-4": lambda: Glm4Config(**SHAPE),
    "Gemma 3": lambda: Gemma3TextConfig(**SHAPE | {"query_pre_attn_scalar": 32}),
}
MIXTURES = {
    "Mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=4),
    "Qwen3-MoE": lambda: Qwen3MoeConfig(**SHAPE, **EXPERTS),
    "gpt-oss": lambda: GptOssConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
}
HYBRID = {
    "Qwen3.5": lambda: Qwen3_5TextConfig(**SHAPE | FOUR_LAYERS, **LINEAR),
    "Qwen3.5-MoE": lambda: Qwen3_5MoeTextConfig(
        **SHAPE | FOUR_LAYERS, **LINEAR, **EXPERTS, shared_expert_intermediate_size=32
    ),
    "Qwen3-Next": lambda: Qwen3NextConfig(
        **SHAPE | FOUR_LAYERS, **LINEAR, **EXPERTS, shared_expert_intermediate_size=32
    ),
    "LFM2": lambda: Lfm2Config(
        **WITHOUT_HEAD_DIM | FOUR_LAYERS, layer_types=["conv", "full_attention"] * 2, conv_dim=64, block_dim=64
    ),
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
FAMILIES = {
    **DENSE,
    **MIXTURES,
    **HYBRID,
    "Qwen3.5 with images": COMPOSITE["Qwen3.5"],
    "Gemma 3 with images": COMPOSITE["Gemma3"],
    "Granite without scale": lambda: GraniteConfig(**WITHOUT_HEAD_DIM, logits_scaling=1.0),
}
HYBRID_FAMILIES = {*HYBRID, "Qwen3.5 with images"}


def save_family(name, folder):
    """Write a tiny random model of a family, with a tokenizer."""
    return save_config(FAMILIES[name](), folder)


def save_config(config, folder):
    """As `save_model`; composite models whole."""
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)
