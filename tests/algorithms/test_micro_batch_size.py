import pytest
import torch
from training import arithmetic, assert_identical, grpo, make_trainer, weights_of

from lit_specrl import PPO
from lit_specrl.algorithms import micro_batch_size
from lit_specrl.algorithms.micro_batch_size import PassMemory, affordable_tokens, choose_micro_batch_tokens
from lit_specrl.algorithms.optimizers import optimizers_of
from lit_specrl.callbacks import RolloutCallback
from lit_specrl.models.policy import Policy

GIB = 2**30


class Meter:
    """A device of which a pass takes `fixed` bytes and `per_token` for each token that the policy sees."""

    def __init__(self, fixed, per_token, free):
        self.fixed, self.per_token, self.free_bytes, self.tokens = fixed, per_token, free, []

    def peak(self, run):
        before = len(self.tokens)
        run()
        return self.fixed + self.per_token * sum(self.tokens[before:])

    def free(self):
        return self.free_bytes


class Choose(RolloutCallback):
    """Chooses as on a GPU, before the first update."""

    def __init__(self, meter):
        self.meter, self.chosen = meter, None

    def on_experience_end(self, trainer, pl_module, rollouts, experience):
        if self.chosen is None:
            self.meter.tokens.clear()
            self.chosen = choose_micro_batch_tokens(
                pl_module.scorer,
                pl_module._backward,
                optimizers_of(pl_module),
                pl_module.max_length,
                self.meter,
            )
            assert all(parameter.grad is None for parameter in pl_module.policy.parameters())


@pytest.fixture
def choose(tiny_model, monkeypatch):
    def choose(meter, make=grpo, **options):
        forward = Policy.forward

        def counted(self, prompt_ids, prompt_mask, prompt_index, response_ids, *others, **named):
            meter.tokens.append(len(prompt_index) * (prompt_ids.shape[1] + response_ids.shape[1]))
            return forward(self, prompt_ids, prompt_mask, prompt_index, response_ids, *others, **named)

        monkeypatch.setattr(Policy, "forward", counted)
        callback, module = Choose(meter), make(tiny_model, **options)
        make_trainer(callback, limit_train_batches=1).fit(module, datamodule=arithmetic())
        return callback.chosen, module

    return choose


def adam_bytes(module):
    """Gradient and moments of a policy in float32."""
    return 4 * 3 * sum(parameter.numel() for parameter in module.policy.model.parameters())


@pytest.mark.parametrize(
    ("free_gib", "per_token", "expected"),
    [(10, 2**20, 6144), (100, 2**20, 2**16), (0, 2**20, 2**10), (10, 1, 2**16)],
    ids=["what fits", "at most", "at least", "tiny tokens"],
)
def test_tokens_that_fit(free_gib, per_token, expected):
    assert affordable_tokens(free_gib * GIB, PassMemory(per_token, fixed=GIB / 2)) == expected


def test_the_choice_is_what_free_memory_less_the_optimizer_holds(choose):
    """A token takes a MiB, a pass 2 GiB beside; the policy's gradients are there already, its moments are not."""
    meter = Meter(fixed=2 * GIB, per_token=2**20, free=20.5 * GIB)
    chosen, module = choose(meter)
    free = 20.5 * GIB - adam_bytes(module) * 2 / 3
    assert chosen == int((0.7 * free - 2 * GIB) / 2**20) // 1024 * 1024 == 12288
    assert meter.tokens[:3] == [meter.tokens[0], meter.tokens[0], 2 * meter.tokens[0]]


def test_a_critic_that_is_still_to_come_is_left_room(choose):
    """Such a critic is as large as the policy: its gradients and moments come on top."""
    _, module = choose(
        Meter(GIB, 2**20, 20 * GIB), make=lambda model, **options: PPO(model, [ones], max_completion_length=12)
    )
    owned = sum(parameter.numel() for parameter in module.critic.parameters())
    optimizers = optimizers_of(module)
    for optimizer in optimizers:
        optimizer.zero_grad()
    assert all(optimizer.state for optimizer in optimizers)  # both have stepped
    assert micro_batch_size._bytes_to_come(module.scorer, optimizers) == adam_bytes(module) / 3 + 4 * owned
    optimizers[1].state.clear()
    assert micro_batch_size._bytes_to_come(module.scorer, optimizers) == adam_bytes(module) / 3 + 12 * owned


def ones(completions, **columns):
    return [1.0] * len(completions)


def test_measuring_changes_nothing_that_is_learned(tiny_model, choose):
    _, measured = choose(Meter(GIB, 2**20, 20 * GIB), micro_batch_tokens=8192)
    plain = grpo(tiny_model, micro_batch_tokens=8192)
    make_trainer(limit_train_batches=1).fit(plain, datamodule=arithmetic())
    assert_identical(weights_of(measured), weights_of(plain))


def test_on_a_cpu_it_is_8192(tiny_model):
    module = grpo(tiny_model)
    make_trainer(limit_train_batches=1).fit(module, datamodule=arithmetic())
    assert module.micro_batch_tokens == module.scorer.micro_batch_tokens == 8192
    assert "timing_s/measure_memory" not in module.step_metrics


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("options", [{}, {"beta": 0.1}, {"gradient_checkpointing": True}], ids=str)
def test_on_a_gpu_it_is_chosen_and_what_is_learned_is_the_same(tiny_model, options):
    chosen, given = grpo(tiny_model, **options), grpo(tiny_model, micro_batch_tokens=64, **options)
    for module in (chosen, given):
        make_trainer(accelerator="gpu", limit_train_batches=1).fit(module, datamodule=arithmetic())
    assert chosen.micro_batch_tokens % 1024 == 0
    torch.testing.assert_close(weights_of(chosen), weights_of(given), rtol=1e-3, atol=2e-3)  # Adam at 1e-3
