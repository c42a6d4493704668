import math

import pytest
import torch

from lit_specrl.prefix_cache.acceptance import FullReuse, NoReuse, RandomReuse, RatioAcceptance

LEVELS = ["token", "sequence"]

# Three tokens; min(draft, target) = [1/4, 1/4, 1/4], so the ratio test accepts 3/4 in all.
DRAFT = torch.tensor([1 / 2, 1 / 4, 1 / 4])
TARGET = torch.tensor([1 / 4, 1 / 4, 1 / 2])


def verify(rule, target, draft, uniforms, generation=None, draft_mask=None):
    """Lengths as a list; probabilities as nested lists, one row per draft."""
    target, draft, uniforms = torch.tensor(target).log(), torch.tensor(draft).log(), torch.tensor(uniforms)
    generation = draft if generation is None else torch.tensor(generation).log()
    draft_mask = torch.ones_like(target, dtype=torch.bool) if draft_mask is None else torch.tensor(draft_mask)
    return rule(target, draft, generation, draft_mask, uniforms).tolist()


def acceptance(rule, target, draft, generation=None):
    """Probability of keeping each token of the vocabulary, [V]."""
    generation = draft if generation is None else generation
    return rule.acceptance_probability(target.log(), draft.log(), generation.log())


def emitted_distribution(rule, target, draft):
    accepted = draft * acceptance(rule, target, draft)
    return accepted + (1 - accepted.sum()) * target


def emitted_by_trying_everything(rule, target, draft, num_uniforms):
    """Each token of the vocabulary as a draft of one, with each of `num_uniforms` equally spaced uniforms."""
    num_tokens = len(target)
    tokens = torch.arange(num_tokens).repeat_interleave(num_uniforms)[:, None]  # [N, 1]
    uniforms = ((torch.arange(num_uniforms) + 0.5) / num_uniforms).repeat(num_tokens)[:, None]  # [N, 1]
    previous_logprobs = draft.log()[tokens]
    lengths = rule(target.log()[tokens], previous_logprobs, previous_logprobs, torch.ones_like(tokens).bool(), uniforms)
    emitted = torch.zeros(num_tokens)
    for token, length in zip(tokens.squeeze(-1).tolist(), lengths.tolist(), strict=True):
        case_probability = draft[token] / num_uniforms
        emitted += case_probability * (torch.eye(num_tokens)[token] if length == 1 else target)
    return emitted


def test_the_first_failure_ends_the_verified_prefix():
    target = [[0.5, 0.5, 0.2, 0.5], [0.5, 0.5, 0.5, 0.5], [0.1, 0.5, 0.5, 0.5]]
    draft = [[0.5, 0.5, 0.8, 0.5], [0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]]
    assert verify(RatioAcceptance(), target, draft, [[0.5] * 4] * 3) == [2, 4, 0]


@pytest.mark.parametrize(
    ("lenience", "expected"), [(0.0, [0, 0]), (1.0, [1, 0]), (2.0, [2, 1]), (8.0, [3, 3]), (math.inf, [3, 3])]
)
def test_lenience_multiplies_the_ratio(lenience, expected):
    target, draft = [[0.8, 0.4, 0.1], [0.4, 0.1, 0.1]], [[0.8, 0.8, 0.8], [0.8, 0.8, 0.8]]
    uniforms = [[0.75, 0.75, 0.75], [0.75, 0.75, 0.75]]
    assert verify(RatioAcceptance(lenience), target, draft, uniforms) == expected


def test_padding_is_never_kept_and_empty_drafts_give_zero():
    nan = float("nan")
    certain, uniforms = [[0.5, 0.5, nan], [nan, nan, nan]], [[0.5] * 3] * 2
    mask = [[True, True, False], [False, False, False]]
    by_sequence = RatioAcceptance(level="sequence")
    for rule in (RatioAcceptance(), by_sequence, RatioAcceptance(math.inf, drift_bound=0.0), FullReuse()):
        assert verify(rule, certain, certain, uniforms, draft_mask=mask) == [2, 0]


def test_the_mask_ends_the_draft_whatever_stands_behind_it():
    same, mask = [[0.5, 0.5, 0.5]] * 2, [[True, False, False], [True, False, True]]
    for rule in (RatioAcceptance(), FullReuse()):
        assert verify(rule, same, same, [[0.0] * 3] * 2, draft_mask=mask) == [1, 1]


