import sys
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rows import gradients, padded
from transformers import AutoModelForCausalLM, GPT2Config

from lit_specrl import GRPO, PromptDataModule
from lit_specrl.data import ArithmeticSource
from lit_specrl.drafting import DraftModel, NGramDrafter
from lit_specrl.engines import TransformersEngine, VLLMEngine
from lit_specrl.engines.vllm.weights import adapter_options
from lit_specrl.models.lora import adapted_layers, add_adapters, lora_config
from lit_specrl.models.policy import Policy
from lit_specrl.types import PromptBatch, RolloutRequest, SamplingConfig

LORA = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
PARTIAL = {"r": 2, "use_rslora": True, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 3}}


@pytest.fixture(params=["llama", "qwen"])
def folder(request, tiny_model, tiny_qwen):
    return {"llama": tiny_model, "qwen": tiny_qwen}[request.param]


def trained(folder, lora=LORA, **options):
    """A policy whose adapters have moved far from where they began."""
    torch.manual_seed(0)
    policy = Policy.build(folder, lora=lora, **options)
    with torch.no_grad():
        for parameter in trainable(policy).values():
            parameter += 0.1 * torch.randn(parameter.shape)
    return policy


def trainable(policy):
    return {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}


def merged(policy, folder, dtype=torch.float32):
    """A plain policy with the named weights of another."""
    plain = Policy.build(folder).to(dtype)
    parameters = dict(plain.model.named_parameters())
    for name, weight in policy.named_weights():
        parameters[name].data.copy_(weight)
    return plain


def same(ours, theirs):
    """Whether the responses of two policies are equally likely, to the last bit."""
    return torch.equal(ours(*padded()).logprobs, theirs(*padded()).logprobs)


# ----------------------------------------------------------------------------------------------------------- the start


def test_a_policy_begins_as_the_model_itself_with_adapters_alone_to_train(folder):
    policy, plain = Policy.build(folder, lora=LORA), Policy.build(folder)
    assert same(policy, plain)
    assert len(trainable(policy)) == 2 * 2 * 7  # A and B, layers, projections
    assert all(".lora_" in name for name in trainable(policy))


def test_adapters_begin_where_the_seed_says(tiny_model):
    def build(seed):
        torch.manual_seed(seed)
        return {name: weight.detach() for name, weight in trainable(Policy.build(tiny_model, lora=LORA)).items()}

    torch.testing.assert_close(build(1), build(1), rtol=0, atol=0)
    down = "model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert not torch.equal(build(1)[down], build(2)[down])


def test_adapters_of_a_bfloat16_model_are_float32(tiny_model):
    """In bfloat16 an update of one part in a thousand is no update."""
    policy = Policy.build(tiny_model, dtype="bfloat16", lora=LORA)
    assert {parameter.dtype for parameter in trainable(policy).values()} == {torch.float32}
    assert {weight.dtype for _, weight in policy.named_weights()} == {torch.bfloat16}


# ----------------------------------------------------------------------------------------------------- merged weights


@pytest.mark.parametrize("lora", [LORA, PARTIAL], ids=["all", "some"])
def test_merged_weights_are_the_policy_under_plain_names(folder, lora):
    policy = trained(folder, lora).double()  # in float32 the two round differently by some 1e-5
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    plain = merged(policy, folder, torch.float64)
    assert [name for name, _ in policy.named_weights()] == [name for name, _ in plain.named_weights()]
    assert not any(weight.requires_grad for _, weight in policy.named_weights())
    torch.testing.assert_close(plain(*padded()).logprobs, policy(*padded()).logprobs, rtol=0, atol=2e-6)
    assert (plain(*padded()).logprobs - Policy.build(folder)(*padded()).logprobs).abs().max() > 0.1
    torch.testing.assert_close(policy.state_dict(), before, rtol=0, atol=0)


def test_biases_keep_their_names(tiny_model):
    config = AutoModelForCausalLM.from_pretrained(tiny_model).config
    config.attention_bias = True
    model = AutoModelForCausalLM.from_config(config)
    names = [name for name, _ in model.named_parameters()]
    add_adapters(model, lora_config(LORA))
    assert [name for name, _ in Policy(model).named_weights()] == names
    assert "model.layers.0.self_attn.q_proj.bias" in names


