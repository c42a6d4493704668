import pytest
import torch

from lit_specrl.bench.toy_engine import ToyEngine
from lit_specrl.bench.toy_policy import build_model, build_tokenizer, question
from lit_specrl.engines import TransformersEngine
from lit_specrl.models.policy import Policy
from lit_specrl.types import PromptBatch, RolloutRequest, SamplingConfig

PREFIXES = [[], [3, 4, 5], [6], [7] * 9, [], [4, 4], [], [5] * 11]


@pytest.fixture
def policy(tmp_path):
    model = build_model(len(build_tokenizer()), seed=0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)  # a peaked softmax
    model.save_pretrained(tmp_path / "toy")
    build_tokenizer().save_pretrained(tmp_path / "toy")
    return Policy.build(str(tmp_path / "toy"))


@pytest.fixture
def request_():
    questions = [question([4, 9, 3]), question([1, 2, 3, 4, 5])]
    ids = build_tokenizer()(questions)["input_ids"]
    batch = PromptBatch(["a", "b"], ids, questions, ["16", "15"], ["", ""])
    return RolloutRequest(batch, SamplingConfig(4, 12), list(range(8)), 0, PREFIXES)


def answered(engine, policy, request):
    engine.start(policy, "toy", 64, {1, 16})
    engine.load_policy(policy, 0)
    return engine.generate(request)


def test_it_draws_what_the_model_itself_would(policy, request_):
    ours, theirs = (answered(engine, policy, request_) for engine in (ToyEngine(), TransformersEngine()))
    assert ours.response_ids == theirs.response_ids
    assert ours.finish_reasons == theirs.finish_reasons
    assert len(set(map(len, ours.response_ids))) > 1  # some stop early
    for row, other in zip(ours.sampling_logprobs, theirs.sampling_logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(row), torch.tensor(other), equal_nan=True, atol=1e-4, rtol=1e-4)


def test_other_models_and_ways_of_sampling_are_refused(policy, request_, tiny_model):
    other = Policy.build(tiny_model)
    with pytest.raises(ValueError, match="runs the policy of `lit-specrl bench toy-policy`, got Llama"):
        ToyEngine().start(other, tiny_model, 64, {1})
    request_.sampling = SamplingConfig(4, 12, temperature=0.5)
    with pytest.raises(ValueError, match="samples at temperature 1"):
        answered(ToyEngine(), policy, request_)
