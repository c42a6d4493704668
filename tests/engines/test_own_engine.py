"""What an engine of the user's own has to say, and what it need not."""

import torch

from lit_specrl.engines import RolloutEngine, TransformersEngine, VLLMEngine


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
