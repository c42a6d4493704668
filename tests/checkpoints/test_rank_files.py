import gc
import os
import warnings

import pytest
import torch

from lit_specrl.checkpoints.rank_files import RankFiles, load_ranks, record
from lit_specrl.prefix_cache.store import RolloutStore

IDENTITY = {"model": "tiny", "temperature": "1.0"}


@pytest.fixture
def save(cached):
    """Writes the cache of a rank: one row, whose uid names rank and step."""
    ranks = {rank: RankFiles("prefix_cache") for rank in range(3)}

    def write(folder, step=3, rank=0, world_size=2, identity=IDENTITY):
        store = RolloutStore()
        store.put([cached(f"rank{rank}-step{step}", step=step)])
        ranks[rank].save(folder, store, identity, step=step, rank=rank, world_size=world_size)

    return write


def load(folders, ranks=(0, 1), step=3, world_size=2, max_bytes=None):
    stores = load_ranks(
        [folder / "prefix_cache" for folder in folders],
        ranks,
        lambda path: RolloutStore.load(path, IDENTITY),
        "the prefix cache of rank {rank} cannot be used, its prompts are generated afresh once: {error}",
        step=step,
        world_size=world_size,
    )
    return RolloutStore.merge(stores, max_bytes)


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


def test_a_file_of_another_model_is_warned_about_and_left(tmp_path, save):
    save(tmp_path, rank=0, identity=IDENTITY | {"model": "large"})
    save(tmp_path, rank=1)
    with pytest.warns(UserWarning, match=r"rank 0 cannot be used.*foreign \(model: expected 'tiny', found 'large'\)"):
        assert uids(load([tmp_path])) == ["rank1-step3"]
    assert names(tmp_path) == [
        "step-00000003-rank0-of-2.safetensors",
        "step-00000003-rank1-of-2.safetensors",
    ]


def checkpoint(folder, name, step=None, beside=None):
    """One that needs the files of a step, or none, in this folder or in another one."""
    content = {"weights": torch.ones(3)}
    if step is not None:
        content["prefix_cache"] = {"folder": str(beside or folder), "step": step, "world_size": 2}
    folder.mkdir(exist_ok=True)
    record(content, folder / name)
    torch.save(content, folder / name)


def steps(folder):
    return [int(name[5:13]) for name in names(folder)]


def test_a_file_goes_with_its_checkpoint(tmp_path, save):
    for step in range(1, 5):
        save(tmp_path, step=step)
        checkpoint(tmp_path, f"{step}.ckpt", step)
        (tmp_path / f"{step - 1}.ckpt").unlink(missing_ok=True)
    assert steps(tmp_path) == [3, 4]  # that the third checkpoint is gone is seen at the next write


def test_files_of_checkpoints_that_stay_stay(tmp_path, save):
    for step in range(1, 6):
        save(tmp_path, step=step)
        checkpoint(tmp_path, f"{step}.ckpt", step)
        if step - 1 not in (1, 4):
            (tmp_path / f"{step - 1}.ckpt").unlink(missing_ok=True)
    assert steps(tmp_path) == [1, 4, 5]


def test_a_checkpoint_that_is_written_over_lets_its_file_go(tmp_path, save):
    for step in range(1, 5):
        save(tmp_path, step=step)
        (tmp_path / "last.ckpt").unlink(missing_ok=True)
        checkpoint(tmp_path, "last.ckpt", step)
        os.utime(tmp_path / "last.ckpt", ns=(step, step))
    assert steps(tmp_path) == [3, 4]


def test_files_whose_checkpoints_lie_elsewhere_stay_as_long_as_these(tmp_path, save, next_run):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for step in range(1, 4):
        save(folder, step=step)
        checkpoint(elsewhere, f"{step}.ckpt", step, folder)
    (elsewhere / "2.ckpt").unlink()
    next_run(folder)
    assert [name for name in names(folder) if name.endswith(".safetensors")] == [
        f"step-0000000{step}-rank0-of-2.safetensors" for step in (1, 3)
    ]
    checkpoint(elsewhere, "1.ckpt", 3, folder)  # written over
    next_run(folder)
    assert set(steps(folder)) == {3}


def test_files_of_a_checkpoint_at_an_address_stay(tmp_path, save, next_run):
    save(tmp_path)
    record({"prefix_cache": {"folder": str(tmp_path), "step": 3, "world_size": 2}}, "s3://bucket/last.ckpt")
    next_run(tmp_path)
    assert set(steps(tmp_path)) == {3}


