"""A policy and its engine in one process, and what their samples are compared with."""

import math
from itertools import count

import pytest
import torch

from lit_specrl.engines import TransformersEngine, VLLMEngine
from lit_specrl.models.policy import Policy
from lit_specrl.types import PromptBatch, RolloutRequest, SamplingConfig

MAX_LENGTH = 256
STOP_TOKEN_IDS = {2, 30, 60, 90}  # several, so that random weights end a good part of the responses
VLLM = ["vllm-llama", "vllm-qwen"]  # kinds of engines, for `with_engines`
NUM_SAMPLES = 3000
versions = count(1)


def build_engine(kind):
    if kind == "transformers":
        return TransformersEngine()
    dtype = "bfloat16" if kind == "bf16" else "float32"
    return VLLMEngine(dtype=dtype, max_num_seqs=32, cpu_kv_cache_gib=0.25)


class Colocated:
    """A policy and its engine."""

    def __init__(self, engine, folder, device="cpu"):
        self.engine, self.folder, self.policy = engine, folder, Policy.build(folder).to(device)
        self.initial = {name: weight.clone() for name, weight in self.policy.state_dict().items()}
        self.start()

    def start(self):
        self.engine.start(self.policy, self.folder, MAX_LENGTH, STOP_TOKEN_IDS)

    def sync(self):
        self.engine.load_weights(self.policy.named_weights(), next(versions))

    @torch.no_grad()
    def perturb(self, seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.policy.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.device)

    def request(self, prompts, seeds=None, group=1, length=12, **sampling):
        """Prompts are lists of token ids; seeds count up from 0."""
        size = len(prompts)
        batch = PromptBatch([str(i) for i in range(size)], prompts, [""] * size, [None] * size, [""] * size)
        return RolloutRequest(
            batch,
            SamplingConfig(group, length, **sampling),
            list(range(size * group)) if seeds is None else seeds,
            self.engine.policy_version,
        )

    def generate(self, *arguments, on_progress=None, **options):
        return self.engine.generate(self.request(*arguments, **options), on_progress)


def with_engines(names):
    return pytest.mark.parametrize("started", names, indirect=True, scope="module")


@torch.no_grad()
def next_token_logprobs(policy, token_ids, temperature):
    """Log-softmax after every token of one unpadded row, [length, V], by the plain model."""
    logits = policy.model(torch.tensor([token_ids], device=policy.device)).logits[0].cpu()
    return (logits / temperature).log_softmax(-1)


def policy_logprobs(policy, rollouts, temperature):
    """Log-probs of the responses, row after row, by the plain model."""
    rows = []
    for row, response in enumerate(rollouts.response_ids):
        prompt = rollouts.prompts.prompt_ids[rollouts.request.prompt_index(row)]
        logprobs = next_token_logprobs(policy, prompt + response, temperature)[len(prompt) - 1 : -1]  # [R, V]
        rows.append(logprobs.gather(-1, torch.tensor(response)[:, None]).squeeze(-1))
    return torch.cat(rows)


def sampling_logprobs(rollouts):
    return torch.tensor([logprob for row in rollouts.sampling_logprobs for logprob in row])


def chi_square_excess(samples, probabilities):
    """How far the counts lie outside what chance explains, in standard deviations of the chi-square statistic.

    Outcomes expected fewer than five times are taken together.

    Args:
        samples: outcomes, ints.
        probabilities: [outcomes] exact.
    """
    expected = probabilities.double() * len(samples)
    observed = torch.bincount(torch.tensor(samples), minlength=len(expected)).double()
    frequent = expected >= 5
    expected = torch.cat([expected[frequent], expected[~frequent].sum()[None]])
    observed = torch.cat([observed[frequent], observed[~frequent].sum()[None]])
    assert expected[-1] >= 5
    degrees = len(expected) - 1
    assert degrees >= 20  # otherwise the test sees next to nothing
    statistic = float(((observed - expected) ** 2 / expected).sum())
    return (statistic - degrees) / math.sqrt(2 * degrees)


def pair_distribution(policy, prompt, temperature):
    """Probability of the first two response tokens, [V * V]; a stop token is followed by token 0."""
    first = next_token_logprobs(policy, prompt, temperature)[-1].exp()  # [V]
    rows = torch.tensor([[*prompt, token] for token in range(len(first))], device=policy.device)  # [V, P + 1]
    with torch.no_grad():
        second = (policy.model(rows).logits[:, -1].cpu() / temperature).softmax(-1)  # [V, V]
    second[sorted(STOP_TOKEN_IDS)] = torch.nn.functional.one_hot(torch.tensor(0), len(first)).float()
    return (first[:, None] * second).flatten()
