"""The examples of docs/extending.md, as they stand there, through the command line."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from training import write_questions

from lit_specrl.cli.fit import train

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLES, ENVIRONMENTS = (
    dict(
        re.findall(
            r"^## (.+?)\n.*?```python\n(.*?```.*?```yaml\n.*?)```",
            (DOCS / page).read_text(),
            flags=re.MULTILINE | re.DOTALL,
        )
    )
    for page in ("extending.md", "environments.md")
)
BASE = {
    "model": {
        "class_path": "GRPO",
        "init_args": {
            "rewards": ["my_plain_reward.characters"],
            "num_generations": 4,
            "max_completion_length": 8,
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        },
    },
    "trainer": {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "limit_val_batches": 0,
    },
}
PLAIN_REWARD = """
def characters(completions, **columns):
    return [len(set(text)) / 10 for text in completions]
"""


@pytest.fixture
def fit(tmp_path, monkeypatch, tiny_model):
    """Runs a configuration of the user's on top of a recipe, with the user's file beside it."""

    def run(python, block):
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        (tmp_path / "my_plain_reward.py").write_text(PLAIN_REWARD)
        name = re.match(r"# (my_\w+)\.py\n", python)[1]
        (tmp_path / f"{name}.py").write_text(python)
        data = {"train": write_questions(tmp_path / "q.jsonl"), "batch_size": 2, "max_prompt_length": 64}
        (tmp_path / "recipe.yaml").write_text(
            yaml.safe_dump({**BASE, "data": {"class_path": "PromptDataModule", "init_args": data}})
        )
        (tmp_path / "block.yaml").write_text(block)
        arguments = ["fit", "--config=recipe.yaml", "--config=block.yaml", f"--model.init_args.model={tiny_model}"]
        return train(arguments), sys.modules[name]

    return run


def example(title):
    python, block = (EXAMPLES | ENVIRONMENTS)[title].split("```", 1)
    return python, block.split("```yaml\n")[1]


def test_the_page_has_all_eight():
    assert list(EXAMPLES) == [
        "A loss",
        "An advantage estimator",
        "An acceptance rule",
        "A reuse policy",
        "A drafter that looks tokens up",
        "An engine",
        "A reward",
        "A prompt schedule",
    ]


@pytest.mark.parametrize("title", [*EXAMPLES, "An environment of your own"])
def test_an_example_has_at_most_15_lines(title):
    python, _ = example(title)
    assert len([line for line in python.splitlines() if line.strip()]) <= 15


def test_a_loss(fit):
    run, file = fit(*example("A loss"))
    loss = run.model.objective.policy_loss
    assert isinstance(loss, file.SAPO) and (loss.tau_positive, loss.tau_negative) == (1.0, 1.1)
    assert run.model.policy_version == 4 and run.model.step_metrics["actor/grad_norm"] > 0


def test_an_advantage_estimator(fit):
    run, file = fit(*example("An advantage estimator"))
    assert isinstance(run.model.advantage_estimator, file.BestOfGroup)
    assert run.model.advantage_estimator.margin == 0.1
    assert run.model.policy_version == 4 and run.model.step_metrics["actor/grad_norm"] > 0


def test_an_acceptance_rule(fit):
    run, file = fit(*example("An acceptance rule"))
    (cache,) = [callback for callback in run.trainer.callbacks if type(callback).__name__ == "PrefixCache"]
    assert isinstance(cache.rule, file.Threshold) and cache.rule.nats == 8.0
    assert run.model.step_metrics["prefix_cache/saved_tokens"] > 0


def test_a_reuse_policy(fit):
    run, file = fit(*example("A reuse policy"))
    (cache,) = [callback for callback in run.trainer.callbacks if type(callback).__name__ == "PrefixCache"]
    assert isinstance(cache.reuse_policy, file.Younger) and cache.reuse_policy.max_reuses == 2
    assert run.model.step_metrics["prefix_cache/offers/young"] == 1
    assert run.model.step_metrics["prefix_cache/saved_tokens"] > 0


def test_a_drafter(fit):
    run, file = fit(*example("A drafter that looks tokens up"))
    assert isinstance(run.model.engine.drafter, file.Stutter)
    assert 0 < run.model.step_metrics["speculation/length"] <= 2


def test_an_engine_under_fsdp2(fit):
    run, file = fit(*example("An engine"))
    engine = run.model.engine
    assert isinstance(engine, file.Parrot) and run.model.is_sharded
    assert engine.num_weights == len(list(run.model.policy.named_weights())) and engine.policy_version >= 3
    assert run.model.step_metrics["completions/mean_length"] == 2


def test_a_reward(fit):
    run, _ = fit(*example("A reward"))
    assert [reward.name for reward in run.model.rewards.rewards] == ["short"]
    assert 0 < run.model.step_metrics["rewards/short/mean"] < 1


def test_a_prompt_schedule(fit):
    run, file = fit(*example("A prompt schedule"))
    loader = run.trainer.train_dataloader
    lengths = sorted(prompt.columns["length"] for prompt in loader._scheduled)
    schedule = run.trainer.datamodule.schedule
    assert isinstance(schedule, file.Growing) and (schedule.start, schedule.step) == (4, 8)
    assert loader.num_prompts == 2 < len(lengths), "of the first epoch"
    assert loader.state_dict()["epoch"] >= 1


def test_an_environment(fit):
    run, file = fit(*example("An environment of your own"))
    assert isinstance(run.model.environment, file.Guess) and run.model.environment.left == 2
    assert run.model.worker.max_turns == 4 and run.model.policy_version == 4
    assert 1 <= run.model.step_metrics["environment/turns"] <= 2
    assert run.model.settings["environment"] == "Guess(left=2)"
