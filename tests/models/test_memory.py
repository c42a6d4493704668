import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_specrl.models.memory import ModelSize, device_memory, model_size, moments, training_memory
from lit_specrl.models.policy import Policy

PARAMETERS = [torch.nn.Parameter(torch.zeros(1))]


@pytest.mark.parametrize("lora", [None, {"r": 4, "target_modules": "all-linear"}])
def test_parameters_are_counted_without_weights(tiny_model, tiny_qwen, lora):
    for folder in (tiny_model, tiny_qwen):  # embeddings apart and tied
        policy = Policy.build(folder, lora=lora)
        everyone = list(policy.model.parameters())
        trained = sum(each.numel() for each in everyone if each.requires_grad)
        assert model_size(folder, lora) == (sum(each.numel() for each in everyone), trained)
    assert model_size(tiny_model).num_parameters == AutoModelForCausalLM.from_pretrained(tiny_model).num_parameters()


def test_memory_of_full_training_with_a_reference_over_four_ranks():
    adam = torch.optim.AdamW(PARAMETERS)
    assert training_memory(ModelSize(100, 100), torch.float32, adam, 4, 1) == {
        "weights": 100,
        "gradients": 100,
        "optimizer": 200,
        "reference": 100,
    }


def test_memory_of_adapters_in_float32_on_weights_in_bfloat16():
    assert training_memory(ModelSize(1000, 10), torch.bfloat16, torch.optim.SGD(PARAMETERS, momentum=0.9)) == {
        "weights": 2000,
        "gradients": 40,
        "optimizer": 40,
    }


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (torch.optim.SGD(PARAMETERS), 0),
        (torch.optim.SGD(PARAMETERS, momentum=0.9), 1),
        (torch.optim.AdamW(PARAMETERS), 2),
        (torch.optim.Adam(PARAMETERS, amsgrad=True), 3),
    ],
)
def test_numbers_that_an_optimizer_keeps_for_each_parameter(optimizer, expected):
    assert moments(optimizer) == expected
    for parameter in PARAMETERS:
        parameter.grad = torch.ones(1)
    optimizer.step()
    state = optimizer.state[PARAMETERS[0]]
    kept = [value for name, value in state.items() if torch.is_tensor(value) and name != "step"]
    assert len(kept) == expected


def test_the_host_has_memory():
    assert 2**28 < device_memory(torch.device("cpu")) < 2**48
