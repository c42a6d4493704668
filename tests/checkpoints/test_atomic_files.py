"""A folder is there as a whole, or the one that was there before is."""

import pytest

from lit_specrl.checkpoints import atomic_files as whole_files
from lit_specrl.checkpoints.atomic_files import atomic_folder, replace_atomically


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_folder_appears_when_it_is_complete_and_replaces_the_one_before(tmp_path):
    with atomic_folder(tmp_path / "deep" / "folder") as partial:
        (partial / "first").write_text("1")
        assert not (tmp_path / "deep" / "folder").exists()
    assert names(tmp_path) == ["deep", "deep/folder", "deep/folder/first"]
    with atomic_folder(tmp_path / "deep" / "folder") as partial:
        (partial / "second").write_text("2")
        assert (tmp_path / "deep" / "folder" / "first").exists()
    assert names(tmp_path) == ["deep", "deep/folder", "deep/folder/second"]
    assert (tmp_path / "deep" / "folder").stat().st_mode & 0o777 == 0o755


def test_an_error_leaves_what_was_there(tmp_path):
    with atomic_folder(tmp_path / "folder") as partial:
        (partial / "first").write_text("1")
    with pytest.raises(RuntimeError, match="halfway"):
        fail_halfway(tmp_path / "folder")
    assert names(tmp_path) == ["folder", "folder/first"]


def fail_halfway(folder):
    with atomic_folder(folder) as partial:
        (partial / "second").write_text("2")
        raise RuntimeError("halfway")


def test_what_a_killed_process_has_left_is_no_obstacle(tmp_path, monkeypatch):
    """Where names cannot be exchanged it leaves the older folder under another name."""
    monkeypatch.setattr(whole_files, "_exchange", lambda *paths: False)
    for name in ("x", "x.old", "x.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "inside").write_text(name)
    replace_atomically(tmp_path / "x.partial", tmp_path / "x")
    assert names(tmp_path) == ["x", "x/inside"] and (tmp_path / "x" / "inside").read_text() == "x.partial"


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("before", ["file", "folder", "link", None])
@pytest.mark.parametrize("after", ["file", "folder"])
def test_anything_takes_the_place_of_anything(tmp_path, monkeypatch, can_exchange, before, after):
    """A folder could not take the place of a file: the checkpoint of a run that goes on sharded, under the name of the
    one before."""
    if not can_exchange:
        monkeypatch.setattr(whole_files, "_exchange", lambda *paths: False)

    def make(path, kind, text):
        if kind == "folder":
            path.mkdir()
            (path / "inside").write_text(text)
        elif kind == "file":
            path.write_text(text)
        elif kind == "link":
            make(tmp_path / "linked", "folder", text)
            path.symlink_to(tmp_path / "linked")

    make(tmp_path / "x", before, "before")
    make(tmp_path / "x.partial", after, "after")
    replace_atomically(tmp_path / "x.partial", tmp_path / "x")
    assert ((tmp_path / "x" / "inside") if after == "folder" else (tmp_path / "x")).read_text() == "after"
    linked = ["linked", "linked/inside"] if before == "link" else []
    assert names(tmp_path) == sorted([*linked, "x", *(["x/inside"] if after == "folder" else [])])
