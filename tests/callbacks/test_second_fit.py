"""Callbacks that go through a second fit show and keep what is of it."""

import csv

import pytest
from lightning.pytorch.loggers import CSVLogger
from reuse_runs import GROUP, fit, grpo, questions
from training import small_tokens, variety

from lit_specrl import KLPenalty
from lit_specrl.callbacks import LoggerReport, PrefixCache, RunSummary


def test_the_table_is_of_one_run(tiny_model, tmp_path, capsys):
    summary = RunSummary()
    for epochs in (2, 1):
        fit(grpo(tiny_model), questions(tmp_path), summary, max_epochs=epochs)
    assert summary.num_steps == 2
    assert list(summary.rewards) == [0]
    tables = capsys.readouterr().out
    assert tables.index("4 steps") < tables.index("2 steps")


def test_a_full_cache_gives_way_to_the_rows_of_the_run_that_goes_on(tiny_model, tmp_path):
    """The steps of a new module count from 0 again."""
    texts = [["aa", "bb", "cc", "dd"], ["ee", "ff", "gg", "hh"]]
    cache = PrefixCache(acceptance="full")
    fit(grpo(tiny_model), questions(tmp_path, texts[0]), cache, max_epochs=4)
    cache.max_bytes = cache.store.max_bytes = cache.store.num_bytes
    trace = fit(grpo(tiny_model), questions(tmp_path, texts[1]), cache, max_epochs=3)
    assert trace.of_cache("hit_fraction")[2:] == pytest.approx([1.0] * 4, abs=2 / GROUP)
    assert all(age >= 0 for age in trace.of_cache("age"))


def test_a_moving_reference_leaves_no_log_probs_for_another_one(tiny_model, tmp_path):
    cache = PrefixCache(acceptance="full")
    moving = grpo(tiny_model, beta=0.1, kl=KLPenalty(sync_steps=1, mixup_alpha=1.0))
    fit(moving, questions(tmp_path), cache, max_epochs=2)
    assert all(row.reference_logprobs is None for row in cache.store)
    fit(grpo(tiny_model, beta=0.1), questions(tmp_path), cache, max_epochs=1)
    assert all(row.reference_logprobs is not None for row in cache.store)


def test_rewards_of_a_second_run_are_written_under_their_own_header(tiny_model, tmp_path):
    for rewards in ([small_tokens], [small_tokens, variety], [small_tokens, variety], [small_tokens]):
        logger = CSVLogger(tmp_path / "logs", name="run", version=0)
        fit(grpo(tiny_model, rewards), questions(tmp_path), LoggerReport(), logger=logger, max_epochs=1)
    folder = tmp_path / "logs" / "run" / "version_0"
    for name, num_steps in (("completions.1.csv", 2), ("completions.2.csv", 4), ("completions.csv", 2)):
        header, *rows = csv.reader((folder / name).open())
        assert {len(row) for row in rows} == {len(header)}
        assert len({tuple(row) for row in rows}) >= num_steps
