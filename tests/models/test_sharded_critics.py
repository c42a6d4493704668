"""Critics in shards."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from lit_specrl import SeparateCritic, SharedTrunkCritic
from lit_specrl.distributed.collectives import whole_tensor
from lit_specrl.experience import padded_rows
from lit_specrl.models.critic import build_models


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def values_and_gradient(model, kind, dtype, sharding):
    torch.manual_seed(0)
    part, critic = padded_rows([[5, 6, 7], [8]], [0, 1], [[9, 2], [10, 11, 12]]), kind()
    policy, _ = build_models(model, {"dtype": dtype}, lora=None, critic=critic, with_reference=False, sharding=sharding)
    values = policy(*part.inputs).values if kind is SharedTrunkCritic else critic(*part.inputs)
    (values * part.response_mask).sum().backward()
    head = policy.value_head if kind is SharedTrunkCritic else critic.head
    return values.detach(), {name: whole_tensor(parameter.grad) for name, parameter in head.named_parameters()}


@pytest.mark.parametrize("kind", [SeparateCritic, SharedTrunkCritic])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_in_shards_is_the_head(tiny_model, mesh, kind, dtype):
    """It is float32, also beside weights in bfloat16, with which it cannot share a group of FSDP2."""
    expected = values_and_gradient(tiny_model, kind, dtype, None)
    found = values_and_gradient(tiny_model, kind, dtype, {"mesh": mesh})
    assert {gradient.dtype for gradient in found[1].values()} == {torch.float32}
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", [SeparateCritic, SharedTrunkCritic])
def test_a_head_stays_float32_in_mixed_precision(tiny_model, mesh, kind):
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    values, gradient = values_and_gradient(tiny_model, kind, "float32", {"mesh": mesh, "mp_policy": mixed})
    assert values.dtype == torch.float32
    assert {entry.dtype for entry in gradient.values()} == {torch.float32}
