"""Kinds of models: right, or refused with a sentence, when the policy is built."""

from pathlib import Path

import pytest
import torch
from architectures import (
    COMPOSITE,
    EXPERTS,
    FAMILIES,
    HYBRID,
    HYBRID_FAMILIES,
    REFUSED,
    WITHOUT_HEAD_DIM,
    save_config,
    save_family,
)
from colocated import Colocated, policy_logprobs, sampling_logprobs
from rows import PROMPT_INDEX, PROMPTS, RESPONSES, gradients, padded, row_logprobs
from safetensors.torch import load_file
from tiny_models import SHAPE, save_model
from training import History, arithmetic, grpo, make_trainer
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    Qwen3MoeConfig,
)

from lit_specrl import PPO
from lit_specrl.drafting.eagle3 import check_architecture
from lit_specrl.engines import TransformersEngine
from lit_specrl.models.critic import SeparateCritic
from lit_specrl.models.policy import Policy
from lit_specrl.models.pretrained import check_model_exists

ATTENTION = ["q_proj", "v_proj"]
LORA = {"Mixtral": ATTENTION, "Qwen3-MoE": ATTENTION, "Qwen3-Next": ATTENTION, "Falcon-H1": ATTENTION}
"""What can be adapted where `all-linear` is refused: routers and packed experts are no linear layers."""


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


@pytest.mark.parametrize(
    ("kind", "name"), [*[("hybrid", name) for name in HYBRID], *[("composite", name) for name in COMPOSITE]]
)
def test_it_trains_on_the_logprobs_that_it_samples_with(kind, name, tmp_path):
    """Prompts of unequal length, several rows a prompt, responses that end at different tokens."""
    module, history = (
        grpo(
            save_config((HYBRID if kind == "hybrid" else COMPOSITE)[name](), tmp_path / "model"),
            max_completion_length=24,
        ),
        History(),
    )
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


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Name and folder of a tiny model of each family of the table in docs/guides/models.md."""
    return request.param, save_family(request.param, tmp_path_factory.mktemp("family"))


def test_weights_go_by_the_names_and_in_the_pieces_of_the_models_files(family):
    """Engines read a model's files: experts one by one, the text part of a composite model under a longer name."""
    _, folder = family
    written = {name: weight for file in Path(folder).glob("*.safetensors") for name, weight in load_file(file).items()}
    handed_over = dict(Policy.build(folder).named_weights())
    assert not set(handed_over) - set(written)
    assert all("visual" in name for name in set(written) - set(handed_over))
    torch.testing.assert_close(handed_over, {name: written[name] for name in handed_over}, rtol=0, atol=0)


def test_transformers_engine_samples_with_the_policy(family):
    _, folder = family
    engine = Colocated(TransformersEngine(), folder)
    engine.policy.eval()
    engine.sync()
    rollouts = engine.generate(PROMPTS, group=2)
    expected = policy_logprobs(engine.policy, rollouts, 1.0)
    torch.testing.assert_close(sampling_logprobs(rollouts), expected, rtol=0, atol=1e-3)
    shares = "images" not in family[0] or "Gemma" in family[0]
    assert engine.policy.can_share_prompts == (shares and family[0] not in HYBRID_FAMILIES)


def test_adapters_get_gradients(family):
    name, folder = family
    if name in LORA:
        with pytest.raises(ValueError, match=r"target_modules"):
            Policy.build(folder, lora={"r": 4, "target_modules": "all-linear"})
    policy = Policy.build(folder, lora={"r": 4, "target_modules": LORA.get(name, "all-linear")})
    policy(*padded()).logprobs.sum().backward()
    assert any(weight.grad is not None and weight.grad.any() for weight in policy.parameters())


def test_a_head_can_be_built_for_the_kinds_that_the_table_names(family):
    name, folder = family
    config = check_model_exists(folder).get_text_config()
    config.num_hidden_layers = 4
    if name in ("Llama", "Mistral", "Qwen2", "Qwen3"):
        return check_architecture(config)
    with pytest.raises(ValueError, match="an EAGLE-3 head can be built for"):
        check_architecture(config)


@pytest.mark.parametrize(
    "config",
    [
        OPTConfig(
            vocab_size=128,
            hidden_size=64,
            num_hidden_layers=2,
            ffn_dim=96,
            num_attention_heads=2,
            max_position_embeddings=256,
            word_embed_proj_dim=64,
            dropout=0.1,
        ),
        BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=2, hidden_dropout=0.1),
    ],
    ids=["dropout as a function", "no limit of positions"],
)
def test_older_families_train(config, tmp_path):
    module = grpo(save_model(tmp_path / "model", config))
    make_trainer(default_root_dir=tmp_path, limit_train_batches=1).fit(module, datamodule=arithmetic())
    assert module.policy_version == 1