def test_files_of_a_checkpoint_on_a_disk_that_is_not_there_stay(tmp_path, save, next_run):
    save(tmp_path)
    record({"prefix_cache": {"folder": str(tmp_path), "step": 3, "world_size": 2}}, tmp_path / "disk" / "last.ckpt")
    next_run(tmp_path)
    assert set(steps(tmp_path)) == {3}


def test_files_of_checkpoints_that_others_write_stay_until_they_were_here(tmp_path, cached, next_run):
    """A `CheckpointIO` of the user tells nobody where it writes."""
    store, files = RolloutStore(), RankFiles("prefix_cache")
    store.put([cached("a")])
    for step in (1, 2):
        files.save(tmp_path, store, IDENTITY, step=step, rank=0, world_size=2, is_recorded=False)
    del files
    next_run(tmp_path)
    assert set(steps(tmp_path)) == {1, 2}
    checkpoint(tmp_path, "1.ckpt", 1)
    next_run(tmp_path)
    (tmp_path / "1.ckpt").unlink()
    next_run(tmp_path)
    assert set(steps(tmp_path)) == {2}


def test_two_checkpoints_of_a_step_share_a_file(tmp_path, save):
    for step in range(1, 4):
        save(tmp_path, step=step)
        checkpoint(tmp_path, f"best-{step}.ckpt", step)
        save(tmp_path, step=step)
        checkpoint(tmp_path, f"last-{step}.ckpt", step)
        (tmp_path / f"last-{step - 1}.ckpt").unlink(missing_ok=True)
    assert steps(tmp_path) == [1, 2, 3]


def test_a_run_that_goes_back_keeps_what_it_writes(tmp_path, save):
    """A run that is resumed from an early checkpoint finds files of later steps, which it will never read."""
    for step in (8, 9, 5):
        save(tmp_path, step=step)
    assert 5 in steps(tmp_path)


@pytest.fixture
def next_run():
    """Sweeps the folder as a new process does; the one before has ended."""

    def sweep(folder, rank=0):
        gc.collect()
        RankFiles("prefix_cache").sweep(folder, rank)

    return sweep


def test_what_killed_processes_have_left_is_swept(tmp_path, next_run, cached):
    """Files of checkpoints that were never finished, of other numbers of ranks, set aside or half written, were never
    deleted."""
    store, files = RolloutStore(), RankFiles("prefix_cache")
    store.put([cached("a")])
    for step in (1, 2):
        for rank in range(2):
            files.save(tmp_path, store, IDENTITY, step=step, rank=rank, world_size=2)
    checkpoint(tmp_path, "1.ckpt", 1)
    kept = {name for name in names(tmp_path) if "00000001" in name}
    for name in ("step-00000007-rank2-of-3.safetensors", "step-00000002-rank0-of-2.safetensors.rejected"):
        (tmp_path / "prefix_cache" / name).write_text("left behind")
    (tmp_path / "prefix_cache" / "step-00000002-rank0-of-2.safetensors.partial-abcdefgh").mkdir()
    (tmp_path / "prefix_cache" / "notes.txt").write_text("of the user")
    next_run(tmp_path, rank=1)
    assert len(names(tmp_path)) == 8  # the first rank deletes
    next_run(tmp_path)
    assert len(names(tmp_path)) == 8 - 1  # of step 2, the process is alive and may be writing the checkpoint
    del files
    next_run(tmp_path)
    assert set(names(tmp_path)) == kept | {"notes.txt"}


def test_a_checkpoint_that_cannot_be_read_keeps_what_is_older(tmp_path, save, next_run):
    save(tmp_path, step=1)
    (tmp_path / "2.ckpt").write_text("damaged")
    os.utime(tmp_path / "2.ckpt", ns=(2**61, 2**61))
    next_run(tmp_path)
    assert steps(tmp_path) == [1]


def test_a_renamed_checkpoint_keeps_its_files(tmp_path, save, next_run):
    save(tmp_path, step=1)
    checkpoint(tmp_path, "1.ckpt", 1)
    (tmp_path / "1.ckpt").rename(tmp_path / "the good one.ckpt")
    next_run(tmp_path)
    assert steps(tmp_path) == [1]
