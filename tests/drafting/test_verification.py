"""Drafts change how many tokens a step emits, never which."""

import itertools

import pytest
import torch

from lit_specrl.drafting.verification import rejection_sample, sample_tokens

VOCABULARY = 4


def distributions(count, seed=0, concentration=1.5):
    generator = torch.Generator().manual_seed(seed)
    return (concentration * torch.randn(count, VOCABULARY, generator=generator, dtype=torch.float64)).softmax(-1)


def uniforms(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sampled(probs, draws):
    cumulative = probs.cumsum(-1)
    return torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True).squeeze(-1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("is_sampled", [True, False])
def test_what_two_drafted_tokens_emit_has_the_targets_distribution(seed, is_sampled):
    """The chance of every text of three tokens, added up over the steps that emit it, from a grid of uniforms instead
    of a sample."""
    target = distributions(1 + VOCABULARY + VOCABULARY**2, seed)  # first, second given the first, third given both
    drafter = distributions(1 + VOCABULARY, seed + 100)
    count = 400_000
    draws = uniforms(10, count, seed=seed)
    first = sampled(drafter[:1].expand(count, -1), draws[0]) if is_sampled else torch.full((count,), 2)
    second = sampled(drafter[1 + first], draws[1]) if is_sampled else (first + 1) % VOCABULARY
    rows = torch.stack(
        [torch.zeros(count, dtype=torch.long), 1 + first, 1 + VOCABULARY + VOCABULARY * first + second], dim=1
    )
    verified = rejection_sample(
        target[rows.flatten()].log(),
        torch.stack([first, second], dim=1).flatten(),
        [2] * count,
        torch.stack([drafter[torch.zeros_like(first)], drafter[1 + first]], dim=1).flatten(0, 1)
        if is_sampled
        else None,
        draws[2:5].T.flatten(),
        draws[7:10].T.flatten(),
    )
    # the rest of a text that was cut short comes from the target itself
    text = verified.token_ids.clone()
    for column, rest in ((1, draws[5]), (2, draws[6])):
        missing = text[:, column] < 0
        context = 1 + text[:, 0] if column == 1 else 1 + VOCABULARY + VOCABULARY * text[:, 0] + text[:, 1].clamp_min(0)
        text[missing, column] = sampled(target[context[missing]], rest[missing])
    found = torch.bincount(text @ torch.tensor([16, 4, 1]), minlength=VOCABULARY**3) / count
    expected = torch.stack(
        [
            target[0, a] * target[1 + a, b] * target[1 + VOCABULARY + VOCABULARY * a + b, c]
            for a, b, c in itertools.product(range(VOCABULARY), repeat=3)
        ]
    )
    deviation = (found - expected) / (expected * (1 - expected) / count).sqrt()  # standard normal
    assert deviation.abs().max() < 4.5
    assert (verified.token_ids[:, 1] >= 0).float().mean() > 0.02  # drafts were of use


def test_one_drafted_token_is_an_identity():
    """`draft * min(1, target / draft) + P(rejected) * residual` over a fine grid of the two uniforms."""
    target, draft = distributions(2, seed=5)
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    emitted = torch.zeros(VOCABULARY, dtype=torch.float64)
    for token in range(VOCABULARY):
        pairs = torch.stack([grid.repeat_interleave(1000), grid.repeat(1000)], dim=1)
        verified = rejection_sample(
            target.log().expand(2_000_000, -1),
            torch.full((1_000_000,), token),
            [1] * 1_000_000,
            draft.expand(1_000_000, -1),
            pairs[:, 1].repeat_interleave(2),
            pairs[:, 0].repeat_interleave(2),
        )
        emitted += draft[token] * torch.bincount(verified.token_ids[:, 0], minlength=VOCABULARY) / 1_000_000
    torch.testing.assert_close(emitted, target, atol=2e-3, rtol=0)


def test_certain_targets_decide_everything():
    says = [0, 1, 2, 3, 3, 2, 1, 0, 2, 1]  # 3 + 1, 1 + 1, 0 + 1, 2 + 1 positions
    logits = torch.nn.functional.one_hot(torch.tensor(says), VOCABULARY).double().log()
    verified = rejection_sample(logits, torch.tensor([0, 1, 0, 0, 0, 2]), [3, 1, 0, 2], None, uniforms(10))
    assert verified.token_ids.tolist() == [[0, 1, 2, -1], [3, -1, -1, -1], [1, -1, -1, -1], [0, 2, 1, -1]]
    assert verified.logprobs.tolist() == [[0.0] * 4] * 4


def test_logprobs_are_the_targets():
    target = distributions(7, seed=3)
    verified = rejection_sample(
        target.log() + 3.0, torch.tensor([1, 2, 0, 3]), [2, 0, 2], None, torch.zeros(7, dtype=torch.float64)
    )
    positions = [[0, 1, 2], [3], [4, 5, 6]]
    for row, (tokens, logprobs) in enumerate(zip(verified.token_ids, verified.logprobs, strict=True)):
        emitted = tokens[tokens >= 0]
        expected = target[positions[row][: len(emitted)], emitted].log()
        torch.testing.assert_close(logprobs[: len(emitted)], expected)


def test_greedy_rows_take_the_most_probable_token_whatever_is_drawn():
    target = distributions(6, seed=1)
    best = target.argmax(-1)
    draft = torch.stack([best[0], best[1], best[3], (best[4] + 1) % VOCABULARY])
    for draw in (0.0, 0.999):
        verified = rejection_sample(
            target.log(),
            draft,
            [2, 2],
            None,
            torch.full((6,), draw, dtype=torch.float64),
            is_greedy=torch.tensor([True, True]),
        )
        assert verified.token_ids.tolist() == [best[:3].tolist(), [*best[3:5].tolist(), -1]]


def test_a_rejected_token_of_a_draft_like_the_target_is_replaced_by_the_target():
    """By rounding alone: nothing is left of the residual then."""
    target = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).double()
    drafter = target * (1 + 1e-9)
    numbers = torch.tensor([0.7, 0.7]).double()
    verified = rejection_sample(
        target.log().expand(2, -1), torch.tensor([0]), [1], drafter, numbers, torch.tensor([1 - 1e-12, 0.5]).double()
    )
    assert verified.token_ids.tolist() == [[1, -1]]


