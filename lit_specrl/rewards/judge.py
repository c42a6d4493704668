"""Reward by a judge: a language model behind an HTTP endpoint."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import time
import warnings
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lit_specrl.rewards.base import Reward, Scores
from lit_specrl.rewards.chat_client import ChatClient, RequestFailed, RequestsRefused, check_base_url

MAX_SUCCESSIVE_FAILURES = 3
"""Calls in a row of which no row was judged, before the run ends: without rewards it learns nothing."""
DEFAULT_PROMPT = """Question:
{question}

Reference answer:
{answer}

Response to be judged:
{completion}

How good is the response, from 0 (wrong or useless) to 10 (right and clear)? Explain in one sentence, then end with a
line `Score: N`."""
SCORE = r"(?i)score\W{0,5}?(-?\d+(?:\.\d+)?)"
_FIELD = re.compile(r"\{(question|prompt|completion|answer)\}")


class JudgeReward(Reward):
    r"""The score that a language model gives a completion, asked over an OpenAI-compatible endpoint (vLLM, SGLang,
    hosted ones).

    All rows of a step are asked at the same time, at most `max_concurrency` at once. An attempt that fails by the
    network, a time-out or a busy server is repeated. A row that gets no answer (`failures`), or one without a score in
    the range (`unparsed`), counts as "does not apply" (`None`). The third call in a row without any judged row ends the
    run, as does a server that refuses every request (401, 403, 404).

    A judge seldom says the same twice: rows that a `PrefixCache` keeps whole keep their score, unless it has
    `reuse_rewards=False`.

    Args:
        model: name of the judge at the server.
        base_url: address of the server with its version, such as "http://localhost:8000/v1".
        prompt: what the judge is asked. `{question}` stands for the last turn of the user, `{prompt}` for the rendered
            prompt, `{completion}` for the response, `{answer}` for the reference, "(none)" where there is none.
        system_prompt: first turn of the conversation with the judge.
        score: regular expression with one group around the score, whose last match counts.
        score_key: name of the score in a JSON object of the judge's answer; then `score` is unused.
        lowest: score that becomes reward 0.
        highest: score that becomes reward 1.
        max_concurrency: requests in flight.
        timeout_s: seconds for one attempt.
        deadline_s: seconds for all rows of a step; rows without a score by then get none.
        max_retries: further attempts for a row.
        backoff_s: seconds before the first of them; doubled each time. A `Retry-After` of the server counts instead.
        api_key_env: environment variable that holds the key. The key itself is neither logged nor saved.
        options: further fields of the request, such as `{"temperature": 0.0, "max_tokens": 300}`.
        weight: factor of this reward in the total.
        name: name in the logs, "judge" by default.

    Raises:
        ValueError: an argument out of its range, or an environment variable that is not set.

    Example::

        JudgeReward("Qwen/Qwen3-32B", "http://judge:8000/v1", score_key="score", highest=5)
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        prompt: str = DEFAULT_PROMPT,
        system_prompt: str | None = None,
        score: str = SCORE,
        score_key: str | None = None,
        lowest: float = 0.0,
        highest: float = 10.0,
        max_concurrency: int = 16,
        timeout_s: float = 60.0,
        deadline_s: float = 600.0,
        max_retries: int = 3,
        backoff_s: float = 1.0,
        api_key_env: str | None = None,
        options: dict[str, Any] | None = None,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        check_base_url(base_url)
        if "{completion}" not in prompt:
            raise ValueError(f"prompt must contain {{completion}}, got {prompt[:80]!r}")
        if score_key is None and _num_groups(score) != 1:
            raise ValueError(f"score must be a regular expression with one group, got {score!r}")
        if not lowest < highest:
            raise ValueError(f"lowest must be less than highest, got {lowest} and {highest}")
        for argument, number in {"timeout_s": timeout_s, "deadline_s": deadline_s}.items():
            if not 0 < number < math.inf:
                raise ValueError(f"{argument} must be a positive number of seconds, got {number}")
        if max_concurrency < 1 or max_retries < 0 or backoff_s < 0:
            raise ValueError(
                "expected max_concurrency >= 1, max_retries >= 0 and backoff_s >= 0, got "
                f"{max_concurrency}, {max_retries} and {backoff_s}"
            )
        if api_key_env is not None and not os.environ.get(api_key_env):
            raise ValueError(f"api_key_env names the environment variable {api_key_env!r}, which is not set")
        self.model, self.base_url, self.prompt, self.system_prompt = model, base_url, prompt, system_prompt
        self.score, self.score_key, self.lowest, self.highest = score, score_key, lowest, highest
        self.max_concurrency, self.deadline_s, self.options = max_concurrency, deadline_s, dict(options or {})
        self._client = ChatClient(base_url, timeout_s, max_retries, backoff_s, api_key_env)
        self._threads: ThreadPoolExecutor | None = None
        self._num_successive_failures = 0

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> Awaitable[Scores]:
        answers = columns.get("answer") or [None] * len(prompts)
        messages = columns.get("prompt_messages") or [[]] * len(prompts)
        questions = [self._question(*row) for row in zip(prompts, messages, completions, answers, strict=True)]
        return self._judge(questions)

    def close(self) -> None:
        """End the threads that wait for answers."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        self._threads = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_threads": None}  # which cannot be copied

    def _made_by(self) -> dict[str, Any]:
        """Return what the scores depend on: the judge, what it is asked, and how its answer is read."""
        names = ("model", "prompt", "system_prompt", "score", "score_key", "lowest", "highest", "options")
        return {name: getattr(self, name) for name in names}

    async def _judge(self, questions: list[str]) -> Scores:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.max_concurrency, "judge")
        loop, deadline = asyncio.get_running_loop(), time.monotonic() + self.deadline_s
        asked = [loop.run_in_executor(self._threads, self._ask, question, deadline) for question in questions]
        await asyncio.wait(asked, timeout=self.deadline_s)
        self.counters = {"failures": 0, "unparsed": 0, "retries": 0}
        read = [self._outcome(request) for request in asked]
        self._watch([score for score, _ in read], next((reason for _, reason in reversed(read) if reason), ""))
        return [score for score, _ in read]

    def _outcome(self, request: asyncio.Future[tuple[str, int]]) -> tuple[float | None, str]:
        """The score of a row, or why it has none."""
        if not request.done():
            request.add_done_callback(lambda late: late.cancelled() or late.exception())  # nobody else asks
            request.cancel()
            self.counters["failures"] += 1
            return None, f"no answer within deadline_s={self.deadline_s:g}"
        try:
            text, num_retries = request.result()
        except RequestsRefused as error:
            raise RuntimeError(f"{error}; check base_url, model and api_key_env") from None
        except RequestFailed as error:
            self.counters["failures"] += 1
            return None, str(error)
        self.counters["retries"] += num_retries
        score = self.read(text)
        if score is not None:
            return score, ""
        self.counters["unparsed"] += 1
        return None, f"no score between {self.lowest:g} and {self.highest:g} in {text[-80:]!r}"

    def _ask(self, question: str, deadline: float) -> tuple[str, int]:
        opening = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        turns = [*opening, {"role": "user", "content": question}]
        return self._client.ask({"model": self.model, "messages": turns, **self.options}, deadline)

    def _question(self, prompt: str, turns: list[dict[str, str]], completion: str, answer: str | None) -> str:
        asked = [turn["content"] for turn in turns if turn["role"] == "user"]
        fields = {
            "question": asked[-1] if asked else prompt,
            "prompt": prompt,
            "completion": completion,
            "answer": "(none)" if answer is None else answer,
        }
        return _FIELD.sub(lambda match: fields[match[1]], self.prompt)  # at once, so that no text fills another

    def read(self, text: str) -> float | None:
        """The reward that an answer of the judge gives, or `None` where it holds no score in the range.

        Example:
            >>> JudgeReward("judge", "http://localhost/v1").read("Right, but long. Score: 8")
            0.8
        """
        found = _json_score(text, self.score_key) if self.score_key else _last_match(self.score, text)
        if found is None or not self.lowest <= found <= self.highest:
            return None
        return (found - self.lowest) / (self.highest - self.lowest)

    def _watch(self, scores: list[float | None], reason: str) -> None:
        """Warn of rows that were not judged, and end a run that is never judged."""
        num_unjudged = scores.count(None)
        if num_unjudged < len(scores):
            self._num_successive_failures = 0
        else:
            self._num_successive_failures += 1
        if self._num_successive_failures >= MAX_SUCCESSIVE_FAILURES:
            raise RuntimeError(
                f"{self._num_successive_failures} calls in a row gave no scores, the last one by {reason}"
            )
        if num_unjudged:
            warnings.warn(
                f"reward {self.name!r}: {num_unjudged} of {len(scores)} rows were not judged and count as None, the "
                f"last one by {reason}",
                stacklevel=2,
            )


def _num_groups(pattern: str) -> int:
    """Of a regular expression; 0 where it is none."""
    try:
        return re.compile(pattern).groups
    except re.error:
        return 0


def _last_match(pattern: str, text: str) -> float | None:
    matches = re.findall(pattern, text)
    return _number(matches[-1]) if matches else None


def _json_score(text: str, key: str) -> float | None:
    """Of the last JSON object of a text that has the key."""
    decoder = json.JSONDecoder()
    for start in reversed([match.start() for match in re.finditer(r"\{", text)]):
        try:
            value, _ = decoder.raw_decode(text[start:])
        except ValueError:
            continue
        if key in value:
            return _number(value[key])
    return None


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
