"""Turns forward passes of the policy into samples for a drafter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from lit_specrl.drafting.distillation.buffer import DistillationSample
from lit_specrl.drafting.networks import DraftNetwork
from lit_specrl.experience import Experience
from lit_specrl.models.hidden_states import HiddenStates

_CHUNK_TOKENS = 256


@dataclass(frozen=True)
class CaptureSpec:
    """What to keep of a forward pass."""

    rows: list[int]
    """Rows of the pass that are kept."""
    vocabulary: Tensor | None
    """[V'] long, token ids that the drafter can draft; `None` for all."""
    num_top: int
    """Most likely tokens whose log-probs are kept."""


class TeacherOutput(NamedTuple):
    """A response as the policy sees it; P prompt tokens, R response tokens. On the host."""

    row: int
    features: Tensor
    """[P + R - 1, F] bfloat16 or float32: inputs of the observed layers at every token but the last, joined."""
    top_tokens: Tensor
    """[R, k] int32, indices into the drafter's vocabulary."""
    top_logprobs: Tensor
    """[R, k] float32, nats, of these tokens under the policy's whole softmax."""
    log_mass: Tensor
    """[R] float32, nats, of the whole vocabulary of the drafter."""


def turn_spans(policy_mask: Tensor) -> list[tuple[int, int]]:
    """First token and end of each turn of the policy in a response; each is a sample, with all before it as its prompt.

    Args:
        policy_mask: [R] bool, True on tokens that the policy said.

    Example:
        >>> turn_spans(torch.tensor([True, True, False, True]))
        [(0, 2), (3, 4)]
    """
    edges = torch.diff(policy_mask.cpu().int(), prepend=torch.zeros(1), append=torch.zeros(1)).nonzero().squeeze(-1)
    return [(start, stop) for start, stop in edges.view(-1, 2).tolist()]


class TeacherOutputCollector:
    """Keeps a random choice of the rows that the policy computes. A `ForwardObserver` of the scorer.

    Of rows with an environment each turn is a sample.

    Args:
        network: the drafter, which says what it needs.
        num_top: most likely tokens whose log-probs are kept.
        generator: of the choice.
    """

    def __init__(self, network: DraftNetwork, num_top: int, generator: torch.Generator) -> None:
        self.network, self.num_top, self.generator = network, num_top, generator
        self.fraction = 1.0
        """Share of the rows that is kept."""
        self.num_rows_left: float = torch.inf
        """Rows to choose from; what the policy computes after those is not looked at."""
        self._rows: list[int] = []  # of the present pass
        self._samples: list[DistillationSample] = []

    def layers(self, part: Experience) -> tuple[int, ...] | None:
        if self.num_rows_left <= 0:
            return None
        self.num_rows_left -= part.num_rows
        chosen = torch.rand(part.num_rows, generator=self.generator) < self.fraction
        self._rows = (chosen & part.loss_mask.any(-1).cpu()).nonzero().squeeze(-1).tolist()
        return self.network.layers if self._rows else None

    def observe(self, part: Experience, states: HiddenStates, head: Tensor, temperature: float) -> None:
        spec = CaptureSpec(self._rows, self.network.vocabulary, self.num_top)
        for output in capture_teacher_outputs(spec, part, states, head, temperature):
            prompt = int(part.prompt_index[output.row])
            prompt_ids = part.prompt_ids[prompt, part.prompt_mask[prompt]].int().cpu()
            response_ids = part.response_ids[output.row, part.response_mask[output.row]].int().cpu()
            token_ids = torch.cat([prompt_ids, response_ids])
            for start, stop in turn_spans(part.policy_mask[output.row, : len(response_ids)]):
                context, whole = len(prompt_ids) + start, len(prompt_ids) + stop
                sample = DistillationSample(
                    uid=xxhash.xxh3_64_hexdigest(prompt_ids.numpy().tobytes()),
                    token_ids=token_ids[:whole],
                    num_prompt_tokens=context,
                    features=output.features[: whole - 1],
                    top_tokens=output.top_tokens[start:stop],
                    top_logprobs=output.top_logprobs[start:stop],
                    log_mass=output.log_mass[start:stop],
                    reward=float(part.rewards[output.row]),
                    weight=1.0,
                    policy_version=part.policy_version,
                )
                self._samples.append(sample)

    def pop(self) -> list[DistillationSample]:
        """What was kept since the last call."""
        samples, self._samples = self._samples, []
        return samples


@torch.no_grad()
def capture_teacher_outputs(
    spec: CaptureSpec, part: Experience, states: HiddenStates, head: Tensor, temperature: float
) -> list[TeacherOutput]:
    """Keep what a drafter learns from.

    Args:
        spec: what to keep.
        part: rows of the forward pass.
        states: of the forward pass.
        head: [V, H] rows of the output head.
        temperature: softmax temperature.
    """
    outputs = []
    for row in spec.rows:
        length = int(part.response_mask[row].sum())
        top = _top_logprobs(states.last[row, :length], head, spec, temperature)
        outputs.append(TeacherOutput(row, _features(states, part, row, length), *top))
    return outputs


def _features(states: HiddenStates, part: Experience, row: int, length: int) -> Tensor:
    prompt = int(part.prompt_index[row])
    prompt_mask = part.prompt_mask[prompt]
    if states.prompt_features is None or states.response_features is None:
        return torch.empty(int(prompt_mask.sum()) + length - 1, 0)
    own = states.prompt_features[prompt if states.shares_prompts else row, prompt_mask]
    return torch.cat([own, states.response_features[row, : length - 1]]).bfloat16().cpu()


def _top_logprobs(hidden: Tensor, head: Tensor, spec: CaptureSpec, temperature: float) -> tuple[Tensor, ...]:
    """Chunk by chunk, so that a long response needs no row of the vocabulary for each of its tokens at once."""
    parts = [_top_of_chunk(chunk, head, spec, temperature) for chunk in hidden.split(_CHUNK_TOKENS)]
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def _top_of_chunk(hidden: Tensor, head: Tensor, spec: CaptureSpec, temperature: float) -> tuple[Tensor, ...]:
    logprobs = torch.log_softmax((hidden @ head.T.to(hidden.dtype)).float() / temperature, dim=-1)  # [R, V]
    drafted = logprobs if spec.vocabulary is None else logprobs[:, spec.vocabulary]  # [R, V']
    top = drafted.topk(min(spec.num_top, drafted.shape[-1]), dim=-1)
    log_mass = torch.zeros(len(drafted)) if spec.vocabulary is None else drafted.logsumexp(-1).clamp_max(0)
    return top.indices.int().cpu(), top.values.cpu(), log_mass.cpu()
