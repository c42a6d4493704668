import dataclasses

import pytest
import torch

from lit_specrl.checkpoints.tensor_file import RejectedFileError, write_tensor_file
from lit_specrl.drafting.distillation.buffer import DistillationBuffer, DistillationSample

IDENTITY = {"policy": "tiny", "draft_vocabulary": "64"}
ROW_BYTES = 4 * 5 + 2 * 4 * 3 + 8 * 3 * 2 + 4 * 3  # of the fixture's sample as it is


@pytest.fixture
def sample():
    """Builds a sample of P prompt and R response tokens with random entries; features are bfloat16."""
    generator = torch.Generator().manual_seed(0)

    def build(uid="a", prompt=2, response=3, k=2, feature_size=3, policy_version=0, **fields):
        length = prompt + response
        defaults = {
            "token_ids": torch.randint(99, (length,), generator=generator, dtype=torch.int32),
            "features": torch.randn(length - 1, feature_size, generator=generator).bfloat16(),
            "top_tokens": torch.randint(64, (response, k), generator=generator, dtype=torch.int32),
            "top_logprobs": -torch.rand(response, k, generator=generator),
            "log_mass": -torch.rand(response, generator=generator),
            "reward": 1.0,
            "weight": 1.5,
        }
        return DistillationSample(
            uid=uid, num_prompt_tokens=prompt, policy_version=policy_version, **(defaults | fields)
        )

    return build


@pytest.fixture
def varied_lessons(sample):
    """Other k, F and type of features; no features; no response; a reward of NaN, and numbers that are no round
    ones."""
    return [
        sample("a", prompt=1, response=2, k=4, feature_size=5, policy_version=3),
        sample("b-1", feature_size=0, reward=float("nan"), weight=0.1),
        sample("a", features=torch.tensor([[0.1], [-1e-30], [3e38], [0.0]]), reward=1 / 3, policy_version=2),
        sample("c", response=0),
    ]


@pytest.fixture
def path(tmp_path, varied_lessons):
    buffer_of(varied_lessons).save(tmp_path / "samples.safetensors", IDENTITY)
    return tmp_path / "samples.safetensors"


def buffer_of(samples, max_bytes=10**6, max_age=2):
    buffer = DistillationBuffer(max_bytes, max_age)
    buffer.put(samples)
    return buffer


def plain(samples):
    """Everything as values that can be compared; NaN equals NaN."""
    names = [field.name for field in dataclasses.fields(DistillationSample)]
    cells = [[getattr(sample, name) for name in names] for sample in samples]
    return [
        [(str(cell.dtype), list(cell.shape), cell.tolist()) if torch.is_tensor(cell) else repr(cell) for cell in row]
        for row in cells
    ]


def uids(samples):
    return [sample.uid for sample in samples]


def rejection(path, identity=IDENTITY):
    with pytest.raises(RejectedFileError) as caught:
        DistillationBuffer.load(path, identity, max_bytes=10**6, max_age=2)
    if caught.value.reason == "foreign":
        assert path.exists() and caught.value.rejected_path is None
    else:
        assert not path.exists() and caught.value.rejected_path.exists()
    return caught.value


