from importlib import metadata

import pytest

from lit_specrl.cli import environment


@pytest.fixture
def installation(monkeypatch):
    """Pretend that torchvision is installed, and that importing it ends as told."""

    def pretend(version, outcome):
        def find_version(name):
            if name == "torchvision" and version is None:
                raise metadata.PackageNotFoundError(name)
            return version if name == "torchvision" else "9.9"

        def import_module(name):
            assert name == "torchvision"
            if outcome:
                raise outcome

        monkeypatch.setattr(environment.metadata, "version", find_version)
        monkeypatch.setattr(environment, "import_module", import_module)

    return pretend


def test_no_torchvision_is_fine_and_is_not_imported(installation):
    installation(None, AssertionError("imported"))
    environment.check_torchvision()


def test_a_torchvision_that_loads_is_fine(installation):
    installation("0.1", None)
    environment.check_torchvision()


@pytest.mark.parametrize(
    "outcome",
    [RuntimeError("no operator torchvision::nms"), OSError("libcudart.so.13"), ImportError("x"), AttributeError("x")],
    ids=lambda outcome: type(outcome).__name__,
)
def test_a_torchvision_of_another_build_is_named_with_its_remedy(installation, outcome):
    installation("0.1", outcome)
    with pytest.raises(ImportError) as raised:
        environment.check_torchvision()
    message = str(raised.value)
    assert f"the installed torchvision does not fit torch 9.9 ({outcome})" in message
    assert message.endswith("pip uninstall -y torchvision torchaudio torchcodec")
