from itertools import combinations
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader
from training import grpo, make_trainer

from lit_specrl.algorithms import evaluator
from lit_specrl.algorithms.evaluation import AccuracyMeter, maj_at_k, mean_at_k, normalise_answer, pass_at_k
from lit_specrl.algorithms.evaluator import Evaluator, prediction_records
from lit_specrl.types import PromptBatch


def test_mean_at_k():
    assert mean_at_k([1.0, 0.0, 0.5, 0.0]) == 0.375


@pytest.mark.parametrize("num_correct", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_is_the_share_of_draws_with_a_correct_response(num_correct, k):
    responses = [1] * num_correct + [0] * (5 - num_correct)
    draws = list(combinations(responses, k))
    assert pass_at_k(5, num_correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 1, 5), "k must lie between 1 and num_samples=4, got 5; sample more responses"),
        ((4, 1, 0), "k must lie between 1 and num_samples=4, got 0"),
        ((4, 5, 1), "num_correct must lie between 0 and num_samples=4, got 5"),
    ],
)
def test_pass_at_k_refuses_impossible_counts(arguments, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(*arguments)


@pytest.mark.parametrize(
    ("correct", "answers", "expected"),
    [
        ([1.0, 0.0, 1.0], ["7", "8", "7"], 1.0),
        ([0.0, 0.0, 1.0], ["8", "8", "7"], 0.0),
        ([1.0, 0.0], ["7", "8"], 0.5),
        ([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], ["7", "7", "8", "8", "9", "9", "6"], 1 / 3),
        ([1.0, 1.0, 0.0], ["7", " 7.0", "8"], 1.0),
        ([1.0, 0.0, 0.0, 0.0], ["7", None, None, None], 1.0),
        ([0.0, 0.0], [None, None], 0.0),
        ([1.0, 0.0, 0.0], ["7", "7", "8"], 0.5),
    ],
    ids=["agreed", "outvoted", "tie", "three-way tie", "spellings", "abstentions", "nobody votes", "unequal verdicts"],
)
def test_maj_at_k(correct, answers, expected):
    assert maj_at_k(correct, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("7", "7"), ("+7.00", "7"), (" 1,234 ", "1234"), ("0.50", "0.5"), ("-3.", "-3"), ("12,34", "12,34"), ("$x + 1$.", "x+1"),
     ("100", "100"), ("x = 1.0", "x=1.0"), ("(A)", "(A)")],
)  # fmt: skip
def test_normalise_answer(answer, expected):
    assert normalise_answer(answer) == expected


def test_meter_reports_each_source_and_the_mean_over_all_prompts():
    meter = AccuracyMeter(["easy", "hard", "unused"], num_generations=4, pass_ks=[2])
    meter.update("easy", [1.0, 1.0, 0.0, 0.0], ["7", "7", "8", "9"])
    meter.update("easy", [0.0, 0.0, 0.0, 0.0], ["1", "2", None, "3"])
    meter.update("hard", [0.0, 1.0, 0.0, 0.0], ["5", "6", "5", "5"])
    assert meter.compute() == {
        "val-core/easy/acc/mean@4": pytest.approx(0.25),
        "val-core/easy/acc/maj@4": pytest.approx(0.5),
        "val-core/easy/acc/pass@2": pytest.approx(5 / 12),
        "val-core/easy/acc/pass@4": pytest.approx(0.5),
        "val-core/hard/acc/mean@4": pytest.approx(0.25),
        "val-core/hard/acc/maj@4": pytest.approx(0.0),
        "val-core/hard/acc/pass@2": pytest.approx(0.5),
        "val-core/hard/acc/pass@4": pytest.approx(1.0),
        "val_accuracy": pytest.approx(0.25),
    }


def test_ranks_with_unequal_numbers_of_prompts_combine_as_one():
    """A mean of the ranks' means would give 0.5."""
    here, there = AccuracyMeter(["a"], 1), AccuracyMeter(["a"], 1)
    here.update("a", [1.0], ["x"])
    there.update("a", [0.0], ["x"])
    there.update("a", [0.0], ["x"])
    here.distributed_available_fn = lambda: True
    here.dist_sync_fn = lambda state, group: [state, there.counts if state is here.counts else there.sums]
    assert here.compute()["val_accuracy"] == pytest.approx(1 / 3)


