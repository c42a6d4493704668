"""Try families of models with VLLMEngine, and print a line per family.

A program of its own, for every family starts an engine, in a process of its own. Arguments: names of families; without
any, all. The weights are changed behind the start, so that weights that vLLM has left as they were would be seen.

    python tests/models/try_architectures.py Qwen3-MoE LFM2
"""

import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.append(str(Path(__file__).parents[1]))

TIME_LIMIT_S = 240
TOLERANCE = 1e-3  # nats
PROMPT_LENGTHS = (3, 40, 20, 7)


def largest_difference(name):
    """Between the engine's and the policy's log-probs behind two changes of the weights, in nats."""
    from architectures import save_family
    from colocated import Colocated, build_engine, policy_logprobs, sampling_logprobs

    prompts = [list(range(10, 10 + length)) for length in PROMPT_LENGTHS]
    with tempfile.TemporaryDirectory() as folder:
        started, found = Colocated(build_engine("vllm"), save_family(name, folder)), []
        for seed in range(2):
            started.perturb(seed)
            started.sync()
            rollouts = started.generate(prompts, group=3)
            expected = policy_logprobs(started.policy.eval(), rollouts, 1.0)
            found.append(float((sampling_logprobs(rollouts) - expected).abs().max()))
        started.engine.shutdown()
    return max(found)


def tell(name, answers):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # vLLM's and transformers' own lines
    try:
        difference = largest_difference(name)
    except Exception as error:
        answers.send(f"refused: {type(error).__name__}: {error}")
    else:
        answers.send(f"{'works' if difference < TOLERANCE else 'WRONG'}, {difference:.1g} nats")


def try_family(name):
    """In a forked process, which has vLLM's import behind it."""
    context = multiprocessing.get_context("fork")
    answer, answers = context.Pipe(duplex=False)
    process = context.Process(target=tell, args=(name, answers))
    process.start()
    answers.close()
    try:
        return answer.recv() if answer.poll(TIME_LIMIT_S) else f"no answer in {TIME_LIMIT_S} s"
    except EOFError:
        process.join()
        return f"no answer: its process ended with {process.exitcode}; -9 is most often want of memory"
    finally:
        process.join(10)
        process.kill()


def main(names):
    import torch
    import vllm  # noqa: F401
    from architectures import FAMILIES

    torch.set_num_threads(1)
    for name in names or FAMILIES:
        started_at = time.perf_counter()
        print(f"{name}: {try_family(name)} ({time.perf_counter() - started_at:.0f} s)", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
