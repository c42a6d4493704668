import shutil

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from training import History, arithmetic, grpo, make_trainer, weights_of
from transformers import AutoModelForCausalLM

from lit_specrl import PPO
from lit_specrl.distributed.collectives import whole_tensor
from lit_specrl.experience import padded_rows
from lit_specrl.models.policy import Policy

needs_a_compiler = pytest.mark.skipif(
    not torch.cuda.is_available() and shutil.which("g++") is None, reason="inductor needs a C++ compiler"
)


@pytest.fixture
def compiled_graphs(monkeypatch):
    """Compilations without code of their own, which would take half a minute each; as many as were asked for."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **options: compile_module(module, backend=backend, **options)
    )
    torch.compiler.reset()
    return graphs


def small_rewards(completions, **columns):
    return [len(set(text)) / 10 for text in completions]


def fit(module, **options):
    history = History()
    torch.manual_seed(0)  # adapters begin with random numbers
    make_trainer(history, **options).fit(module, datamodule=arithmetic())
    return weights_of(module), history.steps


SGD = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1.0)}
RUNS = {
    "plain": lambda model, **options: grpo(model, **SGD | options),
    "reference": lambda model, **options: grpo(model, beta=0.1, num_minibatches=2, **SGD | options),
    "checkpointed": lambda model, **options: grpo(model, gradient_checkpointing=True, **SGD | options),
    "adapters": lambda model, **options: grpo(
        model, lora={"r": 4, "target_modules": "all-linear"}, beta=0.1, **SGD | options
    ),
    "critic": lambda model, **options: PPO(
        model, [small_rewards], num_generations=4, max_completion_length=12, **SGD | options
    ),
}


@pytest.mark.parametrize("run", RUNS)
def test_compiled_layers_learn_the_same_and_compile_seldom(model_folder, compiled_graphs, run):
    """Micro-batches of many shapes, generation with a growing cache, two layers: none of these compiles again."""
    options = {"micro_batch_tokens": 90}
    plain, _ = fit(RUNS[run](model_folder, **options))
    assert not compiled_graphs
    compiled, steps = fit(RUNS[run](model_folder, compile_layers=True, **options))
    num_models = 1 if run in ("plain", "checkpointed") else 2
    # of one row and of several, with padding and without, with gradient and without; one by chance of a length
    assert 1 <= len(compiled_graphs) <= 8 * num_models + 1
    assert len(steps) == 4
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-3)


@needs_a_compiler
def test_compiled_code_learns_the_same(model_folder):
    torch.compiler.reset()
    plain, compiled = (
        fit(grpo(model_folder, compile_layers=is_compiled, **SGD), limit_train_batches=1)[0]
        for is_compiled in (False, True)
    )
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-4)


def test_names_of_weights_stay_what_they_are(tiny_model, compiled_graphs, tmp_path):
    plain, compiled = (Policy.build(tiny_model, compile_layers=is_compiled) for is_compiled in (False, True))
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in compiled.named_weights()] == [name for name, _ in plain.named_weights()]
    compiled.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    torch.testing.assert_close(saved, plain.model.state_dict(), rtol=0, atol=0)


def test_compiled_layers_compute_each_response_with_its_prompt(tiny_model, compiled_graphs):
    assert Policy.build(tiny_model).can_share_prompts
    assert not Policy.build(tiny_model, compile_layers=True).can_share_prompts


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_compiled_layers_can_be_sharded(tiny_model, compiled_graphs, mesh):
    """Their gradients are those of a plain policy, and their weights are gathered under the same names."""
    part = padded_rows([[5, 6, 7], [8]], [0, 1, 0], [[9, 2], [10, 11, 12], [13]])
    plain, sharded = (Policy.build(tiny_model, compile_layers=is_compiled) for is_compiled in (False, True))
    sharded.shard(mesh=mesh)
    found = []
    for policy in (plain, sharded):
        policy(*part.inputs, layout=part.layout).logprobs.sum().backward()
        gradients = {name: whole_tensor(parameter.grad) for name, parameter in policy.model.named_parameters()}
        found.append((gradients, dict(policy.named_weights())))
    assert compiled_graphs
    torch.testing.assert_close(found[1], found[0])