@pytest.mark.parametrize(
    "rule", [RatioAcceptance(), RatioAcceptance(level="sequence"), RandomReuse(), FullReuse(), NoReuse()]
)
@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
def test_drafts_without_tokens_or_rows_are_fine(rule, shape):
    nothing = torch.zeros(shape)
    lengths = rule(nothing, nothing, nothing, nothing.bool(), nothing)
    assert lengths.dtype == torch.long
    assert lengths.tolist() == [0] * shape[0]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("lenience", [0.0, 1.0, 1e30, math.inf])
def test_an_unknown_log_prob_is_not_accepted(lenience, level):
    unknown, rule = [[float("nan")]], RatioAcceptance(lenience, level=level)
    assert verify(rule, unknown, [[0.5]], [[0.0]]) == [0]
    assert verify(rule, [[0.5]], unknown, [[0.0]]) == [0]
    bounded = RatioAcceptance(lenience, drift_bound=5.0, level=level)
    assert verify(bounded, [[0.5]], [[0.5]], [[0.0]], generation=unknown) == [0]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("lenience", "expected"), [(1.0, 0), (1e30, 0), (math.inf, 1)])
def test_a_token_that_the_target_cannot_emit_needs_infinite_lenience(lenience, expected, level):
    """Also with a uniform of exactly 0, where u <= 0 would hold."""
    rule = RatioAcceptance(lenience, level=level)
    assert verify(rule, [[0.0]], [[0.5]], [[0.0]]) == [expected]
    assert verify(rule, [[0.0]], [[0.0]], [[0.0]]) == [0 if lenience < math.inf else 1]


def test_the_drift_bound_looks_at_the_log_prob_of_generation():
    """Half a nat is lost per epoch, which a lenience of e^0.5 never minds, whatever the uniforms."""
    epochs = torch.arange(1.0, 8.0)[:, None]  # [N = 7, 1]
    target, draft, generation = -0.5 * epochs, -0.5 * (epochs - 1), torch.zeros(7, 1)
    mask, uniforms = torch.ones(7, 1, dtype=torch.bool), torch.full((7, 1), 0.99)
    lenience = math.exp(0.5)
    unbounded = RatioAcceptance(lenience)(target, draft, generation, mask, uniforms)
    bounded = RatioAcceptance(lenience, drift_bound=2.0)(target, draft, generation, mask, uniforms)
    assert unbounded.tolist() == [1, 1, 1, 1, 1, 1, 1]
    assert bounded.tolist() == [1, 1, 1, 1, 0, 0, 0]


def test_half_precision_is_compared_in_float32():
    """exp(-0.0029) = 0.9971 is nearest to 0.9961 in bf16; it has to come out as float32 would have it."""
    target, draft = torch.tensor([[-0.0029]], dtype=torch.bfloat16), torch.tensor([[0.0]], dtype=torch.bfloat16)
    probability = RatioAcceptance().acceptance_probability(target, draft, draft)
    torch.testing.assert_close(probability, target.float().exp())
    assert RatioAcceptance()(target, draft, draft, torch.ones(1, 1).bool(), torch.tensor([[0.9970]])).tolist() == [1]


def test_emitted_distribution_is_derived_right():
    """By hand: accepted [1/4, 1/4, 1/4], and a quarter of the target on top."""
    expected = torch.tensor([5 / 16, 5 / 16, 6 / 16])
    torch.testing.assert_close(emitted_distribution(RatioAcceptance(), TARGET, DRAFT), expected)
    torch.testing.assert_close(emitted_by_trying_everything(RatioAcceptance(), TARGET, DRAFT, 8), expected)


@pytest.mark.parametrize("lenience", [0.0, 0.25, 0.5, 1.0, 1.5, 2.0, math.inf])
def test_emitted_distribution_is_what_trying_everything_gives(lenience):
    rule = RatioAcceptance(lenience)
    expected = emitted_by_trying_everything(rule, TARGET, DRAFT, num_uniforms=8)
    torch.testing.assert_close(emitted_distribution(rule, TARGET, DRAFT), expected)