def test_autocast_does_not_reach_the_merge(tiny_model):
    """Weights are synced from within the training step, which runs under the trainer's autocast."""
    policy = trained(tiny_model)
    expected = dict(policy.named_weights())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(dict(policy.named_weights()), expected, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------------ disabled


def test_without_its_adapters_the_policy_is_the_initial_model(folder):
    policy, plain = trained(folder), Policy.build(folder)
    before = policy(*padded()).logprobs
    with policy.adapters_disabled():
        assert same(policy, plain)
    assert not same(policy, plain)
    assert torch.equal(policy(*padded()).logprobs, before)
    assert len(trainable(policy)) == 28


def test_an_exception_brings_the_adapters_back(tiny_model):
    policy = trained(tiny_model)
    with pytest.raises(KeyError), policy.adapters_disabled():
        raise KeyError
    assert not same(policy, Policy.build(tiny_model))
    assert len(trainable(policy)) == 28


def test_a_policy_without_adapters_has_none_to_disable(tiny_model):
    with pytest.raises(ValueError, match="the policy has no adapters"), Policy.build(tiny_model).adapters_disabled():
        pass


# ------------------------------------------------------------------------------------------------------------ training


def adapter_gradients(policy, share_prompts=False):
    """Gradients of the adapters; nothing else may have one."""
    policy.zero_grad()
    logprobs = policy(*padded(), share_prompts=share_prompts).logprobs
    (logprobs * torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    found = {
        name: parameter.grad.clone() for name, parameter in policy.named_parameters() if parameter.grad is not None
    }
    assert set(found) == set(trainable(policy))
    return found


def test_gradients_of_adapters_are_those_of_the_merged_weights_by_the_chain_rule(folder):
    policy = trained(folder)
    found, of_weights = adapter_gradients(policy), gradients(merged(policy, folder), padded(), False)
    for name, layer in adapted_layers(policy.model).items():
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        outer = layer.scaling["default"] * of_weights[f"model.{name}.weight"]
        for leaf, expected in {"lora_A": up.T @ outer, "lora_B": outer @ down.T}.items():
            torch.testing.assert_close(
                found[f"model.{name}.{leaf}.default.weight"], expected.detach(), rtol=1e-3, atol=1e-3
            )


def test_sharing_prompts_changes_neither_values_nor_gradients(folder):
    policy = trained(folder)
    plain, shared = policy(*padded()), policy(*padded(), share_prompts=True)
    torch.testing.assert_close(shared.logprobs, plain.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(adapter_gradients(policy, True), adapter_gradients(policy), rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_leaves_gradients_as_they_are(tiny_model):
    policy, plain = trained(tiny_model, gradient_checkpointing=True), trained(tiny_model)
    calls = []
    policy.model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append("norm"))
    torch.testing.assert_close(adapter_gradients(policy), adapter_gradients(plain))
    assert calls == ["norm", "norm"]  # forward, and again in the backward pass


class Recorder(L.Callback):
    def __init__(self):
        self.kl = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.kl.append(pl_module.step_metrics["kl"])


def fit(model, folder, **options):
    """A run of three steps; the module, its trainer, and the KL to the initial policy at each step."""
    torch.manual_seed(0)
    recorder = Recorder()
    module = GRPO(
        model,
        [lambda completions, **columns: [len(set(text)) / 10 for text in completions]],
        num_generations=4,
        max_completion_length=8,
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        beta=0.05,
        **options,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[recorder],
    )
    trainer.fit(module, datamodule=PromptDataModule(ArithmeticSource(6), batch_size=2, max_prompt_length=64))
    return module, trainer, recorder.kl


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_a_run_trains_adapters_and_takes_the_bare_model_for_reference(
    tiny_model, tmp_path, monkeypatch, gradient_checkpointing
):
    builds, build = [], Policy.build.__func__
    monkeypatch.setattr(
        Policy, "build", classmethod(lambda *args, **kwargs: builds.append(args) or build(*args, **kwargs))
    )
    module, _, kl = fit(tiny_model, tmp_path, lora=LORA, gradient_checkpointing=gradient_checkpointing)
    assert len(builds) == 1  # the reference is not loaded a second time
    assert kl[0] == 0
    assert all(value > 1e-4 for value in kl[1:])
    initial = dict(AutoModelForCausalLM.from_pretrained(tiny_model).named_parameters())
    for name, parameter in module.policy.model.named_parameters():
        if ".lora_B." in name:
            assert parameter.count_nonzero() > 0  # zero at the start
        elif ".lora_A." not in name:
            assert torch.equal(parameter, initial[name.replace(".base_layer.", ".")])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora_alpha": 64}, "lora_alpha=8, and this run has 64"),
        ({"use_rslora": True}, "use_rslora=False, and this run has True"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern="),
    ],
)
def test_adapters_that_would_act_otherwise_are_refused_on_resume(tiny_model, tmp_path, options, said):
    """Their shapes are those of the checkpoint."""
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    _, trainer, _ = fit(tiny_model, tmp_path, lora=lora)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    arguments = {"model": tiny_model, "rewards": [lambda completions, **_: [0.0 for _ in completions]]}
    assert GRPO.load_from_checkpoint(tmp_path / "run.ckpt", lora=lora, **arguments).step == 3
    with pytest.raises(MisconfigurationException, match=f"adapters were trained with {said}"):
        GRPO.load_from_checkpoint(tmp_path / "run.ckpt", lora=lora | options, **arguments)


# -------------------------------------------------------------------------------------------------------------- engines


FLOAT32 = partial(VLLMEngine, dtype="float32", cpu_kv_cache_gib=0.25)
ENGINES = {"transformers": TransformersEngine, "vllm": FLOAT32, "unmerged": partial(FLOAT32, merge_adapters=False)}


@pytest.mark.parametrize("lora", [LORA, PARTIAL], ids=["all", "some"])
@pytest.mark.parametrize("kind", ENGINES)
def test_engines_generate_with_the_adapters(kind, lora, folder):
    policy = trained(folder, lora)
    plain = merged(policy, folder)
    engine = ENGINES[kind]()
    prompts = PromptBatch(["0", "1"], [[5, 6, 7], list(range(20, 60))], [""] * 2, [None] * 2, [""] * 2)
    request = RolloutRequest(prompts, SamplingConfig(1, 24, temperature=0.0), [0, 1], 1)
    reference = TransformersEngine()
    reference.start(plain, folder, 128, {2})
    reference.load_weights([], 1)
    expected = reference.generate(request)
    engine.start(policy, folder, 128, {2})
    try:
        engine.load_policy(policy, 1)
        rollouts = engine.generate(request)
    finally:
        engine.shutdown()
    assert rollouts.response_ids == expected.response_ids
    for ours, theirs in zip(rollouts.sampling_logprobs, expected.sampling_logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=1e-3)


@pytest.fixture
def two_engines(tiny_model):
    """One takes merged weights, one adapters; of a policy that goes on learning."""

    def start(drafter=None):
        policy = trained(tiny_model)
        engines = {name: ENGINES[name]() for name in ("vllm", "unmerged")}
        for engine in engines.values():
            engine.drafter = drafter and drafter(tiny_model)
            engine.start(policy, tiny_model, 128, {2})
            started.append(engine)
        return policy, engines

    started = []
    yield start
    for engine in started:
        engine.shutdown()


def ask(version, **options):
    prompts = PromptBatch(["0", "1"], [[5, 6, 7], list(range(20, 60))], [""] * 2, [None] * 2, [""] * 2)
    return RolloutRequest(prompts, SamplingConfig(2, 24), list(range(4)), version, **options)


def move(policy):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(policy).values():
            parameter += 0.1 * torch.randn(parameter.shape)


DRAFTERS = {
    "none": None,
    "model": lambda folder: DraftModel(folder, num_speculative_tokens=3, sampled=False),
    "n-grams": lambda folder: NGramDrafter(num_speculative_tokens=3),
}


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_adapters_alone_give_the_rollouts_of_merged_weights(drafter, two_engines):
    """Sampled, verified and speculated; before and after the policy has learnt."""
    policy, engines = two_engines(DRAFTERS[drafter])
    cached, seen = {}, []
    for version in (1, 2):
        rollouts, scores = {}, {name: {} for name in engines}
        for name, engine in engines.items():

            def accept(row, logprobs, scores=scores[name]):
                scores[row] = logprobs
                return len(logprobs) // 2

            engine.load_policy(policy, version)
            rollouts[name] = engine.generate(ask(version, cached_responses=dict(cached), accept=accept))
        merged, unmerged = rollouts["vllm"], rollouts["unmerged"]
        assert unmerged.response_ids == merged.response_ids
        for ours, theirs in zip(unmerged.sampling_logprobs, merged.sampling_logprobs, strict=True):
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=1e-3, equal_nan=True)
        assert scores["unmerged"].keys() == scores["vllm"].keys() == cached.keys()
        for row, ours in scores["unmerged"].items():
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(scores["vllm"][row]), rtol=0, atol=1e-3)
        seen.append(merged.response_ids)
        cached = {row: response[:-1] for row, response in enumerate(merged.response_ids) if len(response) > 1}
        move(policy)
    assert seen[0] != seen[1]


