import pytest

from lit_specrl.bench.prefix_cache import bench_prefix_cache


def test_memory_is_what_the_rows_take():
    report = bench_prefix_cache(rows=200, tokens=500, repeats=2)
    (memory,) = report.tables["memory"]
    assert memory["in_memory_MB"] == pytest.approx(memory["counted_MB"], rel=0.1)
    assert memory["file_MB"] == pytest.approx(200 * 500 * 12 / 1e6, rel=0.1)
    assert [row["operation"] for row in report.tables["time"]] == ["store", "look up", "write file", "read file"]
    assert all(0 < row["seconds_min"] <= row["seconds_median"] <= row["seconds_max"] for row in report.tables["time"])


def test_nothing_to_measure_is_refused():
    with pytest.raises(ValueError, match="--rows must be at least 1, got 0"):
        bench_prefix_cache(rows=0)
