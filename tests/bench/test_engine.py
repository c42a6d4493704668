import json

import pytest

from lit_specrl.bench.command import bench_command
from lit_specrl.bench.engine import bench_engine

WAYS = [
    "this library",
    "LLM.generate",
    "LLM.generate, no seeds",
    "LLM.generate, no seeds, no log-probs",
    "LLM.generate, vLLM's sampler",
]


def test_both_loops_are_measured_on_the_same_work(tmp_path, capsys):
    options = "--rows 6 --tokens 9 --repeats 1 --device cpu --dtype float32 --json"
    bench_command(["engine", *options.split(), str(tmp_path / "numbers.json")])
    report = json.loads((tmp_path / "numbers.json").read_text())
    rows = {row["way"]: row for row in report["tables"]["generation"]}
    assert list(rows) == WAYS
    for row in rows.values():
        assert 0 < row["host_us_per_row_and_step"] < row["processor_us_per_token"]
        assert row["tokens_per_second"] > 0
    ours = rows["this library"]
    assert (ours["processor_time_ratio"], ours["speed_ratio"]) == (1, 1)
    for row in rows.values():
        ratio = ours["processor_us_per_token"] / row["processor_us_per_token"]
        assert row["processor_time_ratio"] == pytest.approx(ratio)
    (reuse,) = report["tables"]["reuse"]
    assert reuse["share_of_generation"] == pytest.approx(reuse["verification_seconds"] / reuse["generation_seconds"])
    (around,) = report["tables"]["around a rollout"]
    assert around["weight_sync_seconds"] > 0
    assert around["sleep_seconds"] is None
    assert "one layer of width 64" in capsys.readouterr().out


def test_it_takes_a_model_of_ones_own(tiny_model):
    report = bench_engine(tiny_model, rows=2, tokens=3, dtype="float32", repeats=1, device="cpu")
    assert report.settings["model"] == tiny_model


def test_nothing_to_measure_is_refused():
    with pytest.raises(ValueError, match="--rows must be at least 1, got 0"):
        bench_engine(rows=0)
