"""Runs rollouts with and without vLLM's asynchronous scheduling, and saves what came of each.

vLLM schedules asynchronously on GPUs. On a CPU it can be made to, where the streams and events of a GPU do nothing;
that changes torch for the whole process, so this is a program of its own.

    python asynchronous_scheduling.py MODEL FILE
"""

import sys
from itertools import product

import torch


class Nothing:
    """A stream or an event without a GPU: everything has been done when it is asked for."""

    def __init__(self, *arguments, **options):
        """Whatever is wanted."""

    def __getattr__(self, name):
        return lambda *arguments, **options: None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return False


def schedule_asynchronously(asynchronous):
    from vllm.platforms.cpu import CpuPlatform

    decide = vars(CpuPlatform)["check_and_update_config"].__func__

    def check_and_update_config(cls, config):
        decide(cls, config)
        config.scheduler_config.async_scheduling = asynchronous

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    return lambda: setattr(CpuPlatform, "check_and_update_config", classmethod(decide))


def rollouts(model, asynchronous):
    """Three versions of the policy, each asked afresh and to go on from what it has verified."""
    from lit_specrl.engines import VLLMEngine
    from lit_specrl.models.policy import Policy
    from lit_specrl.types import PromptBatch, RolloutRequest, SamplingConfig

    policy, restore = Policy.build(model), schedule_asynchronously(asynchronous)
    engine = VLLMEngine(dtype="float32", max_num_seqs=8, cpu_kv_cache_gib=0.25)
    prompts = [[3 + (7 * row + place) % 100 for place in range(16)] for row in range(12)]
    batch = PromptBatch([str(row) for row in range(12)], prompts, [""] * 12, [None] * 12, [""] * 12)
    found = []
    try:
        engine.start(policy, model, 100, {2, 5, 6})
        core = engine.llm.llm_engine.engine_core.engine_core
        assert (core.batch_queue is not None) == asynchronous
        for version, verifies in product(range(3), [False, True]):
            if not verifies:
                engine.load_policy(policy, version)  # fails where a step of the weights before is still in flight
            seeds = [100 * version + 20 * verifies + row for row in range(12)]
            request = RolloutRequest(batch, SamplingConfig(1, 30), seeds, version)
            if verifies:
                request.cached_responses = {row: ids[:-1] for row, ids in enumerate(found[-1][0]) if len(ids) > 3}
                request.accept = lambda row, logprobs: len(logprobs) // 2
            said = engine.generate(request)
            found.append((said.response_ids, said.sampling_logprobs, said.finish_reasons))
            assert not core.batch_queue, "nothing is left in flight"
            for parameter in policy.parameters():
                parameter.data += 0.01
    finally:
        engine.shutdown()
        restore()
    return found


if __name__ == "__main__":
    torch.cuda.Event = torch.cuda.Stream = Nothing
    torch.cuda.current_stream = torch.cuda.stream = Nothing
    torch.save([rollouts(sys.argv[1], asynchronous) for asynchronous in (False, True)], sys.argv[2])
