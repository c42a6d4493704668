"""Precision follows what the device has instructions for."""

from itertools import count

import pytest
import torch
from training import arithmetic, grpo, make_trainer

from lit_specrl import RunPlan, SpeculativeRollout, VLLMEngine, auto_precision, precision
from lit_specrl.precision import Trainer, fast_dtype, warn_if_slow

CPU = torch.device("cpu")


@pytest.fixture
def processor(monkeypatch):
    """Gives this machine's processor the instructions that are named, and no others."""

    def have(*instructions):
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(instructions, True))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    return have


@pytest.mark.parametrize(
    ("instructions", "dtype", "name"),
    [
        (["avx2"], "float32", "32-true"),
        (["avx2", "avx512_f", "avx512_vnni"], "float32", "32-true"),
        (["avx2", "avx512_f", "avx512_bf16"], "bfloat16", "bf16-mixed"),
        (["avx2", "avx512_f", "avx512_bf16", "amx_bf16"], "bfloat16", "bf16-mixed"),
        (["neon", "bf16"], "bfloat16", "bf16-mixed"),
    ],
    ids=["AVX2", "AVX-512", "AVX-512 bf16", "AMX", "ARM"],
)
def test_auto_is_what_the_processor_has_instructions_for(processor, instructions, dtype, name):
    processor(*instructions)
    assert fast_dtype(CPU).name == dtype
    assert auto_precision() == auto_precision("cpu") == name
    assert Trainer(accelerator="cpu", logger=False).precision == name
    assert VLLMEngine().dtype_on(CPU) == dtype


@pytest.mark.parametrize(("level", "dtype"), [("AVX2", "float32"), ("avx512_core", "float32"), ("ALL", "bfloat16")])
def test_what_onednn_may_not_use_is_not_there(processor, monkeypatch, level, dtype):
    processor("avx512_bf16", "amx_bf16")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", level)
    assert fast_dtype(CPU).name == dtype


def test_what_the_user_names_is_taken(processor):
    processor("avx2")
    assert Trainer(accelerator="cpu", logger=False, precision="bf16-mixed").precision == "bf16-mixed"
    assert Trainer(accelerator="cpu", logger=False, precision=None).precision == "32-true"  # Lightning's default
    assert VLLMEngine(dtype="bfloat16").dtype_on(CPU) == "bfloat16"


@pytest.mark.parametrize("setting", ["precision", "dtype", "engine"])
def test_emulated_bfloat16_is_warned_of_with_its_factor(processor, monkeypatch, tiny_model, tmp_path, setting):
    processor("avx2")
    monkeypatch.setattr(precision, "bfloat16_slowdown", lambda device: 21.4)
    module = grpo(tiny_model, **({"dtype": "bfloat16"} if setting == "dtype" else {}))
    callbacks = [SpeculativeRollout(VLLMEngine(dtype="bfloat16"))] if setting == "engine" else []
    options = {"precision": "bf16-mixed"} if setting == "precision" else {}
    monkeypatch.setattr(type(module), "configure_model", lambda self: pytest.exit("loaded"))
    with (
        pytest.warns(
            UserWarning, match=r"no bf16 instructions: .* 21 times as long .* Use 'auto', which takes float32"
        ),
        pytest.raises(pytest.exit.Exception, match="loaded"),
    ):
        make_trainer(*callbacks, default_root_dir=tmp_path, **options).fit(module, datamodule=arithmetic())


@pytest.mark.parametrize(("instructions", "dtype"), [(["avx2"], "float32"), (["avx512_bf16"], "bfloat16")])
def test_what_is_fast_is_not_warned_of(processor, recwarn, instructions, dtype):
    processor(*instructions)
    warn_if_slow("dtype", dtype, CPU)
    assert not recwarn.list


def test_the_factor_is_measured_without_the_runs_random_numbers():
    state = torch.get_rng_state()
    precision.bfloat16_slowdown.cache_clear()
    assert precision.bfloat16_slowdown(CPU) > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_is_warned_once(processor, monkeypatch, tiny_model, tmp_path, recwarn):
    """The table before the run checks the module, too."""
    processor("avx2")
    factors = count(20)  # another text each time, for equal ones are shown once
    monkeypatch.setattr(precision, "bfloat16_slowdown", lambda device: next(factors))
    make_trainer(RunPlan(), default_root_dir=tmp_path, precision="bf16-mixed", limit_train_batches=0).fit(
        grpo(tiny_model, max_completion_length=24), datamodule=arithmetic()
    )
    assert len([warning for warning in recwarn.list if "bf16 instructions" in str(warning.message)]) == 1