def test_emitted_distribution_with_a_drift_bound():
    """The first token was certain when it was generated and has lost log 4 > 1 nats: never kept."""
    accept = acceptance(RatioAcceptance(drift_bound=1.0), TARGET, DRAFT, generation=torch.tensor([1.0, 0.5, 0.5]))
    assert accept.tolist() == [0, 1, 1]
    emitted = DRAFT * accept + (1 - (DRAFT * accept).sum()) * TARGET
    torch.testing.assert_close(emitted, torch.tensor([1 / 8, 3 / 8, 1 / 2]))


@pytest.mark.parametrize("level", LEVELS)
def test_emitted_distribution_of_a_whole_response(level):
    """Two tokens, where the second depends on the first: kept prefix times what follows, over all drafts and coins."""
    draft_first, target_first = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    draft_second = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    target_second = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    rule, num_uniforms = RatioAcceptance(level=level), 12  # acceptances are 1/2, 2/3 and 1: whole twelfths

    uniforms = (torch.arange(num_uniforms) + 0.5) / num_uniforms
    coins = torch.cartesian_prod(uniforms, uniforms)  # [144, 2]
    emitted, accept = torch.zeros(2, 2), torch.zeros(2, 2, 2)  # by first and second token
    for first in range(2):
        for second in range(2):
            draft = torch.stack([draft_first[first], draft_second[first, second]]).log().expand_as(coins)
            target = torch.stack([target_first[first], target_second[first, second]]).log().expand_as(coins)
            lengths = rule(target, draft, draft, torch.ones_like(coins).bool(), coins)
            share = torch.bincount(lengths, minlength=3) / len(coins) * draft[0].exp().prod()
            emitted += share[0] * target_first[:, None] * target_second
            emitted[first] += share[1] * target_second[first]
            emitted[first, second] += share[2]
            accept[first, second] = rule.acceptance_probability(target[0], draft[0], draft[0])

    accept_first = draft_first * accept[:, 0, 0]
    accept_second = draft_second * accept[..., 1]
    following_kept = accept_second + (1 - accept_second.sum(-1, keepdim=True)) * target_second
    rejected = (1 - accept_first.sum()) * target_first[:, None] * target_second
    torch.testing.assert_close(emitted, accept_first[:, None] * following_kept + rejected)


# ------------------------------------------------------------------------------------------------------- by sequence

RATIOS = torch.tensor([0.9, 1.3, 0.8, 0.7, 1.6])  # products 0.9, 1.17, 0.936, 0.6552, 1.04832


@pytest.mark.parametrize(
    ("lenience", "expected"),
    [
        (1.0, [0.9, 0.9, 0.9, 0.6552, 0.6552]),
        (1.5, [1.0, 1.0, 1.0, 0.9828, 0.9828]),
        (0.5, [0.45, 0.45, 0.45, 0.3276, 0.3276]),
        (0.0, [0.0] * 5),
        (math.inf, [1.0] * 5),
    ],
)
def test_a_sequence_is_kept_with_the_smallest_product_of_ratios_so_far(lenience, expected):
    """By literal products, and by 200 000 rows within five standard deviations of a frequency."""
    rule, num_rows = RatioAcceptance(lenience, level="sequence"), 200_000
    target, draft = (0.3 * RATIOS).log().expand(num_rows, 5), torch.full((num_rows, 5), 0.3).log()
    kept = rule.acceptance_probability(target[0], draft[0], draft[0]).cumprod(-1)
    torch.testing.assert_close(kept, torch.tensor(expected))
    uniforms = torch.rand(num_rows, 5, generator=torch.Generator().manual_seed(0))
    lengths = rule(target, draft, draft, torch.ones(num_rows, 5).bool(), uniforms)
    for length, probability in enumerate(expected, start=1):
        frequency = float((lengths >= length).double().mean())
        assert abs(frequency - probability) <= 5 * math.sqrt(probability * (1 - probability) / num_rows)


