"""The tables of the speculation benchmark, from a tiny model."""

import pytest

from lit_specrl.bench.speculation import _plain_engine, bench_speculation


@pytest.mark.parametrize("drafter", ["history", "model"])
def test_every_way_of_drafting_is_timed(tiny_model, drafter):
    model = tiny_model if drafter == "model" else None
    report = bench_speculation(tiny_model, drafter, model, rows=4, tokens=16, dtype="float32", repeats=1, device="cpu")
    batches, drain, lengths, by_age, *epochs = report.tables.values()
    assert [row["active_requests"] for row in batches] == [row["active_requests"] for row in lengths] == [1, 4]
    for row in batches:
        assert row["off_over_plain"] == pytest.approx(row["drafting_0"] / row["plain"])
        assert min(row["plain"], row["drafting_1"], row["drafting_3"]) > 0
    assert [row["run"] for row in drain] == [
        "plain",
        "drafting 0",
        "drafting 1",
        "drafting 3",
        "adaptive, first",
        "adaptive",
        *(["adaptive, one length"] if drafter == "history" else []),
    ]
    assert all(0 < row["seconds_min"] <= row["seconds_median"] <= row["seconds_max"] for row in drain)
    assert drain[0]["speed_over_plain"] == 1
    assert "drafted tokens" in report.notes[0]
    assert [row["age_from"] for row in by_age] == [0]
    assert by_age[0]["drafted"] >= by_age[0]["accepted"]
    if drafter == "history":
        ways = ["drafting 0", "adaptive", "adaptive, one length"]
        assert {(row["epoch"], row["way"]) for row in epochs[0]} == {
            (epoch, way) for epoch in ("first epoch", "later epoch") for way in ways
        }
        assert all(row["tokens_a_row_and_step"] >= 1 for row in epochs[0])
        assert all(row["accepted_past"] == 0 for row in epochs[0] if row["epoch"] == "first epoch")
    else:
        assert not epochs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drafter": "model"}, "--draft_model belongs to --drafter model and eagle3, and is needed there"),
        ({"draft_model": "some"}, "--draft_model belongs to --drafter model"),
        ({"rows": 0}, "--rows must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_timed_is_refused(tiny_model, options, message):
    with pytest.raises(ValueError, match=message):
        bench_speculation(tiny_model, **options)


def test_an_engine_that_fails_in_its_process_is_reported():
    engine = _plain_engine("/no/such/model", 4, 16, "float32", "cpu")
    with pytest.raises(RuntimeError, match="the engine without a drafter has failed"), engine as plain:
        plain("said")
