"""Where the time of a step goes."""

import random

import lightning as L
import pytest
from training import arithmetic, grpo, make_trainer

from lit_specrl.callbacks import RolloutCallback
from lit_specrl.data import ArithmeticSource
from lit_specrl.engines.base import Continuation, RolloutEngine

NUM_PROMPTS, GROUP, LENGTH, NUM_STEPS = 32, 8, 200, 5


class Instant(RolloutEngine):
    """Answers at once, with random tokens."""

    def start(self, policy, model, max_length, stop_token_ids):
        """Nothing to start."""

    def load_weights(self, weights, version):
        self.policy_version = version

    def continue_rows(self, request, rows, meter):
        return [self._row(request.seeds[row]) for row in rows]

    def _row(self, seed):
        rng = random.Random(seed)
        tokens = rng.choices(range(10, 100), k=rng.randint(LENGTH // 2, LENGTH))
        return Continuation(tokens, [-rng.random() for _ in tokens], "stop")


class UseIt(RolloutCallback):
    def setup(self, trainer, pl_module, stage):
        pl_module.engine = Instant()


class Seconds(L.Callback):
    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append({name: s for name, s in pl_module.step_metrics.items() if name.startswith("timing_s/")})


@pytest.fixture
def seconds(make_llama):
    """Of steps of 256 rows without advantage, of which a single one is computed."""
    watch = Seconds()
    module = grpo(
        make_llama(max_position_embeddings=512),
        [lambda completions, **columns: [1.0] * len(completions)],
        num_generations=GROUP,
        max_completion_length=LENGTH,
    )
    data = arithmetic(train=ArithmeticSource(NUM_PROMPTS * NUM_STEPS), batch_size=NUM_PROMPTS, max_prompt_length=128)
    make_trainer(UseIt(), watch).fit(module, datamodule=data)
    assert len(watch.steps) == NUM_STEPS
    return watch.steps


def test_the_stages_add_up_to_the_step(seconds):
    for step in seconds:
        assert sum(value for name, value in step.items() if name != "timing_s/step") == pytest.approx(
            step["timing_s/step"]
        )
