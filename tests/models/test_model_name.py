"""A revision of a model on the hub, and modelling code that a model brings along."""

import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import SHAPE, save_model
from training import arithmetic, grpo, make_trainer
from transformers import AutoModelForCausalLM, LlamaConfig

from lit_specrl.cli.export import export_checkpoint
from lit_specrl.models.model_name import ModelName, full_name
from lit_specrl.models.policy import Policy

OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def own_model(tmp_path_factory):
    """Folder of a model of a kind that transformers does not know, with its code."""
    folder = Path(save_model(tmp_path_factory.mktemp("own"), LlamaConfig(**SHAPE)))
    (folder / "own_model.py").write_text(OWN_CODE)
    config = folder / "config.json"
    auto_map = '"auto_map": {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnForCausalLM"}'
    config.write_text(config.read_text().replace('"model_type": "llama"', f'"model_type": "own", {auto_map}'))
    return str(folder)


def test_a_models_own_code_trains_and_is_exported_where_it_may_run(own_model, tmp_path):
    with pytest.raises(ValueError, match="modelling code of its own; read it, and let it run with trust_remote_code"):
        make_trainer(default_root_dir=tmp_path).fit(grpo(own_model), datamodule=arithmetic())

    module, trainer = (
        grpo(own_model, trust_remote_code=True, beta=0.1),
        make_trainer(default_root_dir=tmp_path, limit_train_batches=2),
    )
    trainer.fit(module, datamodule=arithmetic())
    assert type(module.policy.model).__name__ == "OwnForCausalLM" and module.policy_version == 2

    checkpoint = tmp_path / "last.ckpt"
    trainer.save_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="trust_remote_code"):
        export_checkpoint(str(checkpoint), str(tmp_path / "refused"))
    folder = export_checkpoint(str(checkpoint), str(tmp_path / "exported"), trust_remote_code=True)
    exported = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    torch.testing.assert_close(dict(exported.named_parameters()), dict(module.policy.model.named_parameters()))


@pytest.fixture
def hub(tmp_path, monkeypatch, make_llama):
    """A cache of the hub with two revisions of a model; the folders that they were made of, by revision."""
    folders = {"main": make_llama(), "first": make_llama(intermediate_size=128)}
    for number, (revision, folder) in enumerate(folders.items()):
        commit = str(number) * 40
        shutil.copytree(folder, tmp_path / "models--someone--tiny" / "snapshots" / commit)
        reference = tmp_path / "models--someone--tiny" / "refs" / revision
        reference.parent.mkdir(exist_ok=True)
        reference.write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folders


def test_a_revision_decides_config_tokenizer_weights_and_export(hub, tmp_path):
    module, trainer = (
        grpo("someone/tiny", revision="first", beta=0.1),
        make_trainer(default_root_dir=tmp_path / "run", limit_train_batches=1),
    )
    trainer.fit(module, datamodule=arithmetic())
    expected = AutoModelForCausalLM.from_pretrained(hub["first"])
    torch.testing.assert_close(
        dict(module.scorer.reference.model.named_parameters()), dict(expected.named_parameters()), rtol=0, atol=0
    )
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    folder = export_checkpoint(str(tmp_path / "last.ckpt"), str(tmp_path / "exported"))
    assert AutoModelForCausalLM.from_pretrained(folder).config.intermediate_size == 128

    assert Policy.build("someone/tiny").model.config.intermediate_size == SHAPE["intermediate_size"]


def test_a_revision_that_is_not_there_is_told_with_the_command_that_fetches_it(hub):
    with pytest.raises(ValueError, match=r"revision 'other' of model 'someone/tiny'.*--revision other"):
        Policy.build(ModelName("someone/tiny", "other"))


def test_a_folder_has_no_revisions(tiny_model):
    with pytest.raises(ValueError, match="revision='first' is of a model on the hub"):
        grpo(tiny_model, revision="first")


def test_a_revision_is_part_of_the_full_name():
    assert full_name(ModelName("someone/tiny", "first")) == "someone/tiny@first"
    assert full_name(ModelName("someone/tiny")) == full_name("someone/tiny") == "someone/tiny"
