import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_specrl.drafting.distillation import collector
from lit_specrl.drafting.distillation.collector import TeacherOutputCollector
from lit_specrl.drafting.eagle3 import build_head
from lit_specrl.drafting.networks import Eagle3Network
from lit_specrl.experience import padded_rows
from lit_specrl.models.policy import Policy
from lit_specrl.models.scorer import Scorer

PROMPTS = [[20, 21, 22], [30, 31]]
RESPONSES = [[40, 41, 42, 50, 51, 43, 44, 2], [45, 46, 2]]
OBSERVED = [[False] * 3 + [True] * 2 + [False] * 3, [False] * 3]


@pytest.fixture(scope="module")
def collect(make_llama):
    folder = make_llama(num_hidden_layers=3)
    network = Eagle3Network(build_head(AutoModelForCausalLM.from_pretrained(folder), folder, None, 2))
    scorer = Scorer(Policy.build(folder), None, temperature=0.7, micro_batch_tokens=64)

    def run(prompts, responses, observed=None):
        experience = padded_rows(prompts, list(range(len(prompts))), responses)
        if observed is not None:
            padded = [row + [False] * (8 - len(row)) for row in observed]
            experience.observation_mask = torch.tensor(padded)
            experience.loss_mask = experience.policy_mask
        collector = TeacherOutputCollector(network, num_top=4, generator=torch.Generator())
        scorer.show(collector, experience)
        return sorted(collector.pop(), key=lambda sample: sample.token_ids.tolist())

    return run


def test_each_turn_is_a_sample_with_all_before_it_as_its_prompt(collect):
    """What an environment wrote is never drafted: the samples are those of three responses without one."""
    found = collect(PROMPTS, RESPONSES, OBSERVED)
    alone = collect(
        [PROMPTS[0], PROMPTS[0] + RESPONSES[0][:5], PROMPTS[1]], [RESPONSES[0][:3], RESPONSES[0][5:], RESPONSES[1]]
    )
    assert len(found) == len(alone) == 3
    for ours, theirs in zip(found, alone, strict=True):
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        assert ours.num_prompt_tokens == theirs.num_prompt_tokens
        torch.testing.assert_close(ours.features, theirs.features, rtol=2e-2, atol=2e-2)  # bfloat16
        torch.testing.assert_close(ours.top_logprobs, theirs.top_logprobs)
        assert torch.equal(ours.top_tokens, theirs.top_tokens)
        torch.testing.assert_close(ours.log_mass, theirs.log_mass)
    assert {sample.uid for sample in found} == {sample.uid for sample in collect(PROMPTS, RESPONSES)}
    assert len(collect(PROMPTS, RESPONSES)) == 2


def test_long_responses_are_looked_at_in_chunks(collect, monkeypatch):
    """The logits of one chunk at a time, which end where they end."""
    whole = collect(PROMPTS, RESPONSES)
    shapes, chunk = [], collector._top_of_chunk
    monkeypatch.setattr(collector, "_CHUNK_TOKENS", 3)
    monkeypatch.setattr(
        collector, "_top_of_chunk", lambda hidden, *rest: shapes.append(len(hidden)) or chunk(hidden, *rest)
    )
    for ours, theirs in zip(collect(PROMPTS, RESPONSES), whole, strict=True):
        torch.testing.assert_close(ours.top_logprobs, theirs.top_logprobs)
        assert torch.equal(ours.top_tokens, theirs.top_tokens)
        torch.testing.assert_close(ours.log_mass, theirs.log_mass)
    assert sorted(shapes) == [2, 3, 3, 3]
