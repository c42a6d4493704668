import math

import torch

from lit_specrl.seeds import rollout_seeds, row_uniforms


def test_a_seed_belongs_to_prompt_and_sample_and_not_to_their_place():
    both = rollout_seeds(0, "train/3", ["a", "b"], num_generations=3)
    assert rollout_seeds(0, "train/3", ["b", "a"], num_generations=3) == both[3:] + both[:3]
    assert rollout_seeds(0, "train/3", ["b"], num_generations=3) == both[3:]
    assert rollout_seeds(0, "train/3", ["a"], num_generations=2) == both[:2]


def test_run_purpose_prompt_and_sample_each_change_the_seed():
    seeds = [
        seed
        for run_seed in (0, 1)
        for purpose in ("train/1", "train/11", "validation/1")
        for seed in rollout_seeds(run_seed, purpose, ["a", "b"], num_generations=4)
    ]
    assert len(set(seeds)) == 2 * 3 * 2 * 4


def test_seeds_are_the_same_in_every_process_and_release():
    """A resumed run must sample what the interrupted one would have sampled; Python's own hash would not do."""
    assert rollout_seeds(7, "train/0", ["a1"], num_generations=2) == [2323305817400320613, 4457277448134465523]


def test_seeds_fit_into_signed_64_bits():
    seeds = rollout_seeds(0, "train/0", [str(uid) for uid in range(500)], num_generations=2)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62


def test_the_numbers_of_a_row_do_not_depend_on_its_neighbours():
    together = row_uniforms([3, 1, 2**63 - 1, 3], 40, "sampling")
    assert together.shape == (4, 40) and together.dtype == torch.float64
    assert torch.equal(together[0], together[3])
    assert torch.equal(row_uniforms([1, 5], 40, "sampling")[0], together[1])
    assert torch.equal(row_uniforms([2**63 - 1], 40, "sampling")[0], together[2])


def test_a_longer_row_begins_with_the_numbers_of_a_shorter_one():
    """Its length is that of the longest neighbour."""
    longest = row_uniforms([0, 1], 40, "acceptance")
    for length in range(40):
        assert torch.equal(row_uniforms([0, 1], length, "acceptance"), longest[:, :length])


def test_numbers_are_the_same_in_every_process_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    first = row_uniforms([7], 2, "sampling").tolist()
    assert torch.equal(torch.get_rng_state(), state)
    assert first == row_uniforms([7], 2, "sampling").tolist() == [[0.31974522651772985, 0.37331087467424984]]


def test_no_rows_have_no_numbers():
    assert row_uniforms([], 3, "sampling").shape == (0, 3)


def correlation(first, second):
    return float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])


def test_numbers_for_another_purpose_row_or_token_are_independent():
    """50 000 pairs each; five standard deviations of a correlation, which is 1 / sqrt(50 000) for independent
    numbers."""
    bound = 5 / math.sqrt(50_000)
    sampling, acceptance = (row_uniforms(range(1000), 51, purpose) for purpose in ("sampling", "acceptance"))
    assert abs(correlation(sampling[:, 1:], acceptance[:, 1:])) < bound
    assert abs(correlation(sampling[1:, 1:], sampling[:-1, 1:])) < bound
    assert abs(correlation(sampling[:, 1:], sampling[:, :-1])) < bound


def test_numbers_are_uniform():
    """Kolmogorov-Smirnov: the largest distance from the diagonal times sqrt(n) exceeds 2.2 once in 10 000 times.

    Over all numbers, and over the first ones of the rows, which decide most rejections.
    """
    numbers = row_uniforms(range(2000), 20, "acceptance")
    for sample in (numbers.flatten(), numbers[:, 0]):
        ordered, steps = sample.sort().values, torch.arange(len(sample) + 1) / len(sample)
        distance = max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())
        assert ordered[0] >= 0 and ordered[-1] < 1
        assert float(distance) * math.sqrt(len(sample)) < 2.2