def test_reset_forgets():
    meter = AccuracyMeter(["a"], 1)
    meter.update("a", [1.0], ["x"])
    meter.reset()
    meter.update("a", [0.0], ["x"])
    assert meter.compute()["val_accuracy"] == 0.0


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_a_meter_without_prompts_reports_nothing():
    assert AccuracyMeter(["a"], 1).compute() == {}


def test_wrong_updates_are_refused():
    meter = AccuracyMeter(["a"], num_generations=2)
    with pytest.raises(ValueError, match=r"unknown source 'b'; expected one of \['a'\]"):
        meter.update("b", [1.0, 0.0], [None, None])
    with pytest.raises(
        ValueError, match=r"expected num_generations=2 responses for each prompt, got 1 values and 2 answers"
    ):
        meter.update("a", [1.0], [None, None])
    with pytest.raises(ValueError, match=r"pass_ks must lie between 1 and num_generations=2, got \[4\]"):
        AccuracyMeter(["a"], 2, pass_ks=[4])


def test_prompts_that_the_reward_does_not_apply_to_do_not_count():
    judged = Evaluator(Judge())
    judged.update(seen(["a", "b", "a"], [1.0, 0.0, None, None, None, 1.0], 2))
    with pytest.warns(UserWarning, match="1 prompts of this evaluation have no score: 'judge', the first reward"):
        found = judged.compute(torch.device("cpu"))
    assert found["val_accuracy"] == 0.5
    assert not [name for name in found if name.startswith("val-core/b/")]


class Judge:
    name = "judge"


def seen(sources, scores, num_generations=1):
    return SimpleNamespace(
        request=SimpleNamespace(sampling=SimpleNamespace(num_generations=num_generations)),
        prompts=SimpleNamespace(sources=sources),
        rewards={"judge": scores},
        said=["x"] * len(scores),
    )


def test_ranks_need_not_have_seen_the_same_sources(monkeypatch):
    """Nor anything at all."""
    here, there = Evaluator(Judge()), Evaluator(Judge())
    there.update(seen(["b"], [1.0, 0.0], 2))
    kinds = []
    monkeypatch.setattr(evaluator, "gather_objects", lambda own: [own, *kinds] if isinstance(own, set) else [own])
    kinds.append({(2, "b")})
    assert here.compute(torch.device("cpu")) == {}
    assert there.compute(torch.device("cpu"))["val-core/b/acc/mean@2"] == 0.5


def test_a_data_module_of_ones_own_can_validate(tiny_model):
    """Its loaders give prompts, and know of nothing else."""

    class Own(L.LightningDataModule):
        def val_dataloader(self):
            return DataLoader([self.batch("a", "b"), self.batch("c")], batch_size=None)

        predict_dataloader = val_dataloader

        def batch(self, *sources):
            ids = [[20 + place, 21] for place, _ in enumerate(sources)]
            return PromptBatch(
                [f"u{source}" for source in sources], ids, ["q"] * len(ids), ["5"] * len(ids), [*sources]
            )

    module = grpo(tiny_model)
    make_trainer().validate(module, datamodule=Own(), verbose=False)
    assert {name.split("/")[1] for name in module.evaluation if "/" in name} == {"a", "b", "c"}


def test_predictions_have_the_further_columns_of_the_data():
    batch = PromptBatch(["u"], [[20]], ["q"], ["5"], ["a"], columns=[{"level": 3, "prompt": "of the data"}])
    rollouts = SimpleNamespace(
        prompts=batch,
        request=SimpleNamespace(prompt_index=lambda row: 0),
        num_rows=1,
        texts=["x"],
        policy_lengths=[1],
        finish_reasons=["stop"],
        episodes=[],
    )
    (record,) = prediction_records(batch, rollouts)
    assert record["level"] == 3 and record["prompt"] == "q" and record["completion"] == "x"
    assert record["data_prompt"] == "of the data"
    batch.columns = []
    assert prediction_records(batch, rollouts)[0].keys() == record.keys() - {"level", "data_prompt"}
