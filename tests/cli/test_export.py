import json
import sys

import lightning as L
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lit_specrl import GRPO, PromptDataModule
from lit_specrl.cli.export import export_checkpoint
from lit_specrl.cli.main import COMMANDS, main
from lit_specrl.data import ArithmeticSource


def training(model, folder, **settings):
    """A module, data and trainer for one step at a rate that moves every weight."""
    module = GRPO(
        model,
        [lambda completion_ids, **columns: [float(sum(ids)) for ids in completion_ids]],
        num_generations=2,
        max_completion_length=3,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        **settings,
    )
    data = PromptDataModule(ArithmeticSource(2), batch_size=2, max_prompt_length=64)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return trainer, module, data


def saved_weights(folder):
    """Weights of a model under the names that they have in a checkpoint."""
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return {f"policy.model.{name}": weight for name, weight in state.items()}


@pytest.fixture(scope="module", params=["llama", "qwen"])
def trained(request, tiny_model, tiny_qwen, tmp_path_factory):
    """Folder of the initial model, trained weights, and their checkpoint; embeddings apart (Llama) and tied (Qwen)."""
    model = {"llama": tiny_model, "qwen": tiny_qwen}[request.param]
    folder = tmp_path_factory.mktemp("trained")
    trainer, module, data = training(model, folder, beta=0.1)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(folder / "last.ckpt")
    weights = {name: weight.clone() for name, weight in module.policy.named_weights()}
    return model, weights, str(folder / "last.ckpt")


def test_an_exported_checkpoint_is_the_trained_policy_with_its_tokenizer(trained, tmp_path):
    start, weights, checkpoint = trained
    folder = export_checkpoint(checkpoint, str(tmp_path / "new" / "model"))
    assert folder == tmp_path / "new" / "model"
    assert [entry.name for entry in folder.parent.iterdir()] == ["model"]  # nothing partial is left

    exported = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(dict(exported.named_parameters()), weights, rtol=0, atol=0)
    before = dict(AutoModelForCausalLM.from_pretrained(start).named_parameters())
    assert any(not torch.equal(before[name], weight) for name, weight in weights.items())
    ours, theirs = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(start)
    assert ours("What is 2?")["input_ids"] == theirs("What is 2?")["input_ids"]
    assert ours.chat_template == theirs.chat_template


def test_weights_are_written_in_the_dtype_asked_for(trained, tmp_path):
    _, weights, checkpoint = trained
    folder = export_checkpoint(checkpoint, str(tmp_path / "model"), dtype="bfloat16")
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    expected = {name: weight.bfloat16() for name, weight in weights.items()}
    torch.testing.assert_close(dict(exported.named_parameters()), expected, rtol=0, atol=0)


def test_an_exported_model_ends_texts_where_the_initial_one_did(tiny_model, tmp_path):
    """Chat models have several end-of-text tokens, and only their generation config tells; it used to be left
    behind."""
    start = tmp_path / "start"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(start)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(start)
    GenerationConfig(eos_token_id=[2, 7], temperature=0.6, do_sample=True).save_pretrained(start)
    trainer, module, data = training(str(start), tmp_path)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    exported = GenerationConfig.from_pretrained(export_checkpoint(str(tmp_path / "last.ckpt"), str(tmp_path / "model")))
    assert (exported.eos_token_id, exported.temperature) == ([2, 7], 0.6)


def test_another_model_can_lend_architecture_and_tokenizer(tiny_model, tmp_path):
    """A run on another machine started from a folder that does not exist here."""
    state = saved_weights(tiny_model)
    torch.save({"state_dict": state, "rlvr": {"model": "/elsewhere/model"}}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="model '/elsewhere/model' is neither a folder"):
        export_checkpoint(str(tmp_path / "last.ckpt"), str(tmp_path / "model"))
    folder = export_checkpoint(str(tmp_path / "last.ckpt"), str(tmp_path / "model"), model=tiny_model)
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0


@pytest.fixture(scope="module", params=["llama", "qwen"])
def adapted(request, tiny_model, tiny_qwen, tmp_path_factory):
    """Folder of the initial model, policy with trained adapters, and its checkpoint."""
    model = {"llama": tiny_model, "qwen": tiny_qwen}[request.param]
    folder = tmp_path_factory.mktemp("adapted")
    lora = {"r": 4, "use_rslora": True, "target_modules": "all-linear", "rank_pattern": {"q_proj": 2}}
    trainer, module, data = training(model, folder, lora=lora)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(folder / "last.ckpt")
    return model, module.policy, str(folder / "last.ckpt")


def logits(model):
    return model(torch.arange(8, 24)[None]).logits