def test_lengths_and_memory_of_a_lesson(sample):
    assert (len(sample()), sample().num_response_tokens, sample().num_bytes) == (5, 3, ROW_BYTES)
    assert sample(features=torch.zeros(4, 0)).num_bytes == ROW_BYTES - 24


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": 0}, "num_prompt_tokens must be between 1 and the 3 tokens of uid 'a', got 0"),
        ({"prompt": 6, "token_ids": torch.zeros(5, dtype=torch.int32)}, "between 1 and the 5 tokens of uid 'a', got 6"),
        ({"token_ids": torch.zeros(5)}, r"token_ids must be \[P \+ R\] = \[5\] of int32 .*, got \[5\] of float32"),
        ({"token_ids": torch.zeros(1, 5, dtype=torch.int32)}, r"token_ids must .* got \[1, 5\]"),
        ({"features": torch.zeros(5, 3)}, r"features must be \[P \+ R - 1, F\] = \[4, 3\] .*, got \[5, 3\] of float32"),
        ({"features": torch.zeros(4)}, r"features must be .* got \[4\]"),
        (
            {"features": torch.zeros(4, 3).half()},
            "of bfloat16 or float32 for 2 tokens of prompt and 3 of response, got .* float16 for uid 'a'",
        ),
        (
            {"top_tokens": torch.zeros(3, 2, dtype=torch.long)},
            r"top_tokens must be \[R, k\] = \[3, 2\] of int32 .* int64",
        ),
        ({"top_tokens": torch.zeros(5, 2, dtype=torch.int32)}, r"top_tokens must be .* got \[5, 2\]"),
        ({"top_logprobs": torch.zeros(3, 1)}, r"top_logprobs must be \[R, k\] = \[3, 2\]"),
        ({"top_logprobs": torch.zeros(3, 2).double()}, "top_logprobs must be .* float64"),
        ({"log_mass": torch.zeros(3, 1)}, r"log_mass must be \[R\] = \[3\]"),
        ({"log_mass": torch.zeros(3).bfloat16()}, "log_mass must be .* bfloat16"),
        ({"k": 0}, r"top_tokens must name at least one token a place, got shape \[3, 0\]"),
    ],
)
def test_a_lesson_whose_parts_do_not_fit(sample, fields, message):
    with pytest.raises(ValueError, match=message):
        sample(**fields)


def test_the_oldest_make_room(sample):
    buffer = buffer_of([sample(uid) for uid in "abc"], max_bytes=3 * ROW_BYTES)
    assert (uids(buffer), buffer.num_bytes, buffer.num_evicted) == (["a", "b", "c"], 3 * ROW_BYTES, 0)
    buffer.put([sample("d", response=4)])
    assert (uids(buffer), buffer.num_evicted) == (["c", "d"], 2)
    assert buffer.num_bytes == sum(row.num_bytes for row in buffer)
    buffer.put([sample(uid) for uid in "efgh"])
    assert (uids(buffer), buffer.num_evicted, buffer.num_bytes) == (["f", "g", "h"], 5, 3 * ROW_BYTES)


def test_the_first_to_go_is_the_first_put_not_the_one_of_the_oldest_policy(sample):
    samples = [sample("a", policy_version=9), sample("b", policy_version=1)]
    assert uids(buffer_of(samples, max_bytes=ROW_BYTES)) == ["b"]


def test_lessons_of_one_prompt_stay_side_by_side(sample):
    same = sample("a")
    assert uids(buffer_of([same, sample("a"), same])) == ["a", "a", "a"]


def test_a_lesson_larger_than_the_buffer_leaves_the_others_alone(sample):
    buffer = buffer_of([sample("a"), sample("b", response=9), sample("c")], max_bytes=2 * ROW_BYTES)
    assert (uids(buffer), buffer.num_evicted, buffer.num_bytes) == (["a", "c"], 1, 2 * ROW_BYTES)


def test_lessons_of_old_policies_expire(sample):
    buffer = buffer_of([sample(str(version), policy_version=version) for version in (4, 1, 3, 2, 7)], max_age=2)
    buffer.expire(policy_version=5)
    assert (uids(buffer), buffer.num_bytes, buffer.num_evicted) == (["4", "3", "7"], 3 * ROW_BYTES, 0)
    buffer.expire(policy_version=10)
    assert (len(buffer), buffer.num_bytes) == (0, 0)


def test_with_age_zero_only_the_present_policy_counts(sample):
    buffer = buffer_of([sample("a", policy_version=4), sample("b", policy_version=5)], max_age=0)
    buffer.expire(policy_version=5)
    assert uids(buffer) == ["b"]


