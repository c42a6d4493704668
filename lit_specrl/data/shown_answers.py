"""Prompts that give their own answer away, such as a worked solution among the turns of a conversation."""

from __future__ import annotations

import re

from lit_specrl.answers import extract_answer

_BOX = re.compile(r"(?=\\(?:boxed|fbox)\s*\{)")
_SOLUTION = re.compile(
    r"^[^\w\n]{0,9}(?:solution|explanation|reasoning)[^\w\n]{0,9}(?:$|[:.])", re.IGNORECASE | re.MULTILINE
)
_STATEMENT = re.compile(r"\banswer\**(?:\s+is\b|\s*[:=])\**:?\s*", re.IGNORECASE)
_WORD_START = re.compile(r"^|[\s=:$(]")
_UNSPOKEN = re.compile(r"[\s$*!]|\\[,;!]|\\left\b|\\right\b|(?<=\d),(?=\d{3})|\\text\s*\{\s*\}")


def shows_answer(turns: list[dict[str, str]], answer: str | None) -> bool:
    r"""Whether the question, or what follows it, gives the reference answer as an answer.

    That is in a box, behind `####`, at the end behind "the answer is" or "Answer:", at the end of a text with a heading
    such as "Solution:", or at the end of a turn of the assistant that the policy shall continue. Numbers and words of a
    question that merely equal the answer do not count, and neither do turns before the last question, which may be
    solved examples.

    Args:
        turns: the row's own messages, with `role` and `content`.
        answer: the reference answer; may itself be a worked solution.

    Example:
        >>> [shows_answer([{"role": "user", "content": text}], "5") for text in (r"2+3? It is \boxed{5}.", "Is 5 odd?")]
        [True, False]
    """
    if answer is None:
        return False
    wanted = {_plain(text) for text in (answer, *_marked(answer))} - {""}
    asked = max((n for n, turn in enumerate(turns) if turn["role"] == "user"), default=0)
    return any(
        any(_plain(text) in wanted for text in _marked(turn["content"]))
        or ((turn["role"] == "assistant" or _SOLUTION.search(turn["content"])) and _ends_in(turn["content"], wanted))
        for turn in turns[asked:]
    )


def _marked(text: str) -> list[str]:
    """What a text marks as answers."""
    found = [extract_answer(part, "boxed") for part in _BOX.split(text)[1:]]
    found.append(extract_answer(text, "hash"))
    found += [text[statement.end() :] for statement in list(_STATEMENT.finditer(text))[-1:]]
    return [answer for answer in found if answer]


def _ends_in(text: str, wanted: set[str]) -> bool:
    """Whether the last words of a text, or what follows the last mark such as `=`, are the answer."""
    end = text[-500:]
    return any(_plain(end[start.end() :]) in wanted for start in _WORD_START.finditer(end))


def _plain(text: str) -> str:
    """A text without what does not matter to its meaning, to be compared."""
    text = re.sub(r"\\[dt]frac\b", r"\\frac", text.strip())
    return _UNSPOKEN.sub("", text).casefold().rstrip(".")
