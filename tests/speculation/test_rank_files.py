import os
import warnings

import pytest

from lit_specrl.speculation import RankFiles, RolloutStore, load_ranks

IDENTITY = {"model": "tiny", "temperature": "1.0"}


@pytest.fixture
def save(cached):
    """Writes the cache of a rank: one row, whose uid names rank and step."""
    files = RankFiles("prefix_cache")

    def write(folder, step=3, rank=0, world_size=2, identity=IDENTITY):
        store = RolloutStore()
        store.put([cached(f"rank{rank}-step{step}", step=step)])
        files.save(folder, store, identity, step=step, rank=rank, world_size=world_size)

    return write


def load(folders, ranks=(0, 1), step=3, world_size=2, max_bytes=None):
    return load_ranks(folders, ranks, IDENTITY, step=step, world_size=world_size, max_bytes=max_bytes)


def uids(store):
    return [row.uid for row in store]


def names(folder):
    return sorted(path.name for path in (folder / "prefix_cache").iterdir())


def test_each_rank_has_its_file_and_any_of_them_can_be_read(tmp_path, save):
    folder = tmp_path / "new" / "prefix_cache"
    for rank in range(2):
        save(folder, rank=rank)
    assert names(folder) == ["step-00000003-rank0-of-2.safetensors", "step-00000003-rank1-of-2.safetensors"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert uids(load([folder])) == ["rank0-step3", "rank1-step3"]
        assert uids(load([folder], ranks=[1])) == ["rank1-step3"]


def test_the_limit_of_the_new_store_is_the_one_that_was_asked_for(tmp_path, save):
    for rank in range(2):
        save(tmp_path, rank=rank)
    num_bytes = load([tmp_path], ranks=[0]).num_bytes
    store = load([tmp_path], max_bytes=num_bytes)
    assert (len(store), store.max_bytes) == (1, num_bytes)


def test_folders_are_searched_in_order(tmp_path, save):
    """The checkpoint's own folder first, then the one that it was written in, which may be gone."""
    first, second = tmp_path / "first", tmp_path / "second"
    save(first, rank=0)
    save(second, rank=0)
    save(second, rank=1)
    (second / "step-00000003-rank0-of-2.safetensors").write_bytes(b"not looked at")
    assert uids(load([first, second])) == ["rank0-step3", "rank1-step3"]


@pytest.mark.parametrize("where", [{"step": 4}, {"world_size": 3}])
def test_files_of_another_step_or_world_size_are_not_taken(tmp_path, save, where):
    for rank in range(2):
        save(tmp_path, rank=rank)
    with pytest.warns(UserWarning, match="the prefix cache of rank 0 cannot be used"):
        assert uids(load([tmp_path], ranks=[0], **where)) == []


def remove(path):
    path.unlink()


def damage(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "reason"), [(remove, "No such file"), (damage, "damaged")], ids=["missing", "damaged"]
)
def test_a_file_that_cannot_be_read_is_warned_about_and_the_rest_is_loaded(tmp_path, save, spoil, reason):
    for rank in range(3):
        save(tmp_path, rank=rank, world_size=3)
    spoil(tmp_path / "prefix_cache" / "step-00000003-rank1-of-3.safetensors")
    expected = f"the prefix cache of rank 1 cannot be used, its prompts are generated afresh once: .*{reason}"
    with pytest.warns(UserWarning, match=expected) as caught:
        assert uids(load([tmp_path], range(3), world_size=3)) == ["rank0-step3", "rank2-step3"]
    assert len(caught) == 1


def test_a_file_of_another_model_is_warned_about_and_set_aside(tmp_path, save):
    save(tmp_path, rank=0, identity=IDENTITY | {"model": "large"})
    save(tmp_path, rank=1)
    with pytest.warns(UserWarning, match=r"rank 0 cannot be used.*foreign \(model: expected 'tiny', found 'large'\)"):
        assert uids(load([tmp_path])) == ["rank1-step3"]
    assert names(tmp_path) == [
        "step-00000003-rank0-of-2.safetensors.rejected",
        "step-00000003-rank1-of-2.safetensors",
    ]


def checkpoint(folder, name):
    (folder / name).write_text("weights")


def steps(folder):
    return [int(name[5:13]) for name in names(folder)]


def test_a_file_goes_with_its_checkpoint(tmp_path, save):
    for step in range(1, 5):
        save(tmp_path, step=step)
        checkpoint(tmp_path, f"{step}.ckpt")
        (tmp_path / f"{step - 1}.ckpt").unlink(missing_ok=True)
    assert steps(tmp_path) == [3, 4]  # that the third checkpoint is gone is seen at the next write


def test_files_of_checkpoints_that_stay_stay(tmp_path, save):
    for step in range(1, 6):
        save(tmp_path, step=step)
        checkpoint(tmp_path, f"{step}.ckpt")
        if step not in (1, 4):
            (tmp_path / f"{step - 1}.ckpt").unlink(missing_ok=True) if step - 1 not in (1, 4) else None
    assert {1, 4, 5} <= set(steps(tmp_path))


def test_a_checkpoint_that_is_written_over_lets_its_file_go(tmp_path, save):
    for step in range(1, 5):
        save(tmp_path, step=step)
        (tmp_path / "last.ckpt").unlink(missing_ok=True)
        checkpoint(tmp_path, "last.ckpt")
        os.utime(tmp_path / "last.ckpt", ns=(step, step))
    assert steps(tmp_path) == [3, 4]


def test_files_whose_checkpoints_lie_elsewhere_stay(tmp_path, save):
    for step in range(1, 5):
        save(tmp_path, step=step)
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_two_checkpoints_of_a_step_share_a_file(tmp_path, save):
    for step in range(1, 4):
        save(tmp_path, step=step)
        checkpoint(tmp_path, f"best-{step}.ckpt")
        save(tmp_path, step=step)
        checkpoint(tmp_path, f"last-{step}.ckpt")
        (tmp_path / f"last-{step - 1}.ckpt").unlink(missing_ok=True)
    assert steps(tmp_path) == [1, 2, 3]


def test_a_run_that_goes_back_keeps_what_it_writes(tmp_path, save):
    """A run that is resumed from an early checkpoint finds files of later steps, which it will never read."""
    for step in (8, 9, 5):
        save(tmp_path, step=step)
    assert 5 in steps(tmp_path)