@pytest.mark.parametrize(("fraction", "num_drawn"), [(0.0, 0), (0.001, 1), (0.07, 7), (0.071, 8), (1.0, 100)])
def test_a_draw_is_rounded_up_and_has_no_lesson_twice(sample, fraction, num_drawn):
    buffer = buffer_of(sample(str(index)) for index in range(100))
    drawn = uids(buffer.draw(fraction, torch.Generator().manual_seed(0)))
    assert len(drawn) == len(set(drawn)) == num_drawn
    assert set(drawn) <= set(uids(buffer)) and len(buffer) == 100


def test_the_generator_decides_what_is_drawn(sample):
    buffer = buffer_of(sample(str(index)) for index in range(20))
    generator = torch.Generator().manual_seed(0)
    first, second = uids(buffer.draw(0.5, generator)), uids(buffer.draw(0.5, generator))
    assert uids(buffer.draw(0.5, torch.Generator().manual_seed(0))) == first
    assert first not in (second, uids(buffer)[:10])


def test_an_empty_buffer_has_nothing_to_draw():
    assert DistillationBuffer(1, 0).draw(1.0, torch.Generator()) == []


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_fraction_that_is_none(fraction):
    with pytest.raises(ValueError, match="fraction must be between 0 and 1, got"):
        DistillationBuffer(1, 0).draw(fraction, torch.Generator())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"max_bytes": 0}, "max_bytes must be positive, got 0"), ({"max_age": -1}, "max_age must be 0 or more")],
)
def test_settings_that_make_no_sense(path, settings, message):
    settings = {"max_bytes": 10**6, "max_age": 2} | settings
    with pytest.raises(ValueError, match=message):
        DistillationBuffer(**settings)
    with pytest.raises(ValueError, match=message):
        DistillationBuffer.load(path, IDENTITY, **settings)
    assert path.exists()


def test_lessons_are_copies_of_their_own_size(sample):
    """A view would keep the padded batch alive, and would change with it."""
    batch = torch.randn(6, 100, 3)
    (kept,) = buffer_of([sample(features=batch[2, :4])])
    expected = batch[2, :4].clone()
    batch += 1
    torch.testing.assert_close(kept.features, expected, rtol=0, atol=0)
    for name in ("token_ids", "features", "top_tokens", "top_logprobs", "log_mass"):
        tensor = getattr(kept, name)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_lessons_leave_their_graph_behind(sample):
    hidden = torch.randn(4, 3, requires_grad=True)
    (kept,) = buffer_of([sample(features=hidden * 2)])
    assert not kept.features.requires_grad


def test_lessons_of_inference_mode_can_be_trained_on(sample):
    buffer = DistillationBuffer(10**6, max_age=2)
    with torch.inference_mode():
        buffer.put([sample(features=torch.randn(4, 3))])
    (kept,) = buffer
    weight = torch.ones(3, requires_grad=True)
    (kept.features * weight).sum().backward()
    torch.testing.assert_close(weight.grad, kept.features.sum(0))


def test_the_state_round_trips(varied_lessons):
    buffer = buffer_of([*varied_lessons, varied_lessons[0]])
    buffer.num_evicted = 7
    loaded = DistillationBuffer.from_tensors(*buffer.to_tensors(), max_bytes=10**5, max_age=1)
    assert plain(loaded) == plain(buffer)
    assert (loaded.num_bytes, loaded.num_evicted, loaded.max_bytes, loaded.max_age) == (buffer.num_bytes, 7, 10**5, 1)


def test_a_smaller_buffer_takes_the_newest(sample):
    state = buffer_of([sample(uid) for uid in "abc"]).to_tensors()
    loaded = DistillationBuffer.from_tensors(*state, max_bytes=2 * ROW_BYTES, max_age=2)
    assert (uids(loaded), loaded.num_evicted) == (["b", "c"], 1)


