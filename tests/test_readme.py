"""The front page is short, and its program runs; what it shares with the other pages is tested in `tests/docs`."""

import re
import subprocess
import sys

import lightning as L
from pages import BLOCKS, ROOT, command_lines, prose

README = ROOT / "README.md"
TEXT = README.read_text("utf-8")
OWN = [block for block in BLOCKS if block.page == README]
MAX_WORDS, MAX_PROGRAM = 1200, 24


def test_the_front_page_is_short():
    assert len(TEXT.split()) <= MAX_WORDS
    long = [line for line in prose(TEXT).splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not long


def test_it_says_what_is_gained_what_it_costs_on_what_and_by_which_command():
    head = prose(TEXT).split("\n## ")[0]
    header, _, *rows = [line for line in head.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["gained", "cost", "hardware, seeds", "command"]
    assert len(rows) == 4
    numbers = [number for row in rows for number in re.findall(r"\d+\.\d+", re.sub(r"\(.*?\)", "", row))]
    results = (ROOT / "docs" / "results.md").read_text("utf-8")
    measured = set(re.findall(r"\d*\.\d+", results))
    assert len(numbers) > 8
    assert [number for number in numbers if number not in measured and number[1:] not in measured] == []


def test_the_test_command_is_what_continuous_integration_runs():
    commands = [line for block in OWN if block.language == "bash" for line in command_lines(block)]
    assert commands[:2] == ["make quickstart", "make test"]
    assert re.search(r"^make .*\btest\b", (ROOT / ".ci" / "run").read_text("utf-8"), re.MULTILINE)


def test_the_program_shows_both_papers_and_runs_up_to_the_training(monkeypatch):
    (program,) = (block.text for block in OWN if block.language == "python")
    assert len(program.splitlines()) <= MAX_PROGRAM
    started = []
    monkeypatch.setattr(L.Trainer, "fit", lambda self, module, datamodule: started.append((self, module, datamodule)))
    exec(compile(program.replace("L.Trainer(", 'L.Trainer(accelerator="cpu", '), "README", "exec"), {})
    ((trainer, module, datamodule),) = started
    assert type(module).__name__ == "GRPO" and datamodule.batch_size == 64
    callbacks = {type(callback).__name__: callback for callback in trainer.callbacks}
    assert {"PrefixCache", "AdaptiveScheduler", "RunSummary"} <= set(callbacks)
    assert type(callbacks["SpeculativeRollout"].drafter).__name__ == "HistoryDrafter"


def test_importing_the_package_needs_neither_torch_nor_vllm():
    program = (
        "import sys, lit_specrl; print([name for name in ('torch', 'vllm', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
