"""The running engine drafts what the head computes, before and after its weights are replaced."""

import pytest
import torch
from colocated import Colocated
from transformers import AutoModelForCausalLM

from lit_specrl.drafting import DraftModel, Eagle3Drafter, NGramDrafter
from lit_specrl.drafting.distillation.buffer import DistillationSample
from lit_specrl.drafting.distillation.trainer import DrafterTrainer
from lit_specrl.engines import VLLMEngine

PROMPTS = [[1, 5, 9, 30, 31, 9, 30, 31, 9], [4, 4, 8, 4, 4, 8, 4, 4], [7, 50, 51, 52], [11, 90, 12]]
LENGTH, DRAFTED = 40, 3


class Steps:
    """Drafts three tokens and keeps what came of them."""

    def __init__(self):
        self.steps = []

    def length(self, num_active, age):
        return DRAFTED

    def observe(self, step):
        self.steps.append(step)


@pytest.fixture(scope="module")
def model(make_llama):
    return make_llama(num_hidden_layers=7)


@pytest.fixture(scope="module", params=["all tokens", "some tokens", "qwen", "model", "tied model"])
def colocated(request, model, make_llama, make_qwen, tiny_qwen, tmp_path_factory):
    engine = VLLMEngine(dtype="float32", max_num_seqs=8, cpu_kv_cache_gib=0.25)
    if request.param == "qwen":
        model = make_qwen(num_hidden_layers=4)
    if request.param == "tied model":  # of which vLLM keeps a packed copy of the embeddings
        engine.drafter = DraftModel(tiny_qwen, DRAFTED)
    elif request.param == "model":
        engine.drafter = DraftModel(make_llama(num_hidden_layers=1, initializer_range=0.15), DRAFTED)
    else:
        policy = AutoModelForCausalLM.from_pretrained(model)
        size = 64 if request.param == "some tokens" else None
        counts = torch.zeros(128).index_fill(0, torch.arange(40, 104), 1.0)  # no tokens from 0 on
        engine.drafter = Eagle3Drafter.build(policy, model, tmp_path_factory.mktemp("eagle3") / "head", counts, size)
    colocated = Colocated(engine, model)
    colocated.sync()
    yield colocated
    engine.shutdown()


def greedy(colocated):
    """Greedy responses, and how many tokens were accepted by position."""
    control = Steps()
    colocated.engine.speculation_control = control
    request = colocated.request(PROMPTS, group=1, length=LENGTH, temperature=0.0)
    rollouts = colocated.engine.generate(request)
    colocated.engine.speculation_control = None
    return rollouts, [sum(step.accepted[k] for step in control.steps if len(step.accepted) > k) for k in range(DRAFTED)]


@torch.no_grad()
def sample(colocated, prompt, response, network):
    out = colocated.policy.model(torch.tensor([prompt + response]), output_hidden_states=True)
    logprobs = out.logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    drafted = logprobs if network.vocabulary is None else logprobs[:, network.vocabulary]
    features = [out.hidden_states[layer][0, :-1] for layer in network.layers]
    top = drafted.topk(16)
    return DistillationSample(
        uid="",
        token_ids=torch.tensor(prompt + response, dtype=torch.int32),
        num_prompt_tokens=len(prompt),
        features=torch.cat(features, -1) if features else torch.empty(len(prompt + response) - 1, 0),
        top_tokens=top.indices.int(),
        top_logprobs=top.values,
        log_mass=drafted.logsumexp(-1).clamp_max(0),
        reward=0.0,
        weight=1.0,
        policy_version=0,
    )


@torch.no_grad()
def expected_acceptance(network, samples):
    """What a drafter that takes the most likely token has accepted, response by response, draft by draft."""
    accepted = [0] * DRAFTED
    for one in samples:
        response = one.token_ids[one.num_prompt_tokens :].tolist()
        right = {}
        for index, step in enumerate(network.draft_steps([one], DRAFTED)):
            tokens = step.logits.argmax(-1)
            tokens = tokens if network.vocabulary is None else network.vocabulary[tokens]
            for place, token in zip(step.places.tolist(), tokens.tolist(), strict=True):
                right[index, place] = token == response[place]
        place = 1  # the first token comes with the prompt
        while place < len(response):
            room = min(DRAFTED, len(response) - place)
            count = next((k for k in range(room) if not right.get((k, place + k), right[0, place + k])), room)
            for k in range(count):
                accepted[k] += 1
            place += count + 1
    return accepted


def test_the_engine_proposes_what_the_network_does(colocated):
    """At temperature 0 the accepted tokens of every position can be counted beforehand; so after training and
    publication."""
    engine = colocated.engine
    network = engine.drafter.network()
    plain, before = greedy(colocated)
    samples = [
        sample(colocated, prompt, response, network)
        for prompt, response in zip(PROMPTS, plain.response_ids, strict=True)
    ]
    assert before == expected_acceptance(network, samples)

    training = DrafterTrainer(network, torch.optim.AdamW(network.parameters, lr=3e-3), DRAFTED)
    for _ in range(60):
        training.update(samples)
    expected = expected_acceptance(network, samples)
    assert sum(expected) > sum(before) + 10

    assert engine.drafter_version == 0 and engine.drafter_is_intact()
    engine.load_drafter_weights(network.weights(), 7)
    assert engine.drafter_version == 7 and engine.drafter_is_intact()
    trained, after = greedy(colocated)
    assert trained.response_ids == plain.response_ids and after == expected

    colocated.sync()  # new weights of the policy leave the drafter as it is
    assert engine.drafter_is_intact() and greedy(colocated)[1] == expected


def test_weights_that_are_lost_are_noticed(colocated):
    engine = colocated.engine
    network = engine.drafter.network()
    engine.load_drafter_weights(network.weights(), 1)
    name, weight = next((n, w) for n, w in network.weights() if w.dim() == 2 and "embed" not in n)
    changed = weight.clone()
    changed[3, 5] += 1
    engine._speculation.load_weights([(name, changed)] + [(n, w) for n, w in network.weights() if n != name])
    assert not engine.drafter_is_intact()
    engine.load_drafter_weights(network.weights(), 2)
    assert engine.drafter_is_intact()


def test_drafters_without_weights_refuse_some(model):
    engine = VLLMEngine(dtype="float32", max_num_seqs=8, cpu_kv_cache_gib=0.25)
    with pytest.raises(RuntimeError, match="VLLMEngine has no drafter whose weights could be replaced"):
        engine.load_drafter_weights([], 1)
    with pytest.raises(ValueError, match="NGramDrafter has no weights that could learn"):
        NGramDrafter().network()
