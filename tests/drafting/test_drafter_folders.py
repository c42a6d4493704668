import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_specrl.checkpoints.atomic_files import atomic_folder
from lit_specrl.drafting.drafter_folders import check_output


def folder_with(path, *names):
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("{}")
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.mark.parametrize(
    "names", [[], ["config.json", "model.safetensors", "checksums.json"]], ids=["empty", "older drafter"]
)
def test_a_folder_may_be_replaced(tmp_path, names):
    check_output(folder_with(tmp_path / "drafter", *names))
    check_output(tmp_path / "new" / "drafter")


@pytest.mark.parametrize(
    "names",
    [
        ["one/config.json"],
        ["config.json", "model.safetensors"],  # a model of somebody else
        ["checksums.json", "common.ckpt"],  # a checkpoint
        ["config.json", "checksums.json", "model.safetensors", "older/config.json"],
    ],
)
def test_what_else_a_folder_holds_is_left_alone(tmp_path, names):
    with pytest.raises(MisconfigurationException, match="holds something else"):
        check_output(folder_with(tmp_path / "drafter", *names))


def test_a_file_and_the_working_folder_are_left_alone(tmp_path, monkeypatch):
    folder_with(tmp_path, "drafter")
    with pytest.raises(MisconfigurationException, match="holds something else"):
        check_output(tmp_path / "drafter")
    monkeypatch.chdir(folder_with(tmp_path / "empty"))
    for output in (".", "", ".."):
        with pytest.raises(MisconfigurationException, match="holds the working folder"):
            check_output(output)


def test_a_folder_is_known_by_its_absolute_name(tmp_path, monkeypatch):
    """`new/.` and the like have no last name, which was found out when all was written."""
    monkeypatch.chdir(folder_with(tmp_path / "here"))
    with atomic_folder("../there/new/..") as partial:
        (partial / "file").touch()
    assert [entry.name for entry in (tmp_path / "there").iterdir()] == ["file"]
