import pytest
import torch

from lit_specrl.losses import ImportanceSampling

# Ratios of row 0: 2, 4 (product 8); of row 1: 0.5 (product 0.5), then padding.
OLD = torch.tensor([[2.0, 4.0], [0.5, 1.0]]).log()
SAMPLING = torch.zeros(2, 2)
MASK = torch.tensor([[True, True], [True, False]])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_truncate", [[2, 3], [0.8, 0]]),
        ("token_mask", [[2, 0], [0, 0]]),
        ("sequence_truncate", [[3, 3], [0.8, 0]]),
        ("sequence_mask", [[0, 0], [0, 0]]),
    ],
)
def test_ratios_outside_the_bounds_are_cut_or_dropped(mode, expected):
    weights, _ = ImportanceSampling(mode, clip_max=3.0, clip_min=0.8)(OLD, SAMPLING, MASK)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_truncate", [[2, 4], [0.5, 0]]),
        ("token_mask", [[2, 4], [0.5, 0]]),
        ("sequence_truncate", [[8, 8], [0.5, 0]]),
        ("sequence_mask", [[8, 8], [0.5, 0]]),
    ],
)
def test_without_bounds_the_ratio_itself_is_the_weight(mode, expected):
    weights, _ = ImportanceSampling(mode, clip_max=None)(OLD, SAMPLING, MASK)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32))


def test_the_default_is_that_of_trl():
    """Rows whose product exceeds 3 are dropped, others weighted."""
    weights, _ = ImportanceSampling()(OLD, SAMPLING, MASK)
    torch.testing.assert_close(weights, torch.tensor([[0, 0], [0.5, 0]]))


def test_an_unbounded_token_ratio_makes_sampled_expectations_exact():
    """Identity: weighting the engine's distribution by the ratio gives the trainer's."""
    generator = torch.Generator().manual_seed(0)
    trainer, engine = torch.randn(2, 1, 9, generator=generator).log_softmax(-1)
    mask = torch.ones(1, 9, dtype=torch.bool)
    weights, _ = ImportanceSampling("token_truncate", clip_max=None)(trainer, engine, mask)
    torch.testing.assert_close(engine.exp() * weights, trainer.exp())


def test_statistics_by_hand():
    _, mismatch = ImportanceSampling("token_truncate", clip_max=3.0)(OLD, SAMPLING, MASK)
    assert (mismatch.ratio_min, mismatch.ratio_max, mismatch.ratio_count) == (0.5, 3, 3)
    assert mismatch.ratio_mean.item() == pytest.approx(5.5 / 3)
    differences = torch.tensor([2.0, 4.0, 2.0]).log()
    torch.testing.assert_close(mismatch.difference_mean, differences.mean())
    torch.testing.assert_close(mismatch.difference_max, differences.max())


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_statistics_of_micro_batches_add_up(mode):
    correction = ImportanceSampling(mode)
    _, whole = correction(OLD, SAMPLING, MASK)
    parts = [correction(OLD[rows], SAMPLING[rows], MASK[rows])[1] for rows in (slice(0, 1), slice(1, 2))]
    assert parts[0] + parts[1] == whole


def test_unknown_sampling_logprobs_count_as_equal_and_stay_out_of_the_difference():
    sampling = torch.tensor([[torch.nan, 0.0], [0.0, torch.nan]])
    weights, mismatch = ImportanceSampling("sequence_truncate", clip_max=None)(OLD, sampling, MASK)
    torch.testing.assert_close(weights, torch.tensor([[4, 4], [0.5, 0]]))
    assert mismatch.difference_count == 2


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_nothing_to_correct_is_fine(mode):
    weights, mismatch = ImportanceSampling(mode)(OLD, SAMPLING, torch.zeros(2, 2, dtype=torch.bool))
    assert weights.tolist() == [[0, 0], [0, 0]]
    assert mismatch.difference_mean == mismatch.difference_max == 0


def test_extreme_mismatch_stays_finite():
    for mode in ("token_truncate", "sequence_truncate"):
        weights, _ = ImportanceSampling(mode, clip_max=None)(OLD + 1e3, SAMPLING, MASK)
        assert weights.isfinite().all()


def test_weights_carry_no_gradient_and_bfloat16_is_widened():
    old = OLD.bfloat16().requires_grad_()
    weights, _ = ImportanceSampling("token_truncate")(old, SAMPLING.bfloat16(), MASK)
    assert not weights.requires_grad
    assert weights.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "token"}, "mode must be one of token_truncate, .* got 'token'"),
        ({"clip_max": 0.0}, "clip_max must be positive"),
        ({"clip_min": 4.0}, "clip_min must not exceed clip_max, got 4.0 > 3.0"),
    ],
)
def test_senseless_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ImportanceSampling(**settings)
