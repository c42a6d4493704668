"""Networks that draft, and how they learn."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lit_specrl.drafting.distillation.buffer import DistillationSample
from lit_specrl.drafting.distillation.draft_losses import AcceptedLength, resolve_draft_loss
from lit_specrl.drafting.distillation.loss import expected_acceptance_length
from lit_specrl.drafting.distillation.trainer import DrafterTrainer, micro_batches
from lit_specrl.drafting.eagle3 import build_head, unrolled_states
from lit_specrl.drafting.networks import CausalNetwork, Eagle3Network

SHAPE = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
TOP = 8


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).eval()


@torch.no_grad()
def sample(policy, seed, num_prompt_tokens, num_response_tokens, layers=(0, 1, 2), weight=1.0, top=TOP):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 32, (num_prompt_tokens,), generator=generator).tolist()
    for _ in range(num_response_tokens):
        logits = policy(torch.tensor([tokens])).logits[0, -1]
        tokens.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
    out = policy(torch.tensor([tokens]), output_hidden_states=True)
    logprobs = out.logits[0, num_prompt_tokens - 1 : -1].log_softmax(-1).topk(top)
    features = [out.hidden_states[layer][0, :-1] for layer in layers]
    return DistillationSample(
        uid=str(seed),
        token_ids=torch.tensor(tokens, dtype=torch.int32),
        num_prompt_tokens=num_prompt_tokens,
        features=torch.cat(features, -1) if features else torch.empty(len(tokens) - 1, 0),
        top_tokens=logprobs.indices.int(),
        top_logprobs=logprobs.values,
        log_mass=torch.zeros(num_response_tokens),
        reward=1.0,
        weight=weight,
        policy_version=0,
    )


def training(network, **options):
    optimizer = torch.optim.AdamW(network.parameters, lr=3e-3, weight_decay=0.0)
    return DrafterTrainer(network, optimizer, **{"num_steps": 3, "max_grad_norm": 10.0} | options)


@torch.no_grad()
def test_a_head_drafts_behind_every_token_but_the_first(policy):
    """Place r at step s is drafted from the features of what comes before place r - s, and the tokens before place
    r."""
    network = Eagle3Network(build_head(policy, "policy"))
    samples = [sample(policy, 1, 4, 5), sample(policy, 2, 2, 3)]
    for index, step in enumerate(network.draft_steps(samples, 3)):
        expected = [(row, place) for row, length in ((0, 5), (1, 3)) for place in range(index + 1, length)]
        assert list(zip(step.rows.tolist(), step.places.tolist(), strict=True)) == expected
        for logits, (row, place) in zip(step.logits, expected, strict=True):
            one = samples[row]
            end = one.num_prompt_tokens + place - index  # tokens known when the draft began
            tokens = one.token_ids.long()[None]
            alone = unrolled_states(
                network.module,
                one.features[None, : end - 1],
                torch.cat([tokens[:, 1:end], tokens[:, end : end + index]], 1)[:, : end - 1],
                torch.ones(1, end - 1, dtype=torch.bool),
                1,
            )
            if index == 0:
                torch.testing.assert_close(logits, network.module.lm_head(next(alone)[0, -1]), atol=1e-4, rtol=1e-4)


def test_a_small_model_drafts_what_it_says_behind_the_text(policy):
    network = CausalNetwork(policy)
    samples = [sample(policy, 1, 4, 5, ()), sample(policy, 2, 2, 3, ())]
    (step,) = network.draft_steps(samples, 3)
    assert step.rows.tolist() == [0] * 4 + [1] * 2 and step.places.tolist() == [1, 2, 3, 4, 1, 2]
    top = torch.cat([one.top_tokens[1:] for one in samples]).long()
    expected = torch.cat([one.top_logprobs[1:] for one in samples])
    torch.testing.assert_close(step.logits.log_softmax(-1).gather(-1, top), expected, atol=1e-4, rtol=0)


def test_a_drafter_that_is_the_policy_is_always_accepted(policy):
    samples = [sample(policy, seed, 3, length, (), top=32) for seed, length in ((1, 6), (2, 4), (3, 1))]
    found = training(CausalNetwork(policy)).evaluate(samples)
    assert found.acceptance == pytest.approx([1, 1, 1], abs=1e-5) and found.kl == pytest.approx(0, abs=1e-5)
    assert found.acceptance_length == pytest.approx(4, abs=1e-4)
    assert found.num_drafts == (6 - 3) + (4 - 3)  # drafts of three tokens that end within the response
    assert found.num_drafted == (5 + 3, 4 + 2, 3 + 1)


def test_the_expected_length_follows_each_draft(policy):
    """Against the drafts of one sample put together by hand."""
    network = Eagle3Network(build_head(policy, "policy"))
    one = sample(policy, 5, 3, 8)
    found = training(network).evaluate([one])
    with torch.no_grad():
        probabilities = {}
        for index, step in enumerate(network.draft_steps([one], 3)):
            draft = step.logits.softmax(-1)
            for place, probs in zip(step.places.tolist(), draft, strict=True):
                own = torch.zeros(32).scatter(0, one.top_tokens[place].long(), one.top_logprobs[place].exp())
                probabilities[index, place] = torch.minimum(own, probs).sum()
    starts = range(1, 6)
    steps = [torch.stack([probabilities[index, start + index] for start in starts]) for index in range(3)]
    assert found.acceptance_length == pytest.approx(float(expected_acceptance_length(steps)), rel=1e-5)
    assert found.num_drafts == 5


def test_rejection_of_each_response_is_that_of_its_first_steps(policy):
    """Whatever micro-batches they are in, in the order asked for; nothing is drafted in a response of one token."""
    own = training(Eagle3Network(build_head(policy, "policy")), micro_batch_tokens=12)
    samples = [sample(policy, seed, 3, length, top=32) for seed, length in ((1, 6), (2, 1), (3, 4), (4, 9))]
    rejected = own.rejection(samples)
    alone = [1 - own.evaluate([one]).acceptance[0] if len(one) > 4 else 0.0 for one in samples]
    torch.testing.assert_close(rejected, torch.tensor(alone), atol=1e-5, rtol=1e-4)
    assert rejected[1] == 0 and (rejected[[0, 2, 3]] > 0).all()


def test_the_entropy_of_the_policy_is_evaluated_at_the_drafted_tokens(policy):
    """Of two responses together as of each alone, by tokens."""
    own = training(Eagle3Network(build_head(policy, "policy")))
    samples = [sample(policy, seed, 3, length, top=32) for seed, length in ((1, 6), (2, 4))]
    first, second = (own.evaluate([one]) for one in samples)
    entropies = [torch.special.entr(one.top_logprobs.exp()).sum(-1) for one in samples]
    by_step = [values[step + 1 :].sum() for values in entropies for step in range(3)]
    expected = float(sum(by_step)) / ((5 + 4 + 3) + (3 + 2 + 1))
    assert own.evaluate(samples).entropy == pytest.approx(expected, rel=1e-5)
    assert (first + second).entropy == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", ["kl", "acceptance"])
@pytest.mark.parametrize("kind", ["head", "model"])
def test_micro_batches_change_no_update(policy, kind, loss):
    layers = (0, 1, 2) if kind == "head" else ()
    samples = [sample(policy, seed, 2 + seed % 3, 3 + seed % 4, layers, weight=0.5 + seed) for seed in range(6)]
    results = []
    for micro_batch_tokens in (10, 1000):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE | {"num_hidden_layers": 1}))
        network = Eagle3Network(build_head(policy, "policy")) if kind == "head" else CausalNetwork(model)
        own = training(network, micro_batch_tokens=micro_batch_tokens, loss=resolve_draft_loss(loss))
        own.optimizer = torch.optim.SGD(network.parameters, lr=1.0)
        value = own.update(samples)
        results.append((value, [parameter.detach().clone() for parameter in network.parameters]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-5, rtol=1e-4)


def test_weights_decide_what_is_learned(policy):
    """A sample of weight 0 leaves no trace."""
    first, second = sample(policy, 1, 3, 5), sample(policy, 2, 3, 5, weight=0.0)
    gradients = []
    for samples, scale in (([first, second], 2.0), ([first], 1.0)):
        network = Eagle3Network(build_head(policy, "policy"))
        own = training(network, max_grad_norm=1e9)
        own.optimizer = torch.optim.SGD(network.parameters, lr=1.0)
        before = [parameter.detach().clone() for parameter in network.parameters]
        own.update(samples)
        changes = [scale * (b - a.detach()) for a, b in zip(network.parameters, before, strict=True)]
        gradients.append(changes)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)  # the mean is over both


@pytest.mark.parametrize("loss", ["kl", "acceptance"])
@pytest.mark.parametrize("kind", ["head", "model"])
def test_training_brings_the_drafter_towards_the_policy(policy, kind, loss):
    torch.manual_seed(0)
    layers = (0, 1, 2) if kind == "head" else ()
    samples = [sample(policy, seed, 3, 12, layers) for seed in range(24)]
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE | {"num_hidden_layers": 1}))
    network = Eagle3Network(build_head(policy, "policy")) if kind == "head" else CausalNetwork(model)
    own = training(network, loss=AcceptedLength(kl_decay=3.0) if loss == "acceptance" else None)
    before = own.evaluate(samples)
    for _ in range(60):
        own.update(samples)
    after = own.evaluate(samples)
    assert after.kl < 0.6 * before.kl
    assert after.acceptance_length > before.acceptance_length + 0.2


def test_a_loss_that_is_not_named_is_the_divergence_and_each_has_its_decay(policy):
    samples = [sample(policy, 1, 3, 6)]

    def value(**options):
        return training(Eagle3Network(build_head(policy, "policy")), **options).update(samples)

    own = resolve_draft_loss("acceptance")
    assert value() == value(loss=resolve_draft_loss("kl"), step_decay=0.8) != value(step_decay=1.0)
    assert value(loss=own) == value(loss=own, step_decay=1.0) != value(loss=own, step_decay=0.8)


def test_a_gradient_that_is_not_finite_is_thrown_away(policy):
    network = Eagle3Network(build_head(policy, "policy"))
    before = [parameter.detach().clone() for parameter in network.parameters]
    training(network).update([sample(policy, 1, 3, 5, weight=float("inf"))])
    torch.testing.assert_close([p.detach() for p in network.parameters], before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in network.parameters)


def test_micro_batches_hold_similar_lessons_within_the_budget(policy):
    samples = [sample(policy, seed, 2, length) for seed, length in enumerate((9, 1, 3, 4, 20, 3))]
    lengths = [[len(one) for one in batch] for batch in micro_batches(samples, 15)]
    assert lengths == [[5, 5], [6], [11], [22]]
    assert list(micro_batches([samples[1]], 15)) == []


@pytest.mark.parametrize("loss", ["kl", "acceptance"])
def test_two_ranks_learn_what_one_learns(loss, tmp_path):
    """Three samples on one rank and two on the other, of other lengths; then none on the second."""
    program = [sys.executable, __file__]
    one = subprocess.run([*program, "0", "1", str(tmp_path), loss], capture_output=True, text=True, check=False)
    assert one.returncode == 0, one.stderr[-2000:]
    ranks = [subprocess.Popen([*program, str(rank), "2", str(tmp_path), loss]) for rank in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0]
    alone, together = (torch.load(tmp_path / name) for name in ("0-of-1.pt", "0-of-2.pt"))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.load(tmp_path / "1-of-2.pt"), together, atol=0, rtol=0)


def train_on_a_rank(rank, world_size, folder, loss):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).eval()
    samples = [sample(model, seed, 3, 4 + seed, weight=0.5 + seed) for seed in range(5)]
    if world_size > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size
        )
        shares = [(samples[:3], samples[:2]), (samples[3:], [])][rank]
    else:
        shares = (samples, samples[:2])
    network = Eagle3Network(build_head(model, "policy"))
    own = training(network, loss=resolve_draft_loss(loss))
    own.optimizer = torch.optim.SGD(network.parameters, lr=0.1)
    losses = [own.update(share) for share in shares]
    torch.save([torch.tensor(losses), *network.parameters], f"{folder}/{rank}-of-{world_size}.pt")


if __name__ == "__main__":
    train_on_a_rank(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
