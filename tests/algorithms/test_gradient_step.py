import math

import pytest
import torch

from lit_specrl.algorithms.gradient_step import GradientStep


class Training:
    """One weight vector [3, 4] under SGD with momentum; an update has gradient (3, 4) unless told otherwise."""

    def __init__(self, **options):
        self.weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        self.optimizer = torch.optim.SGD([self.weight], lr=1.0, momentum=0.5)
        self.gradient_step = GradientStep(
            **{"name": "actor", "max_grad_norm": 10.0, "max_skipped_updates": 3} | options
        )

    def __call__(self, *gradient, step=0):
        self.weight.grad = torch.tensor(gradient or (3.0, 4.0))
        return self.gradient_step(self.optimizer, [self.weight], step)


def test_a_small_gradient_is_applied_as_it_is():
    training = Training()
    assert training() == (True, {"actor/grad_norm": 5.0, "actor/skipped_updates": 0.0})
    assert training.weight.tolist() == [0, 0]


def test_a_large_gradient_is_scaled_down_and_reported_as_it_was():
    training = Training(name="critic", max_grad_norm=2.5)
    assert training() == (True, {"critic/grad_norm": 5.0, "critic/skipped_updates": 0.0})
    torch.testing.assert_close(training.weight.detach(), torch.tensor([1.5, 2.0]))


def test_the_norm_is_that_of_all_parameters_together():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    for parameter, gradient in zip(parameters, (3.0, 4.0), strict=True):
        parameter.grad = torch.tensor([gradient])
    step = GradientStep("actor", max_grad_norm=1.0, max_skipped_updates=1)
    _, metrics = step(torch.optim.SGD(parameters, lr=1.0), parameters, 0)
    assert metrics["actor/grad_norm"] == 5
    torch.testing.assert_close(torch.cat(parameters).detach(), torch.tensor([-0.6, -0.8]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_gradient_touches_neither_weights_nor_optimizer(bad):
    training = Training()
    with pytest.warns(UserWarning, match=r"step 7: actor gradient norm is (nan|inf), the update was skipped"):
        applied, metrics = training(1.0, bad, step=7)
    assert not applied
    assert not math.isfinite(metrics["actor/grad_norm"])
    assert metrics["actor/skipped_updates"] == 1
    assert training.weight.tolist() == [3, 4]
    assert training.weight.grad is None
    assert not training.optimizer.state


@pytest.mark.filterwarnings("ignore:step 0")
def test_an_applied_update_ends_the_count_of_skipped_ones():
    training = Training(max_skipped_updates=3)
    outcomes = [training(*gradient) for gradient in [(math.nan, 0.0), (0.0, math.inf), (), (math.nan, 0.0)]]
    assert [applied for applied, _ in outcomes] == [False, False, True, False]
    assert [metrics["actor/skipped_updates"] for _, metrics in outcomes] == [1, 2, 0, 1]
    assert training.gradient_step.num_skipped == 1


@pytest.mark.filterwarnings("ignore:step 0")
@pytest.mark.parametrize("max_skipped_updates", [1, 3])
def test_too_many_skipped_updates_in_a_row_stop_the_run(max_skipped_updates):
    training = Training(max_skipped_updates=max_skipped_updates)
    training()
    for _ in range(max_skipped_updates - 1):
        training(math.nan, 0.0)
    with pytest.raises(
        RuntimeError, match=f"{max_skipped_updates} successive updates had a non-finite gradient; lower"
    ):
        training(math.nan, 0.0)
    assert training.weight.tolist() == [0, 0]
