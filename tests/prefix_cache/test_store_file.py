import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from lit_specrl.checkpoints.tensor_file import RejectedFileError, write_tensor_file
from lit_specrl.prefix_cache.store import RolloutStore

IDENTITY = {"model": "tiny", "tokenizer": "1f3a"}


@pytest.fixture
def store(varied_rows):
    store = RolloutStore()
    store.put(varied_rows)
    return store


@pytest.fixture
def path(tmp_path, store):
    store.save(tmp_path / "rank0.safetensors", IDENTITY)
    return tmp_path / "rank0.safetensors"


def rejection(path, identity=IDENTITY):
    with pytest.raises(RejectedFileError) as caught:
        RolloutStore.load(path, identity)
    if caught.value.reason == "foreign":
        assert path.exists() and caught.value.rejected_path is None
    else:
        assert not path.exists() and caught.value.rejected_path.exists()
    return caught.value


def test_a_saved_store_is_loaded_whole(store, path, plain):
    loaded = RolloutStore.load(path, IDENTITY, max_bytes=10**6)
    assert plain(loaded) == plain(store)
    assert loaded.max_bytes == 10**6
    assert [file.name for file in path.parent.iterdir()] == ["rank0.safetensors"]


def test_an_empty_store_is_saved_too(tmp_path):
    RolloutStore().save(tmp_path / "empty", {})
    assert len(RolloutStore.load(tmp_path / "empty", {})) == 0


def test_the_order_of_the_identity_does_not_matter(path):
    assert len(RolloutStore.load(path, dict(reversed(IDENTITY.items())))) == 4


def test_a_store_of_another_model_is_left_to_it(store, path, plain):
    """It was renamed like a damaged one, so that its own run did not find it again."""
    error = rejection(path, {"model": "large", "tokenizer": "1f3a", "template": "x"})
    assert error.reason == "foreign"
    assert error.detail == "model: expected 'large', found 'tiny'; template: expected 'x', found None"
    assert str(error) == f"{path} is not used: foreign ({error.detail}); it was left as it is"
    assert plain(RolloutStore.load(path, IDENTITY)) == plain(store)


def test_a_missing_file_is_not_a_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        RolloutStore.load(tmp_path / "none", IDENTITY)


def test_an_unknown_version_is_set_aside(store, path):
    write_tensor_file(path, *store.to_tensors(), IDENTITY, version=3)
    error = rejection(path)
    assert str(error).endswith("(expected version 2, found 3); it was renamed to rank0.safetensors.rejected")


def test_a_safetensors_file_of_something_else_is_set_aside(store, path):
    save_file(store.to_tensors()[0], path)
    assert rejection(path).reason == "damaged"


def test_a_sound_file_without_the_state_of_a_store_is_set_aside(store, path):
    write_tensor_file(path, {}, {"version": 2}, IDENTITY, version=2)
    assert rejection(path).reason == "damaged"


def test_a_file_cut_anywhere_is_set_aside(path):
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert rejection(path).reason == "damaged"


def test_a_file_with_any_byte_changed_is_set_aside(path):
    """Every byte, one after the other: also those that leave the file well-formed, such as a digit of a log-prob."""
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        rejection(path)


def test_a_save_that_fails_leaves_the_old_file(store, path, plain, monkeypatch):
    def disk_full(tensors, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("lit_specrl.checkpoints.tensor_file.save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        RolloutStore().save(path, IDENTITY)
    assert plain(RolloutStore.load(path, IDENTITY)) == plain(store)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_a_process_killed_while_saving_leaves_the_old_file_or_the_new_one(tmp_path):
    program = Path(__file__).with_name("killed_while_saving.py")
    outcome = subprocess.run(
        [sys.executable, program, tmp_path / "store"], capture_output=True, text=True, timeout=120, check=False
    )
    assert outcome.returncode == 0, outcome.stderr
    assert int(outcome.stdout) > 0  # some kills have hit in the middle of a save
