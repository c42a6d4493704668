import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lit_specrl.rewards import checker_pool
from lit_specrl.rewards.checker_pool import CheckerPool

PROJECT = Path(__file__).parents[2]
HANG = "9^{9^{9}}"

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def pool():
    pool = CheckerPool(num_workers=2, timeout_s=1.0)
    yield pool
    pool.close()


def warm(pool):
    """Call until every checker is ready: one that is quick to start may do all the work of a first call."""
    pool.check([("1", "2-1")] * 2)
    while any(checker.is_starting for checker in pool._checkers):
        pool.check([("1", "2-1")] * 2)


def process_ids(pool):
    return [checker.process.pid for checker in pool._checkers]


def is_running(process_id):
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def ends_within(process_id, limit_s):
    deadline = time.monotonic() + limit_s
    while is_running(process_id) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(process_id)


def test_verdicts_come_in_order(pool):
    pairs = [(str(n), f"{n - 1} + 1" if n % 2 else f"{n} + 1") for n in range(20)]
    assert pool.check(pairs) == ["wrong", "right"] * 10
    assert pool.check([]) == []


def test_checkers_start_at_the_first_call_and_stay(pool):
    assert process_ids(pool) == []
    pool.check([("1", "2-1")])
    (first,) = process_ids(pool)
    pool.check([("1", "2-1")] * 4)
    assert first in process_ids(pool)
    assert len(process_ids(pool)) == 2


def test_a_hung_pair_delays_the_others_by_nothing_beyond_its_own_deadline(pool):
    warm(pool)
    before = process_ids(pool)
    started_at = time.monotonic()
    verdicts = pool.check([("1", HANG)] + [("1", "2-1")] * 50)
    assert verdicts == ["timeout"] + ["right"] * 50
    assert 0.9 < time.monotonic() - started_at < 4.0
    assert [is_running(process_id) for process_id in before].count(True) == 1


def test_a_checker_that_stops_responding_altogether_is_killed_by_the_pool(pool, monkeypatch):
    monkeypatch.setattr(checker_pool, "KILL_GRACE_S", -0.5)  # the pool comes before the checker's own alarm
    warm(pool)
    for process_id in process_ids(pool):
        os.kill(process_id, signal.SIGSTOP)
    assert pool.check([("1", "2-1")] * 2) == ["timeout", "timeout"]
    monkeypatch.undo()
    assert pool.check([("1", "2-1")] * 2) == ["right", "right"]


def test_a_checker_that_became_ready_between_calls_is_taken_up_however_late(pool, monkeypatch):
    """One of two can do all the work of a call while the other still starts; its word "ready" is read in a later
    call."""
    monkeypatch.setattr(checker_pool, "START_LIMIT_S", 3.0)
    pool.check([("1", "2-1")])
    pool.check([("1", "2-1")] * 2)
    time.sleep(3.5)
    assert pool.check([("1", "2-1")] * 2) == ["right", "right"]


def test_checkers_that_died_between_calls_are_replaced(pool):
    pool.check([("1", "2-1")] * 2)
    for process_id in process_ids(pool):
        os.kill(process_id, signal.SIGKILL)
    assert pool.check([("1", "2-1")] * 3) == ["right"] * 3


def test_a_pair_that_brings_its_checker_down_twice_is_a_crash(pool, tmp_path, monkeypatch):
    script = Path(checker_pool.__file__).with_name("math_checker.py").read_text()
    dying = script.replace(
        "verdict = judge(*json.loads(request))", "os._exit(3) if b'die' in request else None; verdict = 'right'"
    )
    assert dying != script
    (tmp_path / "math_checker.py").write_text(dying)
    monkeypatch.setattr(checker_pool, "__file__", str(tmp_path / "checker_pool.py"))
    assert pool.check([("1", "die"), ("1", "1"), ("1", "1")]) == ["crash", "right", "right"]


