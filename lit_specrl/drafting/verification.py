"""Sampling of tokens, and rejection sampling of drafts: emitted tokens are distributed as without drafts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

_BLOCK = 256  # tokens whose probabilities are added up before one of them is looked for


class SampledTokens(NamedTuple):
    token_ids: Tensor
    """[N] long."""
    logprobs: Tensor
    """[N] nats, of these tokens."""


class RejectionSampled(NamedTuple):
    """Emitted tokens of a step: the accepted part of each draft and one token after it."""

    token_ids: Tensor
    """[N, K + 1] long, K the longest draft; -1 where a row emits no more."""
    logprobs: Tensor
    """[N, K + 1] nats, under the target; 0 where a row emits no more."""


def sample_tokens(logits: Tensor, uniforms: Tensor, is_greedy: Tensor | None = None) -> SampledTokens:
    """Draw a token of each row by inverting the cumulative distribution.

    One number a row, instead of noise for every token of the vocabulary as in the Gumbel trick, which is slow to draw
    on a CPU.

    Args:
        logits: [N, V] float32, temperature and truncation applied.
        uniforms: [N] float64 in [0, 1).
        is_greedy: [N] bool, True where the most probable token shall be taken; `None` for nowhere.

    Example:
        >>> sample_tokens(torch.tensor([[0.2, 0.5, 0.3]]).log(), torch.tensor([0.6], dtype=torch.float64)).token_ids
        tensor([1])
    """
    top, argmax = logits.max(-1)
    weights = (logits - top[:, None]).exp_()
    token_ids, totals = _draw(weights, uniforms)
    if is_greedy is not None:
        token_ids = torch.where(is_greedy, argmax, token_ids)
    logprobs = weights.gather(-1, token_ids[:, None]).squeeze(-1).log() - totals.log().to(weights.dtype)
    return SampledTokens(token_ids, logprobs)


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Indices [N] with probabilities proportional to the weights [N, V] >= 0, by uniforms [N] float64 in [0, 1).

    Raises:
        FloatingPointError: weights of a row that are all 0, or not finite.
    """
    return _draw(weights, uniforms)[0]


