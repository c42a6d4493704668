"""Processes that end by themselves, whatever runs in them. Nothing is killed here: a test that fails waits in vain."""

import subprocess
import sys

import pytest

PREFIX = "import atexit, sys, threading, time\nfrom lit_specrl.cli.ending import end, run_and_end\n"


def run(program):
    command = [sys.executable, "-c", PREFIX + program]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_nobody_waits_for_a_thread_that_does_not_end():
    ended = run("threading.Thread(target=time.sleep, args=[1000]).start()\nprint('done', end='')\nend(3)")
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "done", "")


def test_what_was_registered_for_the_end_is_called():
    ended = run("atexit.register(print, 'uploaded')\nend(0)")
    assert (ended.returncode, ended.stdout) == (0, "uploaded\n")


def test_what_does_not_come_back_is_named_and_left():
    ended = run("def upload():\n    time.sleep(1000)\natexit.register(upload)\nend(0, patience_s=0.2)")
    assert ended.returncode == 0
    assert "the work is done" in ended.stderr
    assert "in upload" in ended.stderr


@pytest.mark.parametrize(
    ("main", "status", "said"),
    [
        ("pass", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(2)", 2, ""),
        ("sys.exit('no such file')", 1, "no such file"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("raise KeyboardInterrupt", 130, "KeyboardInterrupt"),
    ],
)
def test_the_status_is_that_of_the_command(main, status, said):
    ended = run(f"def main():\n    {main}\nrun_and_end(main)")
    assert ended.returncode == status
    assert said in ended.stderr


REWARD = """
import threading, time
threading.Thread(target=time.sleep, args=[1000]).start()  # as a client of a service that nobody closes
def length(completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]
"""


@pytest.mark.parametrize("engine", ["TransformersEngine", "VLLMEngine"])
def test_a_run_ends_by_itself(engine, tiny_model, data_file, tmp_path):
    """With an engine, checker processes, a logger, and a thread of the user's that never ends."""
    (tmp_path / "own_rewards.py").write_text(REWARD)
    (tmp_path / "run.yaml").write_text(f"""
model:
  class_path: GRPO
  init_args:
    model: {tiny_model}
    rewards: [{{class_path: MathReward}}, own_rewards.length]
    num_generations: 2
    max_completion_length: 8
data:
  class_path: PromptDataModule
  init_args:
    train: {{class_path: FileSource, init_args: {{path: {data_file}}}}}
    batch_size: 2
    max_prompt_length: 128
trainer:
  accelerator: cpu
  max_steps: 1
  callbacks: [{{class_path: SpeculativeRollout, init_args: {{engine: {engine}}}}}, RunSummary]
""")
    command = [sys.executable, "-m", "lit_specrl.cli", "fit", "--config", "run.yaml"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=400)
    assert ended.returncode == 0, ended.stderr
    assert "1 steps" in ended.stdout
    assert "the work is done" not in ended.stderr
    assert "the engine has started in" in ended.stderr
    assert ("vLLM loads the model" in ended.stderr) == (engine == "VLLMEngine")