def test_a_checker_that_cannot_start_says_why(pool, tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no antlr here')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match="did not start: ImportError: no antlr here"):
        pool.check([("1", "2-1")])
    assert process_ids(pool) == []


def test_checkers_that_never_become_ready_are_given_up(pool, tmp_path, monkeypatch):
    (tmp_path / "math_checker.py").write_text("raise SystemExit(1)")
    monkeypatch.setattr(checker_pool, "__file__", str(tmp_path / "checker_pool.py"))
    with pytest.raises(RuntimeError, match="4 answer checkers ended before they were ready"):
        pool.check([("1", "2-1")])
    assert process_ids(pool) == []


def test_an_interrupted_call_leaves_no_stale_verdicts(pool, monkeypatch):
    pool.check([("1", "2-1")] * 2)
    with monkeypatch.context() as patch:
        patch.setattr(CheckerPool, "_wait", lambda self, selector: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pool.check([("1", "2"), ("1", "3")])
    assert pool.check([("1", "2-1")] * 2) == ["right", "right"]


def test_it_works_from_several_threads(pool):
    verdicts = {}

    def check(number):
        verdicts[number] = pool.check([(str(number), f"{number - 1} + 1")] * 3)

    threads = [threading.Thread(target=check, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {number: ["right"] * 3 for number in range(4)}


def test_memory_of_a_checker_is_limited(pool):
    """Repeated squaring in C would take tens of gigabytes if it were allowed to."""
    pool.check([("1", "2-1")])
    limits = Path(f"/proc/{process_ids(pool)[0]}/limits").read_text()
    assert f"Max address space         {4 * 2**30}" in limits


def test_closing_ends_the_checkers(pool):
    pool.check([("1", "2-1")] * 2)
    ended = process_ids(pool)
    pool.close()
    assert not any(is_running(process_id) for process_id in ended)
    assert pool.check([("1", "2-1")]) == ["right"]


def test_dropping_the_pool_ends_the_checkers():
    pool = CheckerPool()
    warm(pool)
    ended = process_ids(pool)
    del pool
    assert not any(is_running(process_id) for process_id in ended)


def run_script(tmp_path, body):
    script = tmp_path / "script.py"
    script.write_text(body)
    return subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )


def test_a_script_without_main_guard_runs_once_and_its_checkers_do_not_load_what_it_loads(tmp_path):
    (tmp_path / "heavy_module.py").write_text("")
    body = """
import heavy_module
from lit_specrl.rewards import MathReward
print("started")
reward = MathReward()
print(reward(["q"], ["1 + x"], answer=["x + 1"]))
maps = [open(f"/proc/{c.process.pid}/maps").read() for c in reward.pool._checkers]
print([any(name in text for name in ("libtorch", "tokenizers")) for text in maps])
print(*[c.process.pid for c in reward.pool._checkers])
"""
    process = run_script(tmp_path, body)
    lines = process.communicate(timeout=50)[0].splitlines()
    assert lines[:3] == ["started", "[1.0]", "[False]"]
    assert not (tmp_path / "__pycache__" / "script.cpython-311.pyc").exists()
    assert ends_within(int(lines[3]), 5.0)


@pytest.mark.parametrize("busy", [False, True])
def test_checkers_end_when_the_parent_is_killed(tmp_path, busy):
    """A hung checker computes in C, where no thread or handler of its own gets a turn: its alarm ends it."""
    body = f"""
import threading, time
from lit_specrl.rewards.checker_pool import CheckerPool
pool = CheckerPool(num_workers=2, timeout_s=2.0)
pool.check([("1", "2-1")] * 2)
print(*[c.process.pid for c in pool._checkers], flush=True)
pool.check([("1", "{HANG}")] * 2) if {busy} else time.sleep(60)
"""
    process = run_script(tmp_path, body)
    process_ids = [int(word) for word in process.stdout.readline().split()]
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(process_ids) == 2
    assert all(ends_within(process_id, 10.0) for process_id in process_ids)


def test_a_forked_child_starts_checkers_of_its_own(pool):
    pool.check([("1", "2-1")] * 2)
    before = process_ids(pool)
    child = os.fork()
    if child == 0:
        verdicts = pool.check([("1", "3-2")])
        is_separate = not set(before) & set(process_ids(pool))
        pool.close()
        os._exit(0 if verdicts == ["right"] and is_separate else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert process_ids(pool) == before
    assert all(is_running(process_id) for process_id in before)
    assert pool.check([("1", "2-1")] * 2) == ["right", "right"]


@pytest.mark.parametrize(
    ("settings", "message"), [({"num_workers": 0}, "num_workers"), ({"timeout_s": 0}, "timeout_s")]
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"{message} must be"):
        CheckerPool(**settings)


def test_the_rewards_import_nothing_heavy():
    command = "import sys, lit_specrl.rewards; print([m for m in ('torch', 'transformers', 'math_verify', 'sympy') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, cwd=PROJECT, check=True, timeout=50
    )
    assert done.stdout.strip() == "[]"
