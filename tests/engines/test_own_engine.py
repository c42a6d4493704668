"""What an engine of the user's own has to say, and what it need not."""

import pytest
import torch

from lit_specrl.engines import RolloutEngine, TransformersEngine, VLLMEngine
from lit_specrl.types import Continuation, PromptBatch, RolloutRequest, SamplingConfig


class Bare(RolloutEngine):
    def start(self, policy, model, max_length, stop_token_ids):
        self.stop_token_ids = frozenset(stop_token_ids)

    def load_weights(self, weights, version):
        self.policy_version = version

    def continue_rows(self, request, rows, meter):
        return []


def test_an_engine_says_nothing_by_default():
    engine, cpu = Bare(), torch.device("cpu")
    assert not (engine.can_verify or engine.can_speculate or engine.takes_sharded_weights or engine.generates_together)
    engine.check_run(2, 1024, cpu)
    assert engine.memory(10**6, cpu) == 0
    assert engine.describe(cpu) == "Bare"


def test_engines_say_whether_they_take_sharded_weights():
    assert VLLMEngine().takes_sharded_weights and not TransformersEngine().takes_sharded_weights
    assert VLLMEngine(dtype="float32").memory(10, torch.device("cpu")) == 40 + 2 * 2**30


WHOLE = Continuation([20, 21], [-1.0, -1.0], "length")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([WHOLE], r"Said\.continue_rows must return a Continuation for each of 2 rows, got 1"),
        ([WHOLE, Continuation([20, 21], [-1.0], "stop")], "Said gave 2 tokens and 1 log-probs for row 1"),
        (
            [Continuation([20] * 3, [-1.0] * 3, "stop"), WHOLE],
            "Said gave 3 tokens for row 0 behind 1, a response has at",
        ),
        ([WHOLE, Continuation([20], [-1.0], "eos")], "Said gave finish_reason='eos' for row 1; use 'stop' or 'length'"),
    ],
)
def test_what_an_engine_of_ones_own_gets_wrong_is_told(found, message):
    class Said(Bare):
        def continue_rows(self, request, rows, meter):
            return found

    engine = Said()
    engine.load_weights([], 0)
    prompts = PromptBatch(["u"], [[5, 6]], ["q"], [None], ["a"])
    sampling = SamplingConfig(num_generations=2, max_completion_length=3)
    request = RolloutRequest(prompts, sampling, [1, 2], 0, prefixes=[[30], [31]])
    with pytest.raises(ValueError, match=message):
        engine.generate(request)
    found[:] = [WHOLE, WHOLE]
    assert engine.generate(request).response_ids == [[30, 20, 21], [31, 20, 21]]
