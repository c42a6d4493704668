"""Reward for keeping to a form."""

from __future__ import annotations

import re
from typing import Any

from lit_specrl.rewards.base import Reward


class FormatReward(Reward):
    r"""1 where the whole completion matches a regular expression, 0 elsewhere.

    Some chat templates open a tag for the model: their prompts end with `<think>`. The completion then goes on inside
    the tag, so the pattern is tried on the completion and on the tags at the end of the prompt with the completion.
    Where the prompt is empty, the tag that the completion closes without opening it counts as opened.

    Args:
        pattern: regular expression for the completion without surrounding white space; `.` matches line breaks too.
            Nested repetitions such as `(a+)+` may take exponential time.
        weight: factor of this reward in the total.
        name: name in the logs, "format" by default.

    Example::

        FormatReward("<think>.*</think>.*")(["2+2="], ["<think>easy</think> 4"])  # [1.0]
        FormatReward("<think>.*</think>.*")(["2+2=<think>"], ["easy</think> 4"])   # [1.0]
    """

    def __init__(self, pattern: str, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(weight, name)
        try:
            self.pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"pattern must be a regular expression, got {pattern!r}: {error}") from error

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return [float(self._matches(*row)) for row in zip(prompts, completions, strict=True)]

    def _matches(self, prompt: str, completion: str) -> bool:
        opened = _opened_tags(prompt) if prompt.strip() else _missing_tag(completion)
        texts = [completion, opened + completion]
        return any(self.pattern.fullmatch(text.strip()) for text in texts)


_LAST_TAG = re.compile(r"(<[A-Za-z][\w-]*>)\s*\Z")
MAX_TAGS_LENGTH = 200
"""Characters at the end of a prompt in which opened tags are looked for."""


def _opened_tags(prompt: str) -> str:
    """The tags that end a prompt, as written: of "2+2?<think>\\n", "<think>\\n"; marks such as <|assistant|> are
    none."""
    start = len(prompt)
    while tag := _LAST_TAG.search(prompt, max(0, len(prompt) - MAX_TAGS_LENGTH), start):
        start = tag.start()
    return prompt[start:]


_CLOSING_TAG = re.compile(r"</([A-Za-z][\w-]*)>")


def _missing_tag(completion: str) -> str:
    """The tag that the first closing one belongs to, where it is not there: of "easy</think> 4", "<think>"."""
    closing = _CLOSING_TAG.search(completion)
    if closing is None or f"<{closing[1]}>" in completion[: closing.start()]:
        return ""
    return f"<{closing[1]}>"
