"""What a living process holds stays; what it leaves behind when it is killed is swept."""

import os
import signal
import tempfile

import pytest

from lit_specrl.checkpoints.atomic_files import atomic_file, atomic_folder
from lit_specrl.checkpoints.locks import ProcessFolder, hold, is_held, sweep


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def in_a_process(function, *arguments):
    """Call it in a child, which then waits; returns the child's id."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        kept = function(*arguments)
        os.write(write, b"1")
        signal.pause()
        del kept
    os.read(read, 1)
    return child


def end(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_folder_of_a_living_process_stays_and_that_of_a_killed_one_goes(temporary):
    (temporary / "of somebody else").mkdir()
    child = in_a_process(ProcessFolder, "drafter")
    with ProcessFolder("drafter"):
        assert len(names(temporary)) == 3
    end(child)
    assert len(names(temporary)) == 2
    with ProcessFolder("adapters") as own:
        assert names(temporary) == sorted([os.path.basename(own), "of somebody else"])
    assert names(temporary) == ["of somebody else"]


@pytest.mark.parametrize("is_folder", [False, True])
def test_what_is_being_written_stays_and_what_was_half_written_goes(tmp_path, is_folder):
    def write_half():
        with (atomic_folder if is_folder else atomic_file)(tmp_path / "last.ckpt") as partial:
            (partial / "inside" if is_folder else partial).write_text("half")
            os.write(ready, b"1")
            signal.pause()

    read, ready = os.pipe()
    child = os.fork()
    if child == 0:
        write_half()
    os.read(read, 1)
    with atomic_file(tmp_path / "step=1.ckpt") as partial:
        partial.write_text("whole")
    assert len(names(tmp_path)) == 2
    end(child)
    with atomic_file(tmp_path / "step=2.ckpt") as partial:
        partial.write_text("whole")
    assert names(tmp_path) == ["step=1.ckpt", "step=2.ckpt"]


def test_a_hold_lasts_under_any_name_until_it_is_let_go(tmp_path):
    (tmp_path / "a").write_text("")
    descriptor = hold(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    sweep([tmp_path / "b", tmp_path / "missing"])
    assert is_held(tmp_path / "b") and names(tmp_path) == ["b"]
    os.close(descriptor)
    sweep([tmp_path / "b"])
    assert names(tmp_path) == []
    assert hold(tmp_path / "b") is None


def test_links_are_left_alone(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    sweep([tmp_path / "link"])
    assert names(tmp_path) == ["link", "real"]
