import json
import re
import statistics

import pytest
import torch

from lit_specrl.bench import logprobs
from lit_specrl.bench.logprobs import IMPLEMENTATIONS, Problem, bench_logprobs, plain_logprobs
from lit_specrl.models.logprobs import token_logprobs

TINY = {"vocab_size": 400, "num_tokens": 50, "hidden_size": 16, "device": "cpu", "repeats": 2}


def logprobs_with_a_forgotten_token(hidden, head, targets):
    """Right values; the gradient of the last token is missing."""
    values, entropy = token_logprobs(hidden, head, targets)
    return torch.cat([values[:-1], values[-1:].detach()]), entropy


@pytest.fixture(scope="module")
def report():
    return bench_logprobs(**TINY)


def test_both_versions_are_measured(report):
    rows = report.tables["measured"]
    assert [row["version"] for row in rows] == ["chunked", "plain"]
    for row in rows:
        assert list(row) == ["version", "peak_extra_mib", "seconds_min", "seconds_median", "seconds_max"]
        assert row["peak_extra_mib"] >= 0
        assert 0 < row["seconds_min"] <= row["seconds_median"] <= row["seconds_max"]
    assert report.settings == {"benchmark": "logprobs", **TINY, "dtype": "float32", "keep_freed_memory": False}
    assert (report.notes, report.failures) == ([], [])


def test_ratios_are_quotients_of_the_measured_numbers(monkeypatch):
    """Three passes of each version, with numbers that can be divided by head."""
    passes = {"chunked": [3.0, 2.0, 9.0], "plain": [4.0, 1.0, 5.0]}
    gradients = {"hidden": torch.tensor([3.0, 4.0]), "head": torch.tensor([5.0])}
    nearby = {"hidden": torch.tensor([3.0, 4.0]), "head": torch.tensor([5.0005])}
    measured = {
        "chunked": logprobs._Measurement(2 * 2**20, passes["chunked"], nearby),
        "plain": logprobs._Measurement(16 * 2**20, passes["plain"], gradients),
    }
    monkeypatch.setattr(logprobs, "_measure", lambda problem, repeats: (measured, None))
    report = bench_logprobs(**TINY)
    assert [row["seconds_median"] for row in report.tables["measured"]] == [3.0, 4.0]
    [compared] = report.tables["compared"]
    assert compared == {
        "memory_plain_over_chunked": 8.0,
        "time_chunked_over_plain": 0.75,
        "hidden_gradient_difference": 0.0,
        "head_gradient_difference": pytest.approx(1e-4, rel=1e-2),
    }
    assert statistics.median(passes["plain"]) == 4.0


def test_gradients_of_the_library_are_those_of_full_logits(report):
    [compared] = report.tables["compared"]
    assert compared["hidden_gradient_difference"] < 1e-6
    assert compared["head_gradient_difference"] < 1e-6


def test_a_missing_gradient_is_a_failure(monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "chunked", logprobs_with_a_forgotten_token)
    report = bench_logprobs(**TINY)
    assert [failure.split(" differ")[0] for failure in report.failures] == [
        "the gradients of hidden",
        "the gradients of head",
    ]


def test_a_gradient_that_is_not_a_number_is_a_failure(monkeypatch):
    gradients = {"hidden": torch.ones(2), "head": torch.ones(2)}
    broken = {"hidden": torch.tensor([1.0, torch.nan]), "head": torch.ones(2)}
    measured = {
        "chunked": logprobs._Measurement(1, [1.0], broken),
        "plain": logprobs._Measurement(1, [1.0], gradients),
    }
    monkeypatch.setattr(logprobs, "_measure", lambda problem, repeats: (measured, None))
    assert bench_logprobs(**TINY).failures == ["the gradients of hidden differ by nan of their norm"]


def test_peak_memory_is_that_of_the_logits_held():
    """25 MB of logits in three copies; in processes of their own, because a peak includes what was there before."""
    with logprobs._worker(problem := Problem(50_000, 128, 8, "float32", "cpu", False)) as worker:
        measured = logprobs._first_pass({"plain": worker}, "plain", problem)
    copies = 3 * 4 * 50_000 * 128
    # below: the kernel counts resident pages in batches; above: the addend to the head's gradient, the matrix library
    assert 0.99 * copies < measured.peak_extra_bytes < 1.4 * copies


def test_a_plain_version_that_does_not_fit_is_left_out_and_said_so(monkeypatch):
    monkeypatch.setattr(logprobs, "_free_bytes", lambda device: 2**28)
    report = bench_logprobs(**TINY)
    assert report.tables["measured"][1] == {
        "version": "plain",
        **dict.fromkeys(["peak_extra_mib", "seconds_min", "seconds_median", "seconds_max"]),
    }
    assert "compared" not in report.tables
    assert report.tables["measured"][0]["seconds_median"] > 0
    assert report.notes == [
        "The plain version was not run: it needs 0.5 GiB, and 0.2 GiB are free. "
        "Take fewer tokens with --num_tokens to compare the two."
    ]


def test_the_need_of_the_plain_version_counts_three_copies_of_the_logits():
    problem = Problem(150_000, 8192, 576, "float32", "cpu", False)
    logits, head = 4 * 150_000 * 8192, 4 * 150_000 * 576
    assert problem.plain_bytes == 3 * logits + 3 * head + 2**29


def test_plain_values_are_those_of_the_library():
    inputs = Problem(33, 7, 16, "float32", "cpu", False).inputs()
    for ours, plain in zip(token_logprobs(*inputs[:3]), plain_logprobs(*inputs[:3]), strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("name", ["vocab_size", "num_tokens", "hidden_size", "repeats"])
def test_a_size_below_one_is_refused(name):
    with pytest.raises(ValueError, match=re.escape(f"--{name} must be at least 1, got 0")):
        bench_logprobs(**{**TINY, name: 0})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="--device cuda: torch finds no GPU here; use cpu"):
        bench_logprobs(**{**TINY, "device": "cuda"})


def test_a_process_that_the_system_ends_is_explained(monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "plain", end_the_process)
    with pytest.raises(ValueError, match="the system ended a measuring process, most likely for want of memory"):
        bench_logprobs(**TINY)


def end_the_process(hidden, head, targets):
    import os

    os._exit(9)


def test_the_report_can_be_written_as_json(report):
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()