def test_tokens_that_the_target_cannot_emit_are_never_emitted():
    """Truncated by top-p: their logits are minus infinity."""
    logits = distributions(4000, seed=9).log()
    logits[:, 3] = -torch.inf
    draft = torch.full((2000,), 3)
    verified = rejection_sample(logits, draft, [1] * 2000, None, uniforms(4000))
    assert (verified.token_ids[:, 0] != 3).all() and (verified.token_ids[:, 1] == -1).all()
    sampled_draft = torch.full((2000, VOCABULARY), 0.25).double()
    verified = rejection_sample(logits, draft, [1] * 2000, sampled_draft, uniforms(4000), uniforms(4000, seed=1))
    assert not (verified.token_ids == 3).any()


def test_chosen_drafts_change_no_token():
    """Whatever is drafted: a step emits the first of the tokens that would have been sampled at its positions."""
    target = distributions(9000, seed=2)
    draws = uniforms(9000, seed=3)
    alone = sample_tokens(target.log(), draws)
    draft = torch.where(uniforms(6000, seed=4) < 0.5, alone.token_ids.view(-1, 3)[:, :2].flatten(), 1)
    verified = rejection_sample(target.log(), draft, [2] * 3000, None, draws)
    emitted = verified.token_ids >= 0
    assert (verified.token_ids[emitted] == alone.token_ids.view(-1, 3)[emitted]).all()
    assert torch.equal(verified.logprobs[emitted], alone.logprobs.view(-1, 3)[emitted])
    hits = (draft.view(-1, 2) == alone.token_ids.view(-1, 3)[:, :2]).long().cumprod(1).sum(1)
    assert torch.equal(emitted.sum(1), hits + 1)


@pytest.mark.parametrize("size", [5, 256, 1000])
def test_sampling_inverts_the_cumulative_distribution(size):
    """Of vocabularies within, as large as, and beyond a block; with tokens that have no probability."""
    logits = 2 * torch.randn(3, size, generator=torch.Generator().manual_seed(size))
    logits[:, ::3] = -torch.inf
    probs = logits.double().softmax(-1)
    for row in range(3):
        draws = uniforms(2000, seed=row)
        found = sample_tokens(logits[row].expand(2000, -1), draws)
        expected = sampled(probs[row].expand(2000, -1), draws)
        assert (found.token_ids != expected).sum() <= 2  # rounding at the edge of two tokens
        torch.testing.assert_close(found.logprobs, probs[row].log().float()[found.token_ids], atol=1e-5, rtol=0)


def test_the_ends_of_the_unit_interval():
    logits = torch.full((2, 600), -torch.inf)
    logits[:, [40, 300, 310]] = 0.0
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sample_tokens(logits, ends).token_ids.tolist() == [40, 310]
    assert sample_tokens(logits, ends, torch.tensor([True, True])).token_ids.tolist() == [40, 40]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_are_an_error(value):
    logits = torch.zeros(2, 300)
    logits[1] = value
    with pytest.raises(FloatingPointError, match="the logits of the policy, or of its drafter, are not finite"):
        sample_tokens(logits, uniforms(2))


def test_distributions_over_some_tokens_are_those_that_give_the_others_nothing():
    vocabulary = torch.tensor([0, 2, 3])
    target = distributions(900, seed=5)
    few = distributions(600, seed=6)[:, :3]
    few = few / few.sum(-1, keepdim=True)
    whole = torch.zeros(600, VOCABULARY, dtype=torch.float64).index_copy(1, vocabulary, few)
    drafts = vocabulary[sampled(few, uniforms(600, seed=7))]
    draws = uniforms(900, seed=8), uniforms(900, seed=9)
    greedy = torch.arange(300) % 5 == 0
    for is_greedy in (None, greedy):
        expected = rejection_sample(target.log(), drafts, [2] * 300, whole, *draws, is_greedy)
        found = rejection_sample(target.log(), drafts, [2] * 300, few, *draws, is_greedy, vocabulary)
        assert torch.equal(found.token_ids, expected.token_ids)
        torch.testing.assert_close(found.logprobs, expected.logprobs)
    assert 1 in expected.token_ids  # what cannot be drafted is emitted all the same