def test_the_checkpoint_of_a_run_with_lora_is_exported_as_the_merged_model(adapted, tmp_path):
    start, policy, checkpoint = adapted
    exported = AutoModelForCausalLM.from_pretrained(export_checkpoint(checkpoint, str(tmp_path / "model")))
    torch.testing.assert_close(dict(exported.named_parameters()), dict(policy.named_weights()), rtol=0, atol=0)
    torch.testing.assert_close(logits(exported), logits(policy.model), rtol=0, atol=1e-4)
    assert (logits(exported) - logits(AutoModelForCausalLM.from_pretrained(start))).abs().max() > 0.01


def test_adapters_alone_are_exported_for_peft(adapted, tmp_path):
    start, policy, checkpoint = adapted
    folder = export_checkpoint(checkpoint, str(tmp_path / "adapter"), adapter_only=True)
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {
        entry.name for entry in folder.iterdir()
    }
    assert not list(folder.glob("model*"))
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == start
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), folder)
    torch.testing.assert_close(logits(loaded), logits(policy.model), rtol=0, atol=0)


@pytest.mark.parametrize("adapter_only", [False, True], ids=["merged", "adapters"])
def test_adapted_weights_are_written_in_the_dtype_asked_for(adapted, tmp_path, adapter_only):
    folder = export_checkpoint(adapted[2], str(tmp_path / "new"), dtype="bfloat16", adapter_only=adapter_only)
    (file,) = folder.glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    if not adapter_only:
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_checkpoint_of_before_adapters_is_exported_as_ever(tiny_model, tmp_path):
    torch.save({"state_dict": saved_weights(tiny_model), "rlvr": {"model": tiny_model}}, tmp_path / "last.ckpt")
    folder = export_checkpoint(str(tmp_path / "last.ckpt"), str(tmp_path / "model"))
    torch.testing.assert_close(saved_weights(folder), saved_weights(tiny_model), rtol=0, atol=0)


@pytest.fixture
def refused(tmp_path):
    """Message with which an export is refused; nothing may be written."""

    def export(checkpoint, **options):
        with pytest.raises(ValueError, match=r"checkpoint|ckpt") as raised:
            export_checkpoint(str(checkpoint), str(tmp_path / "model"), **options)
        assert not list(tmp_path.glob("model*"))
        return str(raised.value)

    return export


def test_an_existing_folder_is_not_written_to(trained, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=r"model exists already; export into a new folder"):
        export_checkpoint(trained[2], str(tmp_path / "model"))
    assert not list((tmp_path / "model").iterdir())


@pytest.mark.parametrize("drafter", ["out", "out/..", "out/model/../../out"])
def test_a_drafter_does_not_take_the_place_of_the_policy(trained, tmp_path, drafter):
    with pytest.raises(ValueError, match=r"drafter must be a folder of its own|exists already"):
        export_checkpoint(trained[2], str(tmp_path / "out" / "model"), drafter=str(tmp_path / drafter))
    assert not list(tmp_path.iterdir())


def test_a_missing_file_is_named(refused, tmp_path):
    message = refused(tmp_path / "last.ckpt")
    assert message.startswith(f"the checkpoint {tmp_path / 'last.ckpt'} cannot be used: there is no such file.")


@pytest.mark.parametrize(
    "content", [{"state_dict": {"layer.weight": torch.zeros(1)}}, {"epoch": 3}], ids=["weights", "none"]
)
def test_a_foreign_checkpoint_is_refused(refused, tmp_path, content):
    torch.save(content, tmp_path / "last.ckpt")
    assert refused(tmp_path / "last.ckpt").endswith(
        "holds no policy of this library (no weights called policy.model.*)"
    )


def test_adapters_that_a_run_did_not_have_are_not_exported(refused, trained):
    message = refused(trained[2], adapter_only=True)
    assert message == f"{trained[2]} holds no adapters: the run had no lora; export without adapter_only"


def test_adapters_of_another_architecture_are_refused(refused, adapted, tiny_model, tiny_qwen):
    other = tiny_qwen if adapted[0] == tiny_model else tiny_model
    assert f"do not fit the architecture of {other}: " in refused(adapted[2], model=other)


def test_weights_of_another_architecture_are_refused(refused, tiny_model, tiny_qwen, tmp_path):
    state = saved_weights(tiny_model)
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    message = refused(tmp_path / "last.ckpt", model=tiny_qwen)
    assert message.startswith(f"the weights of {tmp_path / 'last.ckpt'} do not fit the architecture of {tiny_qwen}: ")


def test_the_command_prints_the_folder_or_says_what_is_wrong(trained, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "model"
    monkeypatch.setattr(sys, "argv", ["lit-specrl", "export", trained[2], str(folder), "--dtype", "bfloat16"])
    main()
    assert capsys.readouterr().out.strip() == str(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match=r".* holds no adapters"):
        COMMANDS["export"].call([trained[2], str(tmp_path / "adapter"), "--adapter_only", "true"])
    with pytest.raises(ValueError, match=r".*model exists already"):
        COMMANDS["export"].call([trained[2], str(folder)])
