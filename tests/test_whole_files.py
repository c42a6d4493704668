"""A folder is there as a whole, or the one that was there before is."""

import pytest

from lit_specrl.whole_files import whole_folder


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_folder_appears_when_it_is_complete_and_replaces_the_one_before(tmp_path):
    with whole_folder(tmp_path / "deep" / "folder") as partial:
        (partial / "first").write_text("1")
        assert not (tmp_path / "deep" / "folder").exists()
    assert names(tmp_path) == ["deep", "deep/folder", "deep/folder/first"]
    with whole_folder(tmp_path / "deep" / "folder") as partial:
        (partial / "second").write_text("2")
        assert (tmp_path / "deep" / "folder" / "first").exists()
    assert names(tmp_path) == ["deep", "deep/folder", "deep/folder/second"]
    assert (tmp_path / "deep" / "folder").stat().st_mode & 0o777 == 0o755


def test_an_error_leaves_what_was_there(tmp_path):
    with whole_folder(tmp_path / "folder") as partial:
        (partial / "first").write_text("1")
    with pytest.raises(RuntimeError, match="halfway"):
        fail_halfway(tmp_path / "folder")
    assert names(tmp_path) == ["folder", "folder/first"]


def fail_halfway(folder):
    with whole_folder(folder) as partial:
        (partial / "second").write_text("2")
        raise RuntimeError("halfway")
