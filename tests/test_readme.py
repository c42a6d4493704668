"""The README's commands and programs work as they stand there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest

from lit_specrl import DrafterDistillation, NGramDrafter, PrefixCache, SpeculativeRollout, VLLMEngine
from lit_specrl.bench.command import bench_command
from lit_specrl.bench.rollout.runs import Run, RunFailedError
from lit_specrl.callbacks.tensorboard_report import LAYOUT
from lit_specrl.cli.fit import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(program: str) -> list[str]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+#.*", "", line) for line in lines if line.startswith(program + " ")]


@pytest.mark.parametrize("command", commands("make"))
def test_make_knows_the_target(command):
    result = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_test_command_is_what_continuous_integration_runs():
    assert "make test" in commands("make")
    assert re.search(r"^make .*\btest\b", (ROOT / ".ci" / "run").read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize(
    "command", [command for command in commands("lit-specrl fit") if " --config recipes/" in command]
)
def test_the_command_line_is_understood(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    arguments = [argument for argument in shlex.split(command)[1:] if argument != "--print_config"]
    with pytest.raises(SystemExit) as stop:
        train([*arguments, "--print_config"])
    assert stop.value.code in (0, None)
    assert re.search("class_path: lit_specrl.(GRPO|DAPO|PPO)", capsys.readouterr().out)


@pytest.mark.parametrize("command", commands("lit-specrl bench --config"))
def test_the_benchmark_finds_its_callbacks(command, tmp_path, monkeypatch):
    def stop(run):
        raise RunFailedError(f"{run.arm} would start")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(Run, "execute", stop)
    with pytest.raises(RunFailedError, match="without would start"):
        bench_command([*shlex.split(command)[2:], f"--output={tmp_path}"])


def test_the_programs_run_up_to_the_training(monkeypatch):
    started = []
    monkeypatch.setattr(L.Trainer, "fit", lambda self, module, datamodule: started.append((self, module, datamodule)))
    for program in blocks("python"):
        exec(
            compile(
                program.replace("precision=auto_precision(),", 'precision=auto_precision(), accelerator="cpu",'),
                "README",
                "exec",
            ),
            {},
        )
    (trainer, module, datamodule), *_ = started
    assert type(module).__name__ == "GRPO"
    assert datamodule.batch_size == 64
    assert {"SpeculativeRollout", "RunSummary"} <= {type(callback).__name__ for callback in trainer.callbacks}


def test_importing_the_package_needs_neither_torch_nor_vllm():
    program = (
        "import sys, lit_specrl; print([name for name in ('torch', 'vllm', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_table_of_metrics_defines_what_is_charted():
    table = README[README.index("## Metrics") : README.index("## Measured")]
    drafting = SpeculativeRollout(VLLMEngine(), NGramDrafter())
    layouts = [LAYOUT, *(callback.charts() for callback in (PrefixCache(), drafting, DrafterDistillation()))]
    for charts in [charts for layout in layouts for charts in layout.values()]:
        for _, (_, names) in charts.items():
            for name in names:
                stem = re.sub(r"[\^$]|\(.*?\)|\.\*", "", name).split("/")[0]
                assert stem in table, f"{name} is charted, but the README does not define it"


def test_every_stage_of_a_step_is_in_the_table_of_metrics():
    sources = [path.read_text("utf-8") for path in (ROOT / "lit_specrl").rglob("*.py")]
    stages = {stage for source in sources for stage in re.findall(r'\.timer\("(\w+)"\)', source)}
    section = README[README.index("## Metrics") : README.index("## Measured")]
    documented = set(re.findall(r"\w+", " ".join(re.findall(r"timing_s/[^`]*", section))))
    assert {"gen", "experience", "update_actor"} <= stages <= documented
