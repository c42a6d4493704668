"""What critics say of given responses, before anything is learned."""

import pytest
import torch
from rows import PROMPT_INDEX, PROMPTS, RESPONSES, padded
from transformers import AutoModel, LlamaConfig, PhiConfig

from lit_specrl import SeparateCritic, SharedTrunkCritic
from lit_specrl.experience import Experience
from lit_specrl.models.policy import Policy

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CRITICS = [SeparateCritic, SharedTrunkCritic]


@pytest.fixture(params=["llama", "qwen"])
def folder(request, tiny_model, tiny_qwen):
    return {"llama": tiny_model, "qwen": tiny_qwen}[request.param]


def with_weights(head):
    """The head as if it had learned something."""
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(head.linear.weight, generator=generator)
    torch.nn.init.constant_(head.linear.bias, 0.5)
    return head


@pytest.fixture
def separate(folder):
    critic = SeparateCritic()
    critic.build(Policy.build(folder), folder)
    with_weights(critic.head)
    return critic


@pytest.fixture
def policy_with_head(folder):
    policy = Policy.build(folder)
    SharedTrunkCritic().build(policy, folder)
    with_weights(policy.value_head)
    return policy


def assert_values_of_rows_alone(values, backbone, head):
    """Each response token is valued from the hidden state before it, of its row alone and without padding."""
    assert values.shape == (6, 6)
    for row, (owner, response) in enumerate(zip(PROMPT_INDEX, RESPONSES, strict=True)):
        hidden = backbone(torch.tensor([PROMPTS[owner] + response])).last_hidden_state[0]  # [L, H]
        alone = hidden[len(PROMPTS[owner]) - 1 : -1] @ head.linear.weight[0] + head.linear.bias
        torch.testing.assert_close(values[row, : len(response)], alone, rtol=0, atol=2e-5)
        assert values[row, len(response) :].count_nonzero() == 0


@pytest.mark.parametrize("share_prompts", [False, True], ids=["plain", "shared"])
def test_separate_critic_gives_each_row_the_values_it_has_alone(folder, separate, share_prompts):
    values = separate(*padded(), share_prompts=share_prompts)
    assert values.dtype == torch.float32
    assert_values_of_rows_alone(values, AutoModel.from_pretrained(folder), separate.head)


@pytest.mark.parametrize("share_prompts", [False, True], ids=["plain", "shared"])
def test_shared_trunk_critic_is_a_head_on_the_states_of_the_policy(folder, policy_with_head, share_prompts):
    out = policy_with_head(*padded(), temperature=0.7, share_prompts=share_prompts)
    assert_values_of_rows_alone(out.values, AutoModel.from_pretrained(folder), policy_with_head.value_head)
    without = Policy.build(folder)(*padded(), temperature=0.7, share_prompts=share_prompts)
    torch.testing.assert_close(out.logprobs, without.logprobs, rtol=0, atol=0)
    assert without.values is None


def gradients(module, values):
    """Gradients of a sum in which every token has its own weight."""
    module.zero_grad()
    upstream = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    (values * upstream).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None}


def test_sharing_prompts_changes_neither_values_nor_gradients_of_a_separate_critic(separate):
    plain, shared = separate(*padded()), separate(*padded(), share_prompts=True)
    torch.testing.assert_close(shared, plain, rtol=0, atol=2e-5)
    expected = gradients(separate, plain)
    assert set(expected) == dict(separate.named_parameters()).keys()
    torch.testing.assert_close(gradients(separate, shared), expected, rtol=1e-4, atol=1e-4)


def test_sharing_prompts_changes_neither_values_nor_gradients_of_a_shared_trunk(policy_with_head):
    plain, shared = (policy_with_head(*padded(), share_prompts=share).values for share in (False, True))
    torch.testing.assert_close(shared, plain, rtol=0, atol=2e-5)
    expected = gradients(policy_with_head, plain)
    assert {"value_head.linear.weight", "model.model.embed_tokens.weight"} <= set(expected)
    torch.testing.assert_close(gradients(policy_with_head, shared), expected, rtol=1e-4, atol=1e-4)


def test_a_detached_head_keeps_its_gradient_to_itself(policy_with_head):
    values = policy_with_head(*padded()).values
    policy_with_head.value_head.detach = True
    detached = policy_with_head(*padded()).values
    torch.testing.assert_close(detached, values, rtol=0, atol=0)
    assert set(gradients(policy_with_head, detached)) == {"value_head.linear.weight", "value_head.linear.bias"}


@pytest.mark.parametrize("share_prompts", [False, True], ids=["plain", "shared"])
def test_values_begin_at_zero(folder, share_prompts):
    policy, separate = Policy.build(folder), SeparateCritic()
    separate.build(policy, folder)
    SharedTrunkCritic().build(policy, folder)
    assert separate(*padded(), share_prompts=share_prompts).count_nonzero() == 0
    assert policy(*padded(), share_prompts=share_prompts).values.count_nonzero() == 0


# ------------------------------------------------------------------------------------------------------------ weights


