"""Files with a wrong byte, cut, empty, or of something else: refused or set aside by name, or read as they were
written."""

import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_specrl.checkpoints.checkpoint_io import AtomicCheckpointIO
from lit_specrl.checkpoints.checksums import changed_files, write_checksums
from lit_specrl.checkpoints.tensor_file import RejectedFileError
from lit_specrl.cli.export import export_checkpoint
from lit_specrl.drafting.distillation.buffer import DistillationBuffer, DistillationSample
from lit_specrl.prefix_cache.store import CachedRollout, RolloutStore

IDENTITY = {"model": "tiny", "temperature": "1.0"}
CONTENT = {
    "pytorch-lightning_version": "2.6.0",
    "rlvr": {"model": "tiny", "step": 3},
    "state_dict": {"policy.model.weight": torch.arange(300.0), "policy.model.bias": torch.ones(3)},
    "prefix_cache": {"folder": "/run", "step": 3, "world_size": 1},
}


def flip(content, at):
    content[at] ^= 1 << at % 8


FAULTS = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "of zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a text": lambda path: path.write_text("a text of somebody else\n" * 40),
    "a list": lambda path: torch.save([1, 2], path),
    "weights alone": lambda path: torch.save({"weight": torch.ones(3)}, path),
    "a number": lambda path: path.write_bytes(b"\x80\x02Ke."),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "missing": Path.unlink,
}


@pytest.fixture(params=["checkpoint", "prefix cache", "lessons"])
def kind(request, tmp_path):
    """A file of the kind, how to read it, and the error that tells that it cannot be used."""
    path = tmp_path / "the file.ckpt"
    if request.param == "checkpoint":
        AtomicCheckpointIO().save_checkpoint(CONTENT, path)
        return path, lambda: AtomicCheckpointIO().load_checkpoint(path, weights_only=True), ValueError
    if request.param == "prefix cache":
        store, ids = RolloutStore(), np.arange(40)
        store.put(
            CachedRollout(f"uid {i}", 0, ids, -ids / 40, -ids / 30, "stop", 2, 3, reward=0.5, reward_values={"a": 0.5})
            for i in range(3)
        )
        store.save(path, IDENTITY)
        return path, lambda: RolloutStore.load(path, IDENTITY).to_tensors(), RejectedFileError
    lessons = DistillationBuffer(2**20, 8)
    lessons.put([lesson()])
    lessons.save(path, IDENTITY)
    return path, lambda: DistillationBuffer.load(path, IDENTITY, 2**20, 8).to_tensors(), RejectedFileError


def lesson():
    """Three response tokens after two of a prompt."""
    return DistillationSample(
        uid="a",
        token_ids=torch.arange(5, dtype=torch.int32),
        num_prompt_tokens=2,
        features=torch.ones(4, 3),
        top_tokens=torch.ones(3, 2, dtype=torch.int32),
        top_logprobs=torch.full((3, 2), -1.0),
        log_mass=torch.full((3,), -2.0),
        reward=1.0,
        weight=1.5,
        policy_version=4,
    )


def test_a_wrong_byte_is_found_or_changes_nothing(kind):
    path, read, error = kind
    expected, written = str(read()), path.read_bytes()
    randomness = random.Random(0)
    places = {*range(16), *range(len(written) - 40, len(written)), *randomness.sample(range(len(written)), 80)}
    num_found = 0
    for place in sorted(places):
        content = bytearray(written)
        flip(content, place)
        path.write_bytes(content)
        try:
            assert str(read()) == expected, f"byte {place} of {len(written)}"
        except error as raised:
            num_found += str(path) in str(raised)
    assert num_found > len(places) / 3  # the rest is padding


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_none_is_named(kind, fault):
    path, read, error = kind
    other = path.with_name("step=2.ckpt")
    shutil.copy(path, other)
    FAULTS[fault](path)
    if fault == "missing" and error is RejectedFileError:
        error = FileNotFoundError
    with pytest.raises(error) as raised:
        read()
    assert "the file.ckpt" in str(raised.value)
    if error is ValueError:
        assert "other checkpoints in its folder, the newest first: step=2.ckpt" in str(raised.value)
        assert path.exists() is (fault != "missing")  # left as it is
    if error is RejectedFileError:
        assert not path.exists() and path.with_name("the file.ckpt.rejected").exists()


def test_another_file_of_the_name_may_be_set_aside_again(kind):
    path, read, error = kind
    if error is ValueError:
        pytest.skip("checkpoints are left where they are")
    for fault in ("a text", "a folder", "a folder", "cut"):
        if not path.exists():
            path.write_bytes(b"1234")
        FAULTS[fault](path)
        with pytest.raises(error):
            read()


@pytest.mark.parametrize("fault", FAULTS)
def test_export_names_the_file(tmp_path, fault):
    AtomicCheckpointIO().save_checkpoint(CONTENT, tmp_path / "last.ckpt")
    FAULTS[fault](tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt"):
        export_checkpoint(str(tmp_path / "last.ckpt"), str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_checksums_find_what_has_changed(tmp_path):
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).write_text(name)
    assert changed_files(tmp_path) == []  # there are no checksums
    write_checksums(tmp_path, [tmp_path / "a", tmp_path / "b"])
    write_checksums(tmp_path, [tmp_path / "c"], "checksums-1.json")
    assert changed_files(tmp_path) == []
    for name in ("b", "d"):
        (tmp_path / name).write_text("other")
    (tmp_path / "c").unlink()
    assert changed_files(tmp_path) == ["b", "c"]
    assert sorted(changed_files(tmp_path, 0, 2) + changed_files(tmp_path, 1, 2)) == ["b", "c"]
    (tmp_path / "checksums.json").write_text("{")
    assert "checksums.json" in changed_files(tmp_path)


# ------------------------------------------------------------------------------------------------------------ full disk


def write_large(path, kind):
    """In a process that may write 100 kB into a file; prints the error."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        if kind == "checkpoint":
            AtomicCheckpointIO().save_checkpoint(CONTENT | {"more": torch.ones(100_000)}, path)
        else:
            store, ids = RolloutStore(), np.arange(100_000)
            store.put([CachedRollout("uid", 0, ids, ids, ids, "stop", 2, 3)])
            store.save(path, IDENTITY)
    except OSError as error:
        print(error)


@pytest.mark.parametrize("kind", ["checkpoint", "cache"])
def test_a_full_disk_is_called_one_and_leaves_what_was_there(tmp_path, kind):
    path = tmp_path / "last.ckpt"
    path.write_text("what was there")
    program = f"from test_integrity import *; write_large(Path({str(path)!r}), {kind!r})"
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert f"{path} could not be written: File too large" in found.stdout, found.stderr[-2000:]
    assert "What was saved before is untouched; make room" in found.stdout
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]
    assert path.read_text() == "what was there"
