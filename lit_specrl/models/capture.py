"""What a drafter can learn from a forward pass of the policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lit_specrl.models.hidden_states import HiddenStates
from lit_specrl.types import Experience


@dataclass(frozen=True)
class CaptureSpec:
    """What to keep of a forward pass."""

    rows: list[int]
    """Rows of the pass that are kept."""
    layers: tuple[int, ...]
    """Decoder layers whose inputs are kept; none for drafters that look at tokens alone."""
    vocabulary: Tensor | None
    """[V'] long, token ids that the drafter can draft; `None` for all."""
    num_top: int
    """Most likely tokens whose log-probs are kept."""


class TeacherOutput(NamedTuple):
    """A response as the policy sees it; P prompt tokens, R response tokens. On the host."""

    row: int
    features: Tensor
    """[P + R - 1, F] bfloat16 or float32: inputs of the asked layers at every token but the last, joined."""
    top_tokens: Tensor
    """[R, k] int32, indices into the drafter's vocabulary."""
    top_logprobs: Tensor
    """[R, k] float32, nats, of these tokens under the policy's whole softmax."""
    log_mass: Tensor
    """[R] float32, nats, of the whole vocabulary of the drafter."""


class Student(Protocol):
    """Who learns from the policy's forward passes."""

    def asks(self, part: Experience) -> CaptureSpec | None:
        """What to keep of the forward pass over these rows; `None` for nothing."""

    def listens(self, part: Experience, taught: list[TeacherOutput]) -> None:
        """Told what was kept."""


@torch.no_grad()
def teach(
    teaching: CaptureSpec,
    states: HiddenStates,
    head: Tensor,
    prompt_mask: Tensor,
    prompt_index: Tensor,
    response_mask: Tensor,
    temperature: float,
) -> list[TeacherOutput]:
    """Keep what was asked for.

    Args:
        teaching: what was asked for.
        states: of the forward pass.
        head: [V, H] rows of the output head.
        prompt_mask: [B, P] bool, left-padded.
        prompt_index: [N] long, the prompt of each row.
        response_mask: [N, R] bool, right-padded.
        temperature: softmax temperature.
    """
    taught = []
    for row in teaching.rows:
        length = int(response_mask[row].sum())
        top = _top_logprobs(states.last[row, :length], head, teaching, temperature)
        taught.append(TeacherOutput(row, _features(states, prompt_mask, prompt_index, row, length), *top))
    return taught


def _features(states: HiddenStates, prompt_mask: Tensor, prompt_index: Tensor, row: int, length: int) -> Tensor:
    prompt = int(prompt_index[row])
    if states.prompt_features is None or states.response_features is None:
        return torch.empty(int(prompt_mask[prompt].sum()) + length - 1, 0)
    own = states.prompt_features[prompt if states.shares_prompts else row, prompt_mask[prompt]]
    return torch.cat([own, states.response_features[row, : length - 1]]).bfloat16().cpu()


def _top_logprobs(hidden: Tensor, head: Tensor, teaching: CaptureSpec, temperature: float) -> tuple[Tensor, ...]:
    logprobs = torch.log_softmax((hidden @ head.T.to(hidden.dtype)).float() / temperature, dim=-1)  # [R, V]
    drafted = logprobs if teaching.vocabulary is None else logprobs[:, teaching.vocabulary]  # [R, V']
    top = drafted.topk(min(teaching.num_top, drafted.shape[-1]), dim=-1)
    log_mass = torch.zeros(len(drafted)) if teaching.vocabulary is None else drafted.logsumexp(-1).clamp_max(0)
    return top.indices.int().cpu(), top.values.cpu(), log_mass.cpu()
