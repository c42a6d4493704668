from lit_specrl.seeds import rollout_seeds


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