def test_weights_in_bfloat16_do_not_round_adapters_that_are_not_merged(tiny_model, tmp_path):
    """Merged, what is less than one part in 256 of a weight is lost."""
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(tmp_path)
    policy = trained(str(tmp_path), dtype="bfloat16")
    errors = {}
    for name in ("vllm", "unmerged"):
        engine = ENGINES[name]()
        engine.start(policy, str(tmp_path), 128, {2})
        engine.load_policy(policy, 1)
        rollouts = engine.generate(ask(1))
        engine.shutdown()
        errors[name] = largest_difference(policy, rollouts)
    assert errors["unmerged"] < 1e-4
    assert errors["vllm"] > 10 * errors["unmerged"]


@torch.no_grad()
def largest_difference(policy, rollouts):
    """Between the log-probs that an engine sampled with, and those of the same weights computed in float32."""
    network, differences = policy.model.float(), []
    for row, response in enumerate(rollouts.response_ids):
        prompt = rollouts.request.prompts.prompt_ids[rollouts.request.prompt_index(row)]
        logits = network(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
        differences.append((expected - torch.tensor(rollouts.sampling_logprobs[row])).abs().max())
    return max(differences)


def test_nothing_is_left_of_the_folder_that_adapters_travel_in(two_engines, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    policy, engines = two_engines()
    engines["unmerged"].load_policy(policy, 1)
    assert list(tmp_path.glob("lit_specrl-adapters*")) == []


# ------------------------------------------------------------------------------------------------------------- refusals


def test_adapters_that_are_not_there_are_not_waited_for(tiny_model):
    with pytest.raises(ValueError, match="merge_adapters=False is for a policy with adapters; give the module lora"):
        ENGINES["unmerged"]().start(Policy.build(tiny_model), tiny_model, 128, {2})


def test_weights_for_an_engine_of_adapters_are_refused(tiny_model):
    with pytest.raises(RuntimeError, match="takes adapters, not weights; call load_policy"):
        ENGINES["unmerged"]().load_weights([], 1)


@pytest.mark.parametrize(("rank", "taken"), [(1, 8), (8, 8), (9, 16), (300, 320), (512, 512)])
def test_the_engine_makes_room_for_the_largest_rank(rank, taken):
    assert adapter_options({"a.q_proj": 1, "b.q_proj": rank})["max_lora_rank"] == taken


def test_a_rank_that_vllm_cannot_take_is_refused():
    with pytest.raises(ValueError, match="rank 512 at most, got 513"):
        adapter_options({"a.q_proj": 513})


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 8, "R": 8}, r"lora got R, rank; peft's LoraConfig knows .*lora_alpha, .*\br, .*target_modules"),
        ({"lora_dropout": 0.1}, "lora_dropout must be 0, got 0.1; old and new log-probs must come from the same"),
        ({"use_dora": True}, r"lora cannot have use_dora=True: the policy must be base \+ scaling \* B @ A"),
        ({"bias": "all"}, "lora cannot have bias='all'"),
        ({"modules_to_save": ["lm_head"]}, r"lora cannot have modules_to_save=\['lm_head'\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be true or 'gaussian', got 'pissa'"),
        ({"init_lora_weights": False}, "init_lora_weights must be true or 'gaussian', got False"),
        ({"target_modules": ["q_proj", "lm_head"]}, r"target_modules mean lm_head \(Linear\) too"),
        ({"target_modules": ["embed_tokens"]}, r"target_modules mean model.embed_tokens \(Embedding\) too"),
        ({"target_modules": ["query"]}, r"Target modules \{'query'\} not found"),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else "",
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_what_would_not_be_trained_or_merged_is_refused(tiny_model, lora, message):
    with pytest.raises(ValueError, match=message):
        Policy.build(tiny_model, lora=lora)


def test_settings_that_say_the_default_are_no_settings(tiny_model):
    usual = {"bias": "none", "task_type": "CAUSAL_LM", "lora_dropout": 0.0, "init_lora_weights": "gaussian"}
    assert same(Policy.build(tiny_model, lora=LORA | usual), Policy.build(tiny_model))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_transposed_layers_are_refused():
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"target_modules mean transformer.h.0.attn.c_attn \(Conv1D\) too"):
        add_adapters(model, lora_config({"target_modules": ["c_attn"]}))


def test_the_package_to_install_is_named(tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"lora needs peft; install it with `pip install 'lit_specrl\[lora\]'`"):
        Policy.build(tiny_model, lora=LORA)