def _draw(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """As `draw`; and the sum of each row's weights, [N] float64."""
    num_rows, size = weights.shape
    padded = pad(weights, (0, -size % _BLOCK)) if size % _BLOCK else weights
    blocks = padded.view(num_rows, -(-size // _BLOCK), _BLOCK)
    ends = blocks.sum(-1).double().cumsum(-1)  # [N, V / block]
    totals = ends[:, -1]
    if not (totals > 0).logical_and(totals.isfinite()).all():
        raise FloatingPointError("no token can be sampled: the logits of the policy, or of its drafter, are not finite")
    thresholds = (uniforms * totals)[:, None]  # [N, 1]
    block = torch.searchsorted(ends, thresholds, right=True).clamp_max(ends.shape[-1] - 1)
    rows = torch.arange(num_rows, device=weights.device)
    before = torch.where(block > 0, ends.gather(-1, (block - 1).clamp_min(0)), 0.0)
    inside = blocks[rows, block.squeeze(-1)].cumsum(-1, dtype=torch.float64)
    # rounding must not lead past the block's last token that has any weight
    rest = torch.minimum(thresholds - before, inside[:, -1:] * (1 - 1e-12))
    return (block * _BLOCK + torch.searchsorted(inside, rest, right=True)).squeeze(-1), totals


def rejection_sample(
    target_logits: Tensor,
    draft_ids: Tensor,
    num_drafted: Sequence[int],
    draft_probs: Tensor | None,
    uniforms: Tensor,
    acceptance_uniforms: Tensor | None = None,
    is_greedy: Tensor | None = None,
    draft_vocabulary: Tensor | None = None,
) -> RejectionSampled:
    """Accept drafted tokens, and sample the one that follows them. Exact: the distribution is that without drafts.

    Drafts that were not sampled (n-grams, history) are compared with what `sample_tokens` draws at their places: the
    first that differs replaces the draft from there. A row emits the very tokens that it emits without drafts by the
    same uniforms, and a drafted token is accepted with its probability, which is the best possible.

    Sampled drafts (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1) are accepted with probability `min(1, target /
    draft)`; after the first that is not, the next token comes from the residual `(target - draft)+`, and after a whole
    draft from the target.

    Args:
        target_logits: [T + N, V] float32, rows behind one another, `num_drafted[i] + 1` positions each; temperature and
            truncation applied.
        draft_ids: [T] drafted tokens, in the same order.
        num_drafted: [N] how many each row has; 0 is allowed.
        draft_probs: [T, V] distributions that the drafted tokens were sampled from; `None` where they were not sampled.
            [T, V'] with `draft_vocabulary`.
        uniforms: [T + N] float64 in [0, 1), ordered like `target_logits`; decide what is sampled at a position.
        acceptance_uniforms: [T + N], the same for the acceptance of sampled drafts.
        is_greedy: [N] bool, True where the most probable token shall be taken; `None` for nowhere.
        draft_vocabulary: [V'] long, ascending token ids that the drafter can draft; `None` for all.

    Example: the second of two drafted tokens is impossible, so that the other one takes its place:

        >>> logits = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]]).log()
        >>> rejection_sample(logits, torch.tensor([1, 1]), [2], None, torch.tensor([0.7, 0.3, 0.3]).double()).token_ids
        tensor([[ 1,  0, -1]])
    """
    drafted = torch.tensor(num_drafted, device=target_logits.device)  # [N]
    first = (drafted + 1).cumsum(0) - drafted - 1  # [N], row's first position among the logits
    first_draft = drafted.cumsum(0) - drafted  # [N], row's first drafted token
    emitted = RejectionSampled(
        torch.full((len(drafted), int(drafted.max()) + 1), -1, device=drafted.device),
        torch.zeros(len(drafted), int(drafted.max()) + 1, dtype=target_logits.dtype, device=drafted.device),
    )
    active = torch.arange(len(drafted), device=drafted.device)
    for column in range(emitted.token_ids.shape[1]):
        # without drafts all positions are first ones, and nothing is copied
        logits = target_logits if len(active) == len(target_logits) else target_logits[first[active] + column]
        if draft_probs is None:
            greedy = None if is_greedy is None else is_greedy[active]
            tokens, logprobs = sample_tokens(logits, uniforms[first[active] + column], greedy)
        else:
            assert acceptance_uniforms is not None
            tokens, logprobs = _sampled_draft(
                logits,
                column < drafted[active],
                (first_draft[active] + column).clamp_max(len(draft_ids) - 1),
                draft_ids,
                draft_probs,
                uniforms[first[active] + column],
                acceptance_uniforms[first[active] + column],
                None if is_greedy is None else is_greedy[active],
                draft_vocabulary,
            )
        emitted.token_ids[active, column], emitted.logprobs[active, column] = tokens, logprobs
        has_draft = column < drafted[active]
        active, tokens = active[has_draft], tokens[has_draft]
        active = active[tokens == draft_ids[first_draft[active] + column]]
        if not len(active):
            break
    return emitted


def _sampled_draft(
    logits: Tensor,
    has_draft: Tensor,
    draft: Tensor,
    draft_ids: Tensor,
    draft_probs: Tensor,
    uniforms: Tensor,
    acceptance_uniforms: Tensor,
    is_greedy: Tensor | None,
    vocabulary: Tensor | None,
) -> SampledTokens:
    """The tokens [n] of one position, where `draft` [n] points at the drafted tokens of rows that have one."""
    target = logits.softmax(-1)
    token_ids = draft_ids[draft].long()
    chosen = target.gather(-1, token_ids[:, None]).squeeze(-1)
    columns = token_ids
    if vocabulary is not None:
        columns = torch.searchsorted(vocabulary, token_ids).clamp_max(len(vocabulary) - 1)
    drafted = draft_probs[draft, columns]
    accepted = has_draft & (acceptance_uniforms * drafted < chosen)
    rejected = has_draft & ~accepted
    weights = target
    if rejected.any():
        residual = target[rejected]
        if vocabulary is None:
            residual -= draft_probs[draft[rejected]]
        else:
            residual.index_add_(1, vocabulary, draft_probs[draft[rejected]], alpha=-1)
        residual.clamp_min_(0)
        # nothing is left where rounding made draft and target the same and the token was rejected all the same
        weights = target.clone()
        weights[rejected] = torch.where(residual.sum(-1, keepdim=True) > 0, residual, target[rejected])
    others = (~accepted).nonzero().squeeze(-1)
    token_ids = token_ids.clone()
    token_ids[others] = draw(weights[others], uniforms[others])
    if is_greedy is not None:
        token_ids = torch.where(is_greedy, logits.argmax(-1), token_ids)
    return SampledTokens(token_ids, target.gather(-1, token_ids[:, None]).squeeze(-1).log())
