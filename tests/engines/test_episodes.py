"""Rollouts of several turns by both engines: what a row is made of, and that it is what the policy says there."""

import itertools
from dataclasses import replace

import pytest
import torch
from colocated import policy_logprobs, with_engines
from tiny_models import build_tokenizer

from lit_specrl.data import PromptTemplate
from lit_specrl.drafting.scheduler.length_schedule import DecodeStep
from lit_specrl.engines import TransformersEngine
from lit_specrl.engines.episodes import TurnTaking
from lit_specrl.engines.stop_strings import StopStrings
from lit_specrl.environments import Environment, Observation
from lit_specrl.seeds import turn_seed
from lit_specrl.timing import StageTimer
from lit_specrl.types import PromptBatch, RolloutRequest, SamplingConfig

ONE_OF_EACH = ["transformers-llama", "vllm-llama"]
QUESTIONS, GROUP, LIMIT = ["Hi", "Why?", "2 + 3"], 4, 90
TOKENIZER = build_tokenizer()
END = TOKENIZER.eos_token_id


def ids_of(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


class Replies(Environment):
    """Says `reply` to the first turns."""

    def __init__(self, reply="ab", times=2, first=None):
        self.reply, self.times, self.first, self.heard = reply, times, first, []

    def reset(self, row):
        self.row = row
        return self.first

    def step(self, text):
        self.heard.append(text)
        return Observation(self.reply, reward=0.25) if len(self.heard) <= self.times else None


def request_of(engine, prompts, limit=LIMIT):
    """Of chat prompts; seeds count up from 0."""
    sampling = SamplingConfig(GROUP, limit)
    return RolloutRequest(prompts, sampling, list(range(len(prompts) * GROUP)), engine.policy_version)


def chat(questions=QUESTIONS):
    texts = [PromptTemplate().render({"question": question}, TOKENIZER) for question in questions]
    size = len(texts)
    return PromptBatch(
        [f"q{i}" for i in range(size)],
        list(map(ids_of, texts)),
        texts,
        ["5"] * size,
        ["s"] * size,
        [{"level": 1}] * size,
    )


def play(colocated, environment, max_turns=8, limit=LIMIT, questions=QUESTIONS, template=None):
    turns = TurnTaking(
        environment, max_turns, template or PromptTemplate(), TOKENIZER, skip_special_tokens=False, max_length=200
    )
    episodes = turns.begin(chat(questions), SamplingConfig(GROUP, limit))
    request = request_of(colocated.engine, episodes.prompts, limit)
    return episodes.play(request, colocated.engine, StageTimer(), lambda progress: None)


def segments(rollouts, row):
    """Tokens of policy and environment by turns: (whether the environment wrote them, tokens)."""
    found = []
    for token, observed in zip(rollouts.response_ids[row], rollouts.episodes[row].observation_mask, strict=True):
        if not found or found[-1][0] != observed:
            found.append((observed, []))
        found[-1][1].append(token)
    return found


@with_engines(ONE_OF_EACH)
def test_a_row_is_what_was_said_and_what_the_template_writes_between(colocated):
    """And the log-probs are those of the policy at every token that it has said, NaN at the others."""
    rollouts = play(colocated, Replies())
    num_turns = []
    for row, episode in enumerate(rollouts.episodes):
        parts = segments(rollouts, row)
        said = [tokens for observed, tokens in parts if not observed]
        assert [observed for observed, _ in parts] == [bool(n % 2) for n in range(len(parts))]
        assert len(said) == len(parts) // 2 + 1
        for (_, before), (_, between) in zip(parts[::2], parts[1::2], strict=False):
            assert before[-1] in colocated.engine.stop_token_ids
            # the end of the turn is in the row once: the policy's, or the template's where the policy ended otherwise
            closing = "" if before[-1] == END else "<|end|>"
            assert between == ids_of(f"{closing}<|user|>ab<|end|><|assistant|>")
        heard = episode.environment.heard  # not a turn that was cut
        assert episode.turns == TOKENIZER.batch_decode(said) and heard == episode.turns[: len(heard)]
        assert episode.reward == (0.25 * min(2, len(heard)) or None)
        assert len(rollouts.response_ids[row]) <= LIMIT
        num_turns.append(len(said))
    assert set(rollouts.finish_reasons) <= {"stop", "length"}
    assert num_turns.count(3) > 4  # with two observations
    observed = torch.tensor([flag for episode in rollouts.episodes for flag in episode.observation_mask])
    sampled = torch.tensor([logprob for row in rollouts.sampling_logprobs for logprob in row])
    assert torch.equal(sampled.isnan(), observed)
    torch.testing.assert_close(
        sampled[~observed], policy_logprobs(colocated.policy, rollouts, 1.0)[~observed], rtol=1e-4, atol=1e-4
    )
    assert rollouts.num_generated_tokens == int((~observed).sum())


@with_engines(ONE_OF_EACH)
def test_a_turn_is_what_the_engine_says_to_all_before_as_a_prompt(colocated):
    """With the same seed; the first turn is that of a rollout without an environment, later ones have other draws."""
    rollouts = play(colocated, Replies())
    alone = colocated.engine.generate(request_of(colocated.engine, chat()))
    first_turns = [
        ids[: episode.first_turn_length] for ids, episode in zip(rollouts.response_ids, rollouts.episodes, strict=True)
    ]
    assert first_turns == alone.response_ids
    rows = [row for row, episode in enumerate(rollouts.episodes) if len(episode.turns) == 3]
    for turn in (1, 2):
        for row in rows[:3]:
            parts = segments(rollouts, row)
            context = [token for _, tokens in parts[: 2 * turn] for token in tokens]
            prompt = rollouts.prompts.prompt_ids[row // GROUP] + context
            single = PromptBatch(["x"], [prompt], [""], [None], [""])
            request = RolloutRequest(
                single, SamplingConfig(1, LIMIT - len(context)), [turn_seed(row, turn)], colocated.engine.policy_version
            )
            assert colocated.engine.generate(request).response_ids == [parts[2 * turn][1]]


@with_engines(ONE_OF_EACH)
def test_a_stop_string_ends_a_turn_and_is_not_looked_for_in_earlier_ones(colocated):
    """Nor in what the environment says."""
    stop = [text for text in play(colocated, Replies()).episodes[0].turns[0][:4] if text.strip()][:1]
    turns = TurnTaking(
        Replies(reply=stop[0] * 2), 8, PromptTemplate(), TOKENIZER, skip_special_tokens=False, max_length=200
    )
    episodes = turns.begin(chat(), SamplingConfig(GROUP, LIMIT))
    request = request_of(colocated.engine, episodes.prompts)
    request.sampling = replace(request.sampling, stop=stop)
    request.text_end = StopStrings(TOKENIZER, stop)
    rollouts = episodes.play(request, colocated.engine, StageTimer(), lambda progress: None)
    said = [ids for row in range(len(rollouts.episodes)) for observed, ids in segments(rollouts, row) if not observed]
    assert all(stop[0] not in TOKENIZER.decode(ids[:-1]) for ids in said)
    assert sum(stop[0] in TOKENIZER.decode(ids[-1:]) for ids in said) > 2
    assert max(len(episode.turns) for episode in rollouts.episodes) == 3
    assert all(
        len(ids) == len(episode.observation_mask)
        for ids, episode in zip(rollouts.response_ids, rollouts.episodes, strict=True)
    )


@with_engines(ONE_OF_EACH)
def test_rows_are_cut_by_their_tokens_and_by_their_turns(colocated):
    """Where an observation leaves no room to say a token it is left out."""
    first = colocated.engine.generate(request_of(colocated.engine, chat(), 20))
    long = play(colocated, Replies("x" * 20), limit=20)
    assert long.response_ids == first.response_ids
    assert set(long.finish_reasons) == {"length"} and all(long.truncated)
    twice = play(colocated, Replies(times=5), max_turns=2)
    rows = list(zip(twice.finish_reasons, twice.episodes, strict=True))
    ends = {(reason, len(episode.turns)) for reason, episode in rows}
    assert ("turns", 2) in ends and ends <= {("turns", 2), ("length", 1), ("length", 2)}
    assert {len(episode.environment.heard) for reason, episode in rows if reason == "turns"} == {2}


@with_engines(["transformers-llama"])
def test_what_an_environment_says_first_is_part_of_the_prompt(colocated):
    rollouts = play(colocated, Replies(first="Go"), questions=["Hi"])
    assert rollouts.prompts.prompts == ["<|user|>Hi\nGo<|end|><|assistant|>"]
    assert rollouts.prompts.prompt_ids == [ids_of("<|user|>Hi\nGo<|end|><|assistant|>")]
    assert rollouts.prompts.uids[0].startswith("q0+") and rollouts.prompts.uids != ["q0+"]
    row = rollouts.episodes[0].environment.row
    assert row == {"level": 1, "prompt": "<|user|>Hi<|end|><|assistant|>", "answer": "5", "source": "s"}


@with_engines(["transformers-llama"])
def test_the_steps_of_all_turns_are_told(colocated, monkeypatch):
    """Speculation is judged by them: they were those of the last turn alone, as each call of the engine forgets."""
    engine, asked = colocated.engine, []
    continue_rows = engine.continue_rows

    def counting(request, rows, meter):
        asked.append(len(rows))
        engine.decode_steps = [DecodeStep(num_active=len(rows), length=0, seconds=0.1, num_tokens=len(rows))]
        return continue_rows(request, rows, meter)

    monkeypatch.setattr(engine, "continue_rows", counting)
    rollouts = play(colocated, Replies())
    assert [step.num_active for step in engine.decode_steps] == asked
    turns = [len(episode.turns) for episode in rollouts.episodes]
    assert asked == [sum(number > turn for number in turns) for turn in range(3)]  # rows that have ended cost nothing


@with_engines(["transformers-llama"])
def test_several_threads_answer_as_one_does(colocated):
    class Threaded(Replies):
        num_threads = 4

    one, four = play(colocated, Replies()), play(colocated, Threaded())
    assert one.response_ids == four.response_ids


@with_engines(["transformers-llama"])
def test_what_goes_wrong_names_the_row(colocated):
    class Breaks(Replies):
        def step(self, text):
            raise KeyError("nothing")

    with pytest.raises(
        RuntimeError, match=r"Breaks.step raised KeyError: 'nothing'; in row \d of the prompt .*\(uid q\d\)"
    ):
        play(colocated, Breaks())

    numbers = itertools.count(1)

    class Counts(Replies):
        def reset(self, row):
            return str(next(numbers))

    with pytest.raises(ValueError, match=r"Counts.reset must return the same for all rows of a group.*got '1'"):
        play(colocated, Counts())
    with pytest.raises(
        ValueError, match="with what Replies says first has 176 tokens, 110 fit; raise max_prompt_length"
    ):
        play(colocated, Replies(first="x" * 170), questions=["Hi"])

    class Wrong(Replies):
        def step(self, text):
            return 5

    with pytest.raises(TypeError, match=r"Wrong.step must return .*, got 5 of type int; in row \d of .*\(uid q\d\)"):
        play(colocated, Wrong())

    class KnowsNoTools(PromptTemplate):
        def between_turns(self, observation, role, tokenizer, last_token):
            raise ValueError(f"the chat template cannot show messages of {role}")

    with pytest.raises(
        RuntimeError,
        match=r"Replies.step has answered cannot be shown: .* messages of user; in row \d of .*\(uid q\d\)",
    ):
        play(colocated, Replies(), template=KnowsNoTools())


def test_a_row_that_has_ended_costs_nothing_however_it_ends():
    """Whether its prefix ends in a stop token does not matter in a later turn."""
    engine = TransformersEngine()
    engine.stop_token_ids = frozenset({2})
    request = replace(request_of(engine, chat(["Hi"])), prefixes=[[5, 2], [5], [5, 2], [5]])
    assert [engine.finish_reason(request, row) for row in range(4)] == ["stop", None, "stop", None]
    request.ended = {1: "turns", 2: "stop"}
    assert [engine.finish_reason(request, row) for row in range(4)] == [None, "turns", "stop", None]
