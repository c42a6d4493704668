import pytest
import torch

from lit_specrl.distributed.transfer import joined_bytes, moved_together, split_bytes


@pytest.fixture
def tensors():
    """Of all widths in a mixed order, one without entries, one that is no neighbour in memory, one number."""
    return [
        torch.tensor([True, False, True]),
        torch.arange(5),
        torch.tensor(2.5),
        torch.zeros(0, 3),
        torch.arange(6.0).view(2, 3).T,
        torch.tensor([1.0, torch.nan], dtype=torch.bfloat16),
        torch.tensor(-7, dtype=torch.float64),
    ]


def test_joined_bytes_are_split_into_the_same_tensors(tensors):
    joined = joined_bytes(tensors)
    assert len(joined) == 3 + 5 * 8 + 4 + 6 * 4 + 2 * 2 + 8
    assert_same(split_bytes(joined, tensors), tensors)


def test_where_nothing_has_to_move_nothing_is_copied(tensors):
    moved = moved_together(tensors, "cpu")
    assert_same(moved, tensors)
    assert [tensor.data_ptr() for tensor in moved] == [tensor.data_ptr() for tensor in tensors]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_tensors_travel_to_a_gpu_and_back(tensors):
    there = moved_together(tensors, "cuda")
    assert {tensor.device.type for tensor in there} == {"cuda"}
    assert_same(moved_together(there, "cpu"), tensors)
    assert_same(moved_together([*there[:2], *tensors[2:]], "cpu"), tensors)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_the_host_does_not_wait_for_what_goes_to_a_gpu(tensors):
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = moved_together(tensors, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same([tensor.cpu() for tensor in there], tensors)


def assert_same(found, expected):
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
