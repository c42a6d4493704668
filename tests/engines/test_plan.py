"""What an engine is given of a device, and what it gives back; on a GPU, which is stood in for by its numbers."""

import logging
from types import SimpleNamespace

import pytest
import torch

from lit_specrl.algorithms.run_checks import max_rows_of_run
from lit_specrl.engines import VLLMEngine
from lit_specrl.engines.vllm.plan import rows_at_once, sleep_level
from lit_specrl.engines.vllm.startup_log import told_by_vllm
from lit_specrl.types import SamplingConfig

GIB = 2**30


@pytest.mark.parametrize(
    ("engine_bytes", "training_bytes", "handed_over", "level"),
    [
        (40, 45, True, 0),
        (40, 46, True, 2),
        (40, 46, False, 1),
        (40, None, True, 2),  # nobody has said what training takes
        (40, None, False, 1),
    ],
)
def test_an_engine_sleeps_where_the_plan_needs_it(engine_bytes, training_bytes, handed_over, level):
    assert sleep_level(engine_bytes, training_bytes, 100, handed_over) == level


@pytest.mark.parametrize(
    ("rows", "on_gpu", "at_once"),
    [(1, True, 8), (64, True, 64), (65, False, 72), (1000, False, 256), (1000, True, 1000), (4096, True, 1024)],
)
def test_rows_decoded_at_once_follow_the_run(rows, on_gpu, at_once):
    assert rows_at_once(rows, on_gpu) == at_once


def test_the_largest_request_of_a_run_counts():
    training, evaluation = SamplingConfig(8), SamplingConfig(1)
    data = SimpleNamespace(batch_size=8, eval_batch_size=100, sampling={"validation": None, "test": SamplingConfig(2)})
    assert max_rows_of_run(data, 1, training, evaluation) == 200
    assert max_rows_of_run(data, 3, training, evaluation) == 67
    assert max_rows_of_run(SimpleNamespace(batch_size=8), 1, training, evaluation) == 64
    assert max_rows_of_run(None, 1, training, evaluation) is None


class LLM:
    """Remembers how it was put to sleep."""

    def __init__(self):
        self.calls = []

    def sleep(self, level):
        self.calls.append(level)

    def wake_up(self):
        self.calls.append("wake up")


def on_gpu(monkeypatch, total, **options):
    """An engine that believes itself on a GPU, its device, and what it did there."""
    properties = SimpleNamespace(total_memory=total)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    engine, device = VLLMEngine(**options), torch.device("cuda")
    engine.training_bytes, engine.expected_rows = 20 * GIB, 64
    engine.llm, engine._on_gpu, engine.policy_version = LLM(), True, 3
    engine._sleep_level = engine._sleep_level_on(device)
    return engine, device


@pytest.mark.parametrize(
    ("total", "options", "calls", "version", "told"),
    [
        (80, {}, [], 3, "awake while the policy trains"),
        (40, {}, [2, "wake up"], None, "weights dropped"),
        (40, {"merge_adapters": False}, [1, "wake up"], 3, "weights on the host"),
        (80, {"sleep_level": 1}, [1, "wake up"], 3, "weights on the host"),
        (40, {"sleep_level": 0}, [], 3, "awake while the policy trains"),
    ],
)
def test_what_sleep_costs_is_chosen_and_told(monkeypatch, total, options, calls, version, told):
    """Where the weights were dropped the engine holds no version of the policy: it must be handed over again."""
    engine, device = on_gpu(monkeypatch, total * GIB, **options)
    assert told in engine.describe(device)
    assert "up to 64 rows at once" in engine.describe(device)
    engine.sleep()
    engine.sleep()  # once is enough
    engine.wake_up()
    engine.wake_up()
    assert (engine.llm.calls, engine.policy_version) == (calls, version)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sleep_level": 3}, "sleep_level must be 0, 1, 2 or auto, got 3"),
        ({"sleep_level": 2, "merge_adapters": False}, "hands over no more; use sleep_level=1"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1, got 0"),
    ],
)
def test_impossible_plans_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VLLMEngine(**options)


def test_a_start_tells_its_stages_once_and_the_log_stays_quiet(capsys):
    """vLLM says most of this on a GPU alone."""
    logger, said = logging.getLogger("vllm"), []
    own, level = logging.StreamHandler(), logger.level
    logger.addHandler(own)
    logger.setLevel(logging.ERROR)
    try:
        with told_by_vllm(said.append):
            child = logging.getLogger("vllm.v1.worker.gpu_model_runner")
            child.info("Starting to load model %s...", "a/b")
            child.info("Using attention backend %s", "FLASH_ATTN")
            child.info("%sStarting torch.compile", "")
            child.info("Warming up %d kernels", 3)
            child.info("Warming up %d kernels", 4)
        child.info("Warming up %d kernels", 5)
        assert logger.level == logging.ERROR
    finally:
        logger.removeHandler(own)
        logger.setLevel(level)
    assert [line.split("vLLM ")[1] for line in said] == [
        "loads the model",
        "compiles the model; that is cached for the next start",
        "warms up",
    ]
    assert capsys.readouterr().err == ""
