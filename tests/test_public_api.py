"""The names that `lit_specrl` offers, to programs and to type checkers."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import lit_specrl

PROGRAM = """
from lit_specrl import GRPO, PrefixCache, PromptDataModule, Rollouts, SpeculativeRollout, VLLMEngine, auto_precision

reveal_type(GRPO)
reveal_type(auto_precision())
module = GRPO("model", [], num_generations=8)
reveal_type(module)
callbacks = [PrefixCache(), SpeculativeRollout(VLLMEngine())]
def length(rollouts: Rollouts) -> float:
    reveal_type(rollouts.num_tokens)
    return rollouts.num_tokens / rollouts.num_rows
data = PromptDataModule("questions.jsonl", batch_size="eight")
"""
SETTINGS = """
[mypy]
follow_imports = skip
ignore_missing_imports = true
[mypy-lit_specrl.*]
follow_imports = silent
"""  # torch and the like take minutes


def test_every_name_is_there_for_type_checkers_too():
    tree = ast.parse(Path(lit_specrl.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.asname: node.module for node in block.body for alias in node.names}
    assert typed == {name: f"lit_specrl.{module}" for name, module in lit_specrl._EXPORTS.items()}
    assert all(getattr(lit_specrl, name) is not None for name in lit_specrl.__all__)


def test_a_users_program_is_checked_with_the_types_of_the_library(tmp_path):
    (tmp_path / "train.py").write_text(PROGRAM)
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    command = [sys.executable, "-m", "mypy", "train.py"]
    done = subprocess.run(
        [*command, f"--cache-dir={tmp_path / 'cache'}"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(Path(lit_specrl.__file__).parents[1])},  # also where it is not installed
        capture_output=True,
        text=True,
        check=False,
    )
    revealed = [
        line.partition("Revealed type is ")[2].strip('"') for line in done.stdout.splitlines() if "Revealed" in line
    ]
    assert revealed[0].startswith("def (model: ") and "num_generations: " in revealed[0]
    assert revealed[1].startswith("Literal[") or revealed[1] == "str"
    assert revealed[2].endswith(".GRPO")
    assert revealed[3].removeprefix("builtins.") == "int"
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1 and 'Argument "batch_size"' in errors[0], done.stdout
