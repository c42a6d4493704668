from types import SimpleNamespace

import pytest

from lit_specrl.timing import StageTimer


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until the test moves `now`, in seconds."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("lit_specrl.timing.time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_seconds_add_up_by_stage_until_they_are_taken_out(clock):
    timer = StageTimer()
    for stage, elapsed_s in [("gen", 2.0), ("reward", 0.5), ("gen", 1.0)]:
        with timer(stage):
            clock.now += elapsed_s
        clock.now += 10  # between the stages
    assert timer.pop() == {"gen": 3.0, "reward": 0.5}
    assert timer.pop() == {}


def test_a_stage_that_fails_is_counted(clock):
    timer = StageTimer()

    def fail():
        with timer("gen"):
            clock.now += 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert timer.pop() == {"gen": 2.0}


def test_a_stage_lasts_until_its_kernels_are_done(clock, monkeypatch):
    def synchronize():
        clock.now += 5

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", synchronize)
    timer = StageTimer()
    with timer("update_actor"):
        clock.now += 1
    assert timer.pop() == {"update_actor": 6.0}