def every_text(num_texts, length=4, vocabulary=3):
    """Log-probs of all texts of a length under two random models whose tokens depend on all before them; [num_texts,
    V^length, length] each."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.cartesian_prod(*[torch.arange(vocabulary)] * length)
    models = []
    for _ in range(2):
        columns = []
        for place in range(length):
            table = torch.randn(num_texts, vocabulary**place, vocabulary, generator=generator, dtype=torch.float64)
            before = (texts[:, :place] * vocabulary ** torch.arange(place)).sum(-1)
            columns.append((0.7 * table).log_softmax(-1)[:, before, texts[:, place]])
        models.append(torch.stack(columns, -1))
    return models


@pytest.mark.parametrize("lenience", [0.5, 1.0, 1.5])
def test_no_text_is_kept_more_than_lenience_times_as_often_as_the_policy_says_it(lenience):
    target, draft = every_text(50)
    said = target.cumsum(-1).exp()  # of every prefix
    kept = {
        level: draft.cumsum(-1).exp()
        * RatioAcceptance(lenience, level=level).acceptance_probability(target, draft, draft).cumprod(-1)
        for level in LEVELS
    }
    assert (kept["sequence"] <= lenience * said + 1e-12).all()
    if lenience > 1:  # by token, it compounds
        assert (kept["token"] > lenience * said).any()
    else:
        assert (kept["sequence"] >= kept["token"] - 1e-12).all()
        assert kept["sequence"][..., -1].sum() > 1.1 * kept["token"][..., -1].sum()


def test_a_token_is_tested_with_the_lenience_that_those_before_have_left():
    ratios = torch.tensor([[0.5, 3.0, 0.4, 0.9], [0.9, 0.8, 0.5, 2.0]])
    for lenience in (1.0, 1.4):
        products = torch.tensor([lenience * 1.5, lenience * 0.72])  # of the first two
        kept = torch.stack([torch.ones(2), lenience * ratios[:, 0], products]).amin(0)
        by_sequence = RatioAcceptance(lenience, level="sequence")
        third = by_sequence.acceptance_probability(ratios.log(), torch.zeros(2, 4), torch.zeros(2, 4))[:, 2]
        left = (products / kept).tolist()
        expected = [
            float(RatioAcceptance(rest).acceptance_probability(ratio.log(), torch.zeros(()), torch.zeros(())))
            for rest, ratio in zip(left, ratios[:, 2], strict=True)
        ]
        assert third.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("lenience", [1.0, 1.5, 4.0, math.inf])
def test_what_is_emitted_is_no_farther_from_the_policy_than_the_draft(lenience):
    target, draft = torch.randn(2, 500, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    for row_target, row_draft in zip(target, draft, strict=True):
        emitted = emitted_distribution(RatioAcceptance(lenience), row_target, row_draft)
        assert (emitted - row_target).abs().sum() <= (row_draft - row_target).abs().sum() + 1e-12


def test_changes_that_cancel_out_cost_nothing():
    """As rounding moves every token a little: by token most drafts of 100 are cut, by sequence most are kept whole."""
    noise = 0.05 * torch.randn(1000, 100, generator=torch.Generator().manual_seed(0))
    draft, mask = torch.full((1000, 100), -1.0), torch.ones(1000, 100, dtype=torch.bool)
    uniforms = torch.rand(1000, 100, generator=torch.Generator().manual_seed(1))
    whole = {
        level: float((RatioAcceptance(level=level)(draft + noise, draft, draft, mask, uniforms) == 100).float().mean())
        for level in LEVELS
    }
    assert whole["token"] < 0.2 < 0.6 < whole["sequence"]


# --------------------------------------------------------------------------------------------------- where it is exact


@pytest.mark.parametrize(
    ("draft", "lenience"),
    [
        (TARGET, 1.0),  # nothing has changed
        (TARGET, 3.0),
        (DRAFT, 0.0),  # nothing is kept
        (DRAFT, 0.5),  # lenience * target nowhere exceeds draft: rejection sampling
        (torch.tensor([1 / 8, 1 / 8, 1 / 4, 1 / 2]), 1.0),  # half the target, the rest where the target is never
    ],
)
def test_where_the_ratio_test_is_exact(draft, lenience):
    target = torch.cat([TARGET, torch.zeros(len(draft) - 3)])
    torch.testing.assert_close(emitted_distribution(RatioAcceptance(lenience), target, draft), target)


def test_exact_only_where_the_bounded_ratio_is_constant():
    """The condition of the docstring against the emitted distribution, over random distributions and leniences."""
    generator = torch.Generator().manual_seed(0)
    both_cases = set()
    for seed in range(400):
        target, draft = torch.randn(2, 4, generator=generator, dtype=torch.float64).softmax(-1)
        draft = target if seed % 4 == 0 else draft
        lenience = float(torch.rand((), generator=generator)) * 1.5
        bounded_ratio = (draft / target).clamp(max=lenience)
        is_constant = bool((bounded_ratio.max() - bounded_ratio.min()).abs() < 1e-9)
        emitted = emitted_distribution(RatioAcceptance(lenience), target, draft)
        assert torch.allclose(emitted, target, atol=1e-9) == is_constant
        both_cases.add(is_constant)
    assert both_cases == {True, False}


def residual_distribution(target, draft, lenience):
    missing = target - torch.minimum(draft, lenience * target)
    return missing / missing.sum()


@pytest.mark.parametrize("lenience", [0.25, 0.5, 1.0])
def test_a_residual_continuation_would_be_exact_up_to_lenience_1(lenience):
    accepted = DRAFT * acceptance(RatioAcceptance(lenience), TARGET, DRAFT)
    residual = residual_distribution(TARGET, DRAFT, lenience)
    assert residual.min() >= 0
    torch.testing.assert_close(accepted + (1 - accepted.sum()) * residual, TARGET)


def test_no_continuation_is_exact_once_a_kept_token_is_too_frequent():
    accepted = DRAFT * acceptance(RatioAcceptance(lenience=1.5), TARGET, DRAFT)
    assert (accepted > TARGET).tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ratio_test_keeps_prefixes_with_the_product_of_probabilities(dtype):
    """P(at least n kept) = 0.9 * 0.5 * 0.25 ...; 200 000 rows, a bound of five standard deviations of a frequency."""
    num_rows = 200_000
    accept = torch.tensor([0.9, 0.5, 0.25, 1.0])
    target = (accept * 0.5).log().expand(num_rows, 4)
    draft = torch.full((num_rows, 4), 0.5).log()
    uniforms = torch.rand(num_rows, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)
    lengths = RatioAcceptance()(target, draft, draft, torch.ones(num_rows, 4).bool(), uniforms)
    expected = accept.double().cumprod(0)
    frequency = torch.stack([(lengths >= n).double().mean() for n in (1, 2, 3, 4)])
    assert ((frequency - expected).abs() < 5 * (expected * (1 - expected) / num_rows).sqrt()).all()


def test_random_reuse_cuts_uniformly_from_nothing_to_everything():
    """Four equally likely lengths of a draft of three; five standard deviations of a frequency of 1/4."""
    num_rows = 100_000
    anything, mask = torch.zeros(num_rows, 5), torch.tensor([True, True, True, False, False]).expand(num_rows, 5)
    uniforms = torch.rand(num_rows, 5, generator=torch.Generator().manual_seed(0))
    lengths = RandomReuse()(anything, anything, anything, mask, uniforms)
    frequency = torch.bincount(lengths, minlength=4) / num_rows
    assert len(frequency) == 4
    assert ((frequency - 0.25).abs() < 5 * (0.25 * 0.75 / num_rows) ** 0.5).all()


def test_random_reuse_never_keeps_more_than_there_is():
    """With the largest float32 below 1, at lengths around powers of two, where rounding up would be likeliest."""
    lengths = torch.tensor([1, 2, 3, 4, 1023, 1024, 1025, 4094, 4095, 4096])
    draft_mask = torch.arange(4096) < lengths[:, None]
    draft, uniforms = torch.zeros(10, 4096), torch.full((10, 4096), 1 - 2**-24)
    assert RandomReuse()(draft, draft, draft, draft_mask, uniforms).tolist() == lengths.tolist()


def test_full_and_no_reuse():
    arguments = ([[0.1, 0.1]], [[0.9, 0.9]], [[0.99, 0.99]])
    assert verify(FullReuse(), *arguments) == [2]
    assert verify(NoReuse(), *arguments) == [0]


def test_each_rule_declares_itself():
    rules = [RatioAcceptance(), RatioAcceptance(lenience=0.0), RandomReuse(), FullReuse(), NoReuse()]
    assert [rule.is_exact for rule in rules] == [False, True, False, False, True]
    assert [rule.needs_logprobs for rule in rules] == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lenience": -0.5}, r"lenience must not be negative, got -0\.5"),
        ({"lenience": float("nan")}, "lenience must not be negative, got nan"),
        ({"drift_bound": -1.0}, r"drift_bound must not be negative, got -1\.0"),
        ({"level": "row"}, "level must be 'token' or 'sequence', got 'row'"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RatioAcceptance(**arguments)