@pytest.mark.parametrize("missing", ["0.features", "3.log_mass"])
def test_a_state_without_a_tensor(varied_lessons, missing):
    tensors, metadata = buffer_of(varied_lessons).to_tensors()
    tensors["x"] = tensors.pop(missing)
    with pytest.raises(KeyError, match=missing):
        DistillationBuffer.from_tensors(tensors, metadata, 10**6, 2)


@pytest.mark.parametrize(
    "names", [("uid",), ("reward",), ("uid", "num_prompt_tokens", "reward", "weight", "policy_version")]
)
def test_a_state_that_has_lost_a_row(varied_lessons, names):
    tensors, metadata = buffer_of(varied_lessons).to_tensors()
    with pytest.raises(ValueError, match=r"expected|shorter"):
        DistillationBuffer.from_tensors(tensors, metadata | {name: metadata[name][:-1] for name in names}, 10**6, 2)


def test_a_saved_buffer_is_loaded_whole(path, varied_lessons):
    loaded = DistillationBuffer.load(path, IDENTITY, max_bytes=10**6, max_age=2)
    assert plain(loaded) == plain(varied_lessons)
    assert [file.name for file in path.parent.iterdir()] == ["samples.safetensors"]


def test_loaded_lessons_do_not_depend_on_the_file(path, varied_lessons):
    loaded = DistillationBuffer.load(path, IDENTITY, max_bytes=10**6, max_age=2)
    path.write_bytes(bytes(path.stat().st_size))
    assert plain(loaded) == plain(varied_lessons)


def test_an_empty_buffer_is_saved_too(tmp_path):
    DistillationBuffer(1, 0).save(tmp_path / "empty", {})
    assert len(DistillationBuffer.load(tmp_path / "empty", {}, 1, 0)) == 0


def test_a_damaged_file_is_set_aside(path):
    whole = path.read_bytes()
    for position in range(0, len(whole), 97):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        rejection(path)
        path.write_bytes(whole[:position])
        assert rejection(path).reason == "damaged"


def test_lessons_of_another_policy_are_left_to_it(path):
    error = rejection(path, IDENTITY | {"policy": "large"})
    assert (error.reason, error.detail) == ("foreign", "policy: expected 'large', found 'tiny'")


def test_an_unknown_version_is_set_aside(path):
    write_tensor_file(path, {}, {}, IDENTITY, version=2)
    assert rejection(path).reason == "unknown version"


def test_a_sound_file_of_something_else_is_set_aside(path):
    write_tensor_file(path, {}, {"version": 1}, IDENTITY, version=1)
    assert rejection(path).reason == "damaged"


def test_a_missing_file_is_not_a_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        DistillationBuffer.load(tmp_path / "none", IDENTITY, 1, 0)


def test_samples_of_a_high_score_are_drawn_sooner(sample):
    """First one drawn with chances of 1 : 2 : 5, and of a score of 0 hardly ever."""
    buffer = DistillationBuffer(max_bytes=10**6, max_age=1)
    buffer.put(sample(uid=uid) for uid in "abcd")
    scores, generator = torch.tensor([0.1, 0.2, 0.5, 0.0]), torch.Generator().manual_seed(0)
    drawn = [[one.uid for one in buffer.draw(1.0, generator, scores)] for _ in range(2000)]
    assert all(sorted(uids) == ["a", "b", "c", "d"] for uids in drawn)
    shares = [sum(uids[0] == uid for uids in drawn) / 2000 for uid in "abcd"]
    assert shares == pytest.approx([0.125, 0.25, 0.625, 0.001], abs=0.03)  # three standard deviations


def test_the_same_generator_draws_the_same_by_scores(sample):
    buffer = DistillationBuffer(max_bytes=10**6, max_age=1)
    buffer.put(sample(uid=str(number)) for number in range(20))
    scores = torch.arange(20.0)
    twice = [[one.uid for one in buffer.draw(0.3, torch.Generator().manual_seed(5), scores)] for _ in range(2)]
    assert twice[0] == twice[1] and len(twice[0]) == 6
