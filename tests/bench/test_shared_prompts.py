import re
import statistics

import pytest
import torch
from lightning.pytorch.plugins.precision import Precision

from lit_specrl.bench import shared_prompts
from lit_specrl.bench.shared_prompts import bench_shared_prompts, random_step, training_pass
from lit_specrl.models.micro_batches import plan_micro_batches
from lit_specrl.models.policy import Policy

SMALL = {"prompts": 2, "num_generations": 3, "precision": "32-true", "device": "cpu", "repeats": 2}


@pytest.fixture(autouse=True)
def default_allocator(monkeypatch):
    """The setting would stay with the process of the tests."""
    calls = []
    monkeypatch.setattr(shared_prompts, "keep_freed_memory", lambda: calls.append(True))
    return calls


@pytest.fixture
def report(tiny_model):
    return bench_shared_prompts(tiny_model, lengths="20/10,4/30", budgets="60,200", **SMALL)


def test_every_length_is_measured_both_ways_with_every_budget(report, default_allocator):
    rows = report.tables["measured"]
    assert [(row["lengths"], row["budget"], row["prompts"]) for row in rows] == [
        (lengths, budget, way) for lengths in ("20/10", "4/30") for budget in (60, 200) for way in ("apart", "shared")
    ]
    assert all(0 < row["seconds_min"] <= row["seconds_median"] <= row["seconds_max"] for row in rows)
    assert default_allocator == [True]


def test_shared_rows_tells_where_sharing_was_not_worth_it(report):
    shared_rows = {
        (row["lengths"], row["budget"], row["prompts"]): row["shared_rows"] for row in report.tables["measured"]
    }
    assert shared_rows["20/10", 200, "shared"] == 6
    assert shared_rows["4/30", 200, "shared"] == 0  # saves 16 of 204 tokens, less than a tenth
    assert shared_rows["20/10", 200, "apart"] == 0


def test_sharing_changes_no_logprob(report):
    differences = [row["relative_logprob_difference"] for row in report.tables["compared"]]
    assert max(differences) < 1e-5


def test_sharing_that_changes_logprobs_is_seen(tiny_model, monkeypatch):
    """Every log-prob of a pass with shared prompts is 10 % too low."""
    plain_forward = Policy.forward

    def forward(self, *arguments, share_prompts=False, **options):
        out = plain_forward(self, *arguments, share_prompts=share_prompts, **options)
        return out._replace(logprobs=out.logprobs * 1.1) if share_prompts else out

    monkeypatch.setattr(Policy, "forward", forward)
    report = bench_shared_prompts(tiny_model, lengths="20/10", budgets="200", **SMALL)
    assert report.tables["compared"][0]["relative_logprob_difference"] > 0.1  # of the mean; the largest is above it


def test_the_ratio_is_that_of_medians_at_the_best_budgets(tiny_model, monkeypatch):
    """The clock gives each pass the seconds written here; passes alternate between not shared and shared."""
    seconds = [50.0, 50.0, 50.0, 50.0]  # warm-up
    seconds += [8.0, 4.0, 6.0, 3.0]
    seconds += [8.0, 4.0, 9.0, 1.0]
    seconds += [7.0, 9.0, 6.0, 2.0]
    clock = iter([moment for elapsed_s in seconds for moment in (0.0, elapsed_s)])
    monkeypatch.setattr(shared_prompts.time, "perf_counter", lambda: next(clock))
    report = bench_shared_prompts(tiny_model, lengths="20/10", budgets="60,200", **{**SMALL, "repeats": 3})
    assert [row["seconds_median"] for row in report.tables["measured"]] == [8.0, 4.0, 6.0, 2.0]
    [compared] = report.tables["compared"]
    assert compared["time_without_over_with"] == statistics.median([6, 9, 6]) / statistics.median([3, 1, 2])
    assert (compared["budget_without"], compared["budget_with"]) == (200, 200)


def test_progress_is_told_on_stderr(tiny_model, capsys):
    bench_shared_prompts(tiny_model, lengths="20/10", budgets="200", **{**SMALL, "repeats": 1})
    lines = [re.sub(r"\d+\.\d\d s", "t s", line) for line in capsys.readouterr().err.splitlines() if "20/10" in line]
    assert lines == [
        "20/10, apart, budget 200, warm-up: t s",
        "20/10, shared, budget 200, warm-up: t s",
        "20/10, apart, budget 200, repeat 1 of 1: t s",
        "20/10, shared, budget 200, repeat 1 of 1: t s",
    ]


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_passes_run_in_the_precision_asked_for(tiny_model, monkeypatch, precision):
    in_autocast = []
    plain_forward = Policy.forward

    def forward(self, *arguments, **options):
        if "share_prompts" in options:  # not the check of a new policy
            in_autocast.append(torch.is_autocast_enabled("cpu"))
        return plain_forward(self, *arguments, **options)

    monkeypatch.setattr(Policy, "forward", forward)
    bench_shared_prompts(tiny_model, lengths="20/10", budgets="200", **{**SMALL, "precision": precision})
    assert set(in_autocast) == {precision == "bf16-mixed"}


def test_a_pass_leaves_the_policy_gradient_of_the_whole_step(tiny_model):
    """However the rows are cut, and with prompts shared or not."""
    policy = Policy.build(tiny_model)
    step = random_step(num_prompts=2, num_generations=3, prompt_length=20, response_length=10, vocab_size=128)
    gradients = []
    for budget, share in [(10_000, False), (60, False), (200, True)]:
        plan = plan_micro_batches(
            step.prompt_index.tolist(), step.prompt_lengths.tolist(), step.response_lengths.tolist(), budget, share
        )
        training_pass(policy, step, plan, Precision())
        gradients.append({name: weight.grad.clone() for name, weight in policy.named_parameters()})
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)  # sums in another order
    assert any(gradient.count_nonzero() for gradient in gradients[0].values())


def test_random_steps_have_the_lengths_asked_for():
    step = random_step(num_prompts=3, num_generations=40, prompt_length=7, response_length=20, vocab_size=50)
    assert step.prompt_lengths.tolist() == [7] * 120
    assert (int(step.response_lengths.min()), int(step.response_lengths.max())) == (14, 26)
    assert abs(float(step.response_lengths.float().mean()) - 20) < 1
    assert step.prompt_index.bincount().tolist() == [40, 40, 40]
    again = random_step(num_prompts=3, num_generations=40, prompt_length=7, response_length=20, vocab_size=50)
    assert torch.equal(step.response_ids, again.response_ids)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lengths": "59-27"},
            "--lengths must be PROMPT/RESPONSE pairs of token counts such as 59/27,200/200, got '59-27'",
        ),
        ({"lengths": "0/5"}, "--lengths must be PROMPT/RESPONSE pairs"),
        (
            {"lengths": "100/200"},
            "--lengths 100/200: rows of up to 360 tokens do not fit the 256 positions of the model",
        ),
        ({"budgets": "2k"}, "--budgets must be token counts such as 2048,4096, got '2k'"),
        ({"prompts": 0}, "--prompts must be at least 1, got 0"),
        ({"num_generations": -1}, "--num_generations must be at least 1, got -1"),
        ({"repeats": 0}, "--repeats must be at least 1, got 0"),
        ({"model": "/nowhere"}, "model '/nowhere' is neither a folder"),
    ],
)
def test_wrong_settings_are_named(tiny_model, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        bench_shared_prompts(**{"model": tiny_model, "lengths": "20/10", **SMALL, **settings})
