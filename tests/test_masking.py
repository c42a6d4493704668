from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from lit_specrl.masking import masked_mean, masked_sum, masked_whiten, pad_left, pad_right

VALUES = torch.tensor([[1.0, 3.0, torch.nan], [5.0, torch.inf, -torch.inf], [torch.nan, torch.nan, torch.nan]])
MASK = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])


def test_sums_and_means_see_only_true_entries():
    assert masked_sum(VALUES, MASK).item() == 9
    assert masked_sum(VALUES, MASK, dim=-1).tolist() == [4, 5, 0]
    assert masked_sum(VALUES, MASK, dim=-1, keepdim=True).tolist() == [[4], [5], [0]]
    assert masked_mean(VALUES, MASK).item() == 3
    assert masked_mean(VALUES, MASK, dim=-1).tolist() == [2, 5, 0]
    assert masked_mean(VALUES, MASK, dim=0).tolist() == [3, 3, 0]


def test_the_mean_of_nothing_is_zero_with_zero_gradient():
    values = torch.full((2, 2), torch.nan, requires_grad=True)
    mean = masked_mean(values, torch.zeros(2, 2, dtype=torch.bool))
    mean.backward()
    assert mean.item() == 0
    assert values.grad.tolist() == [[0, 0], [0, 0]]


def test_whitening_centres_and_scales_true_entries_and_zeroes_the_rest():
    root = 0.5**0.5  # 1 and 3 have mean 2 and unbiased variance 2
    mask = torch.tensor([True, True, False])
    values = torch.tensor([1.0, 3.0, torch.nan])
    torch.testing.assert_close(masked_whiten(values, mask), torch.tensor([-root, root, 0]))
    torch.testing.assert_close(masked_whiten(values, mask, shift_mean=False), torch.tensor([2 - root, 2 + root, 0]))


@pytest.mark.parametrize("num_true", [0, 1])
def test_whitening_fewer_than_two_entries_gives_zeros(num_true):
    mask = torch.arange(3) < num_true
    assert masked_whiten(torch.tensor([4.0, torch.nan, 1.0]), mask).tolist() == [0, 0, 0]


def whiten_on_two_ranks(parts, shift_mean):
    """Each rank is a thread that waits for the other wherever sums are added up."""
    barrier, sums = Barrier(2, timeout=30), [None, None]

    def whiten(rank):
        def add_up(total):
            sums[rank] = total
            barrier.wait()
            added_up = sums[0] + sums[1]
            barrier.wait()
            return added_up

        return masked_whiten(*parts[rank], shift_mean, add_up)

    with ThreadPoolExecutor(2) as ranks:
        return list(ranks.map(whiten, range(2)))


@pytest.mark.parametrize("shift_mean", [True, False])
def test_ranks_whiten_with_the_statistics_of_all(shift_mean):
    values, mask = torch.tensor([1.0, 3.0, torch.nan, 8.0]), torch.tensor([True, True, False, True])
    expected = torch.tensor([-3.0, -1.0, 0.0, 4.0]) / 13**0.5  # mean 4, squares 9, 1 and 16 over 3 - 1
    if not shift_mean:
        expected = expected + 4 * mask
    for cut in (1, 2, 3):
        parts = [(values[:cut], mask[:cut]), (values[cut:], mask[cut:])]
        torch.testing.assert_close(torch.cat(whiten_on_two_ranks(parts, shift_mean)), expected)
    torch.testing.assert_close(masked_whiten(values, mask, shift_mean), expected)


def test_a_rank_without_entries_takes_part_in_whitening():
    root = 0.5**0.5
    parts = [(torch.tensor([1.0, 3.0]), torch.tensor([True, True])), (torch.tensor([5.0]), torch.tensor([False]))]
    first, second = whiten_on_two_ranks(parts, shift_mean=True)
    torch.testing.assert_close(first, torch.tensor([-root, root]))
    assert second.tolist() == [0]


def test_rows_are_padded_to_either_side():
    values, mask = pad_right([[5, 6], [], [7]], padding_value=9)
    assert values.tolist() == [[5, 6], [9, 9], [7, 9]]
    assert mask.tolist() == [[True, True], [False, False], [True, False]]
    values, mask = pad_left([[5, 6], [], [7]], padding_value=9, length=3)
    assert values.tolist() == [[9, 5, 6], [9, 9, 9], [9, 9, 7]]
    assert mask.tolist() == [[False, True, True], [False, False, False], [False, False, True]]


def test_padded_values_have_the_dtype_asked_for():
    assert pad_right([[1]])[0].dtype == torch.long
    values, mask = pad_right([[-0.5], [-0.25, -1.0]], dtype=torch.float32)
    assert values.tolist() == [[-0.5, 0.0], [-0.25, -1.0]]
    assert (values.dtype, mask.dtype) == (torch.float32, torch.bool)


def test_no_rows_and_only_empty_rows_are_fine():
    assert pad_right([])[0].shape == (0, 0)
    assert pad_left([[], []], length=2)[0].tolist() == [[0, 0], [0, 0]]


def test_a_row_longer_than_the_length_is_refused():
    with pytest.raises(ValueError, match="length must hold the longest row \\(3 entries\\), got 2"):
        pad_left([[1, 2, 3]], length=2)
