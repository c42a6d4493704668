"""The loop around vLLM: its outputs, and how it compares with vLLM's own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from colocated import Colocated, build_engine

from lit_specrl.engines.vllm import stock
from lit_specrl.engines.vllm.jobs import generation_job
from lit_specrl.engines.vllm.loop import run
from lit_specrl.types import SamplingConfig


def test_asynchronous_scheduling_changes_no_bit(tiny_model, tmp_path):
    """vLLM schedules the next step before it knows the tokens of this one; nothing is left in flight at the end."""
    program = Path(__file__).with_name("asynchronous_scheduling.py")
    subprocess.run([sys.executable, str(program), tiny_model, str(tmp_path / "found")], check=True, timeout=300)
    synchronous, asynchronous = torch.load(tmp_path / "found")
    assert len(synchronous) == 6
    assert {reason for _, _, reasons in synchronous for reason in reasons} == {"stop", "length"}
    for (ids, logprobs, reasons), (their_ids, their_logprobs, their_reasons) in zip(
        synchronous, asynchronous, strict=True
    ):
        assert (ids, reasons) == (their_ids, their_reasons)
        for row, theirs in zip(logprobs, their_logprobs, strict=True):
            torch.testing.assert_close(torch.tensor(row), torch.tensor(theirs), rtol=0, atol=0, equal_nan=True)


@pytest.fixture(scope="module")
def colocated(tiny_model):
    started = Colocated(build_engine("vllm"), tiny_model)
    started.sync()
    yield started
    started.engine.shutdown()


@pytest.fixture
def engine(colocated):
    return colocated.engine


@pytest.fixture
def request_(colocated, prompts):
    """Four prompts, three responses each."""
    return colocated.request(prompts, group=3)


def test_the_loop_yields_what_vllm_generates(engine, request_):
    said = engine.generate(request_)
    assert stock.generate(engine.llm, engine.generation_jobs(request_)) == said.response_ids
    assert stock.generate(engine.llm, engine.generation_jobs(request_), with_logprobs=False) == said.response_ids


def test_vllm_samples_itself_for_a_while(engine, request_):
    """The library's sampler comes back; vLLM's draws other tokens from the same seeds."""
    said = engine.generate(request_).response_ids
    with stock.stock_sampling(engine.llm):
        theirs = stock.generate(engine.llm, engine.generation_jobs(request_))
    assert theirs != said
    assert engine.generate(request_).response_ids == said


def test_a_dropped_run_leaves_an_engine_that_answers(engine, request_):
    """Whoever stops listening in the middle of a rollout, as at Ctrl-C, can ask again."""
    said = engine.generate(request_).response_ids
    steps = run(engine.llm, dict(enumerate(engine.generation_jobs(request_))))
    assert next(steps).num_tokens
    steps.close()
    assert engine.generate(request_).response_ids == said


def test_only_stop_tokens_that_are_asked_for_end_a_response(engine):
    """The end-of-text token of the model's configuration is one of those or is none."""
    sampling = SamplingConfig(1, 200)
    for stops, reason in [((), "length"), (range(128), "stop")]:
        jobs = {row: generation_job([3, 4, 5], sampling, 20, stops, row) for row in range(8)}
        finished = [row for step in run(engine.llm, jobs) for row in step.finished]
        assert {row.finish_reason for row in finished} == {reason}
        assert {len(row.token_ids) for row in finished} == {20 if reason == "length" else 1}
        assert all(len(row.logprobs) == len(row.token_ids) for row in finished)


def test_a_row_that_vllm_gives_up_is_an_error(engine, request_, monkeypatch):
    from vllm.v1.engine import FinishReason as VLLMReason

    core = engine.llm.llm_engine.engine_core
    answer = core.get_output

    def give_up():
        outputs = answer()
        for output in outputs.outputs:
            output.finish_reason = VLLMReason.ERROR
        return outputs

    monkeypatch.setattr(core, "get_output", give_up)
    with pytest.raises(RuntimeError, match=r"vLLM has given up row \d+ after 1 tokens: error"):
        engine.generate(request_)