def test_a_separate_critic_begins_with_the_weights_of_the_policy_and_owns_all_of_its_own(tiny_model):
    policy, critic = Policy.build(tiny_model), SeparateCritic()
    critic.build(policy, tiny_model)
    trunk = {f"backbone.{name}": value for name, value in policy.model.model.state_dict().items()}
    weights = critic.state_dict()
    torch.testing.assert_close({name: weights[name] for name in trunk}, trunk, rtol=0, atol=0)
    assert set(weights) - set(trunk) == {"head.linear.weight", "head.linear.bias"}
    owned = list(critic.trained_parameters(policy))
    assert {id(parameter) for parameter in owned} == {id(parameter) for parameter in critic.parameters()}
    assert not {id(parameter) for parameter in owned} & {id(parameter) for parameter in policy.parameters()}


def test_a_separate_critic_may_begin_with_another_model(tiny_model, tiny_qwen):
    policy, critic = Policy.build(tiny_model), SeparateCritic(tiny_qwen)
    critic.build(policy, tiny_model)
    expected = AutoModel.from_pretrained(tiny_qwen).state_dict()
    torch.testing.assert_close(critic.backbone.state_dict(), expected, rtol=0, atol=0)


def test_a_shared_trunk_critic_owns_the_head_alone(tiny_model):
    policy, critic = Policy.build(tiny_model), SharedTrunkCritic()
    critic.build(policy, tiny_model)
    owned = {id(parameter) for parameter in critic.trained_parameters(policy)}
    assert owned == {id(parameter) for parameter in policy.value_head.parameters()}


def test_building_again_keeps_what_was_learned(tiny_model):
    """A second `fit` of one module builds again."""
    policy, separate, shared = Policy.build(tiny_model), SeparateCritic(), SharedTrunkCritic()
    for critic in (separate, shared):
        critic.build(policy, tiny_model)
    with_weights(separate.head)
    with_weights(policy.value_head)
    for critic in (separate, shared):
        critic.build(policy, tiny_model)
    assert separate.head.linear.bias.item() == policy.value_head.linear.bias.item() == 0.5


def test_a_separate_critic_is_deterministic_in_training_mode(tiny_model, tmp_path):
    """Old and new values must come from the same function."""
    AutoModel.from_config(PhiConfig(**SMALL, resid_pdrop=0.5, embd_pdrop=0.5)).save_pretrained(tmp_path)
    critic = SeparateCritic(str(tmp_path))
    critic.build(Policy.build(tiny_model), tiny_model)
    with_weights(critic.head)
    critic.train()
    torch.testing.assert_close(critic(*padded()), critic(*padded()), rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("critic_class", CRITICS)
@pytest.mark.parametrize(
    ("cliprange_value", "losses", "num_clipped"),
    [(0.5, [3.125, 0.5, 0.0], 1), (None, [0.5, 0.5, 0.0], 0)],
    ids=["clipped", "plain"],
)
def test_loss_is_half_the_squared_error_clipped_around_the_old_values(
    critic_class, cliprange_value, losses, num_clipped
):
    """Values 2, 1 and 9 against returns 3, 2 and 0; the first moved from 0, the second from 1, the third does not
    count."""
    mask = torch.tensor([[True, True, False]])
    zeros = torch.zeros(1, 3)
    part = Experience(
        prompt_ids=torch.ones(1, 1, dtype=torch.long),
        prompt_mask=torch.ones(1, 1, dtype=torch.bool),
        prompt_index=torch.zeros(1, dtype=torch.long),
        response_ids=torch.ones(1, 3, dtype=torch.long),
        response_mask=torch.ones(1, 3, dtype=torch.bool),
        loss_mask=mask,
        sampling_logprobs=zeros,
        rewards=torch.zeros(1),
        advantages=zeros,
        policy_version=0,
        values=torch.tensor([[0.0, 1.0, 0.0]]),
        returns=torch.tensor([[3.0, 2.0, 0.0]]),
    )
    loss, statistics = critic_class(cliprange_value=cliprange_value).loss(torch.tensor([[2.0, 1.0, 9.0]]), part)
    assert loss.tolist() == [losses]
    assert statistics.metrics() == {
        "critic/vf_loss": pytest.approx(sum(losses) / 2),
        "critic/vf_clipfrac": pytest.approx(num_clipped / 2),
    }


# ---------------------------------------------------------------------------------------------------------- bad input


def test_a_critic_with_a_smaller_vocabulary_than_the_policy_is_refused(tiny_model, tmp_path):
    AutoModel.from_config(LlamaConfig(**SMALL | {"vocab_size": 100})).save_pretrained(tmp_path)
    message = r"the critic '.*' knows 100 tokens, the policy 128; use a model with the policy's tokenizer"
    with pytest.raises(ValueError, match=message):
        SeparateCritic(str(tmp_path)).build(Policy.build(tiny_model), tiny_model)


@pytest.mark.parametrize("critic_class", CRITICS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps must not be negative, got -1"),
        ({"cliprange_value": 0.0}, r"cliprange_value must be positive, got 0.0; use None for no clipping"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive, got 0.0"),
    ],
)
def test_arguments_out_of_range_are_refused(critic_class, options, message):
    with pytest.raises(ValueError, match=message):
        critic_class(**options)


def test_a_value_loss_without_weight_is_refused():
    with pytest.raises(ValueError, match="coefficient must be positive, got 0"):
        SharedTrunkCritic(coefficient=0.0)
