"""Responses of several turns as a user configures them: YAML through the command line, with everything that speeds a
rollout up."""

import json

import pytest
from tiny_models import build_tokenizer
from training import assert_identical, weights_of, write_questions

from lit_specrl.cli.fit import train

YAML = """
model:
  class_path: GRPO
  init_args:
    environment: {class_path: CalculatorEnvironment, init_args: {pattern: '(.)', error: 'no'}}
    max_turns: 3
    rewards:
      - {class_path: NumericReward, init_args: {answer_format: number}}
      - {class_path: RewardFunction, init_args: {function: training.variety}}
    num_generations: 4
    max_completion_length: 48
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}
data:
  class_path: PromptDataModule
  init_args: {batch_size: 2, max_prompt_length: 64}
trainer:
  accelerator: cpu
  devices: 1
  logger: false
  enable_progress_bar: false
  limit_val_batches: 0
  callbacks:
    - {class_path: RolloutRecorder, init_args: {dirpath: rollouts}}
"""
REUSE = """
trainer:
  callbacks+:
    - {class_path: PrefixCache, init_args: {lenience: 1.5}}
"""
FAST = """
trainer:
  callbacks+:
    - class_path: SpeculativeRollout
      init_args:
        engine: {class_path: VLLMEngine, init_args: {dtype: float32, max_num_seqs: 8, cpu_kv_cache_gib: 0.25}}
        drafter: {class_path: HistoryDrafter, init_args: {num_speculative_tokens: 2}}
    - {class_path: PrefixCache, init_args: {lenience: 1.5, verifier: engine}}
"""


@pytest.fixture
def fit(tmp_path, monkeypatch, model_folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(YAML)
    questions = write_questions(tmp_path / "questions.jsonl")

    def run(block, *arguments):
        (tmp_path / "block.yaml").write_text(block)
        given = [f"--model.init_args.model={model_folder}", f"--data.init_args.train={questions}", *arguments]
        return train(["fit", "--config=run.yaml", "--config=block.yaml", *given])

    return run


def test_a_run_goes_on_where_it_was_stopped(fit):
    whole = fit(REUSE, "--trainer.max_epochs=3", "--trainer.enable_checkpointing=false").model
    saved = "--trainer.default_root_dir=saved"
    fit(REUSE, "--trainer.max_epochs=2", saved)
    resumed = fit(REUSE, "--trainer.max_epochs=3", saved, "--ckpt_path=last").model
    assert (whole.step, resumed.step) == (6, 6)
    assert_identical(weights_of(resumed), weights_of(whole))
    assert resumed.step_metrics["environment/turns"] > 1


def test_vllm_drafts_verifies_and_takes_turns(fit, tmp_path, capsys):
    """Records of both epochs: every row is said by the policy but for what the template writes between its turns."""
    arguments = "--trainer.max_epochs=2", "--trainer.enable_checkpointing=false", "--trainer.precision=32-true"
    run = fit(FAST, *arguments)
    metrics, tokenizer = run.model.step_metrics, build_tokenizer()
    assert metrics["prefix_cache/saved_tokens"] > 0 and metrics["speculation/length"] > 0
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4
    assert "up to 3 turns" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert metrics["environment/turns"] > 1.5
    for step in range(4):
        lines = (tmp_path / "rollouts" / f"step-{step:08d}.jsonl").read_text("utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        assert len(records) == 8
        for record in records:
            text = tokenizer.decode(record["completion_ids"])
            for turn in record["turns"]:  # texts are without special tokens
                assert turn in record["completion"]
            between = text.count("<|user|>no<|end|><|assistant|>") + sum(
                text.count(f"<|user|>{digit}<|end|><|assistant|>") for digit in range(10)
            )
            assert between == len(record["turns"]) - 1
