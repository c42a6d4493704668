"""Finding the answer in a text.

Everything here takes time linear in the text: it runs in the training process on whatever a policy writes.
"""

from __future__ import annotations

import re
from functools import lru_cache

ANSWER_FORMATS = ("auto", "boxed", "hash", "number", "text")


def extract_answer(text: str, answer_format: str = "auto") -> str | None:
    r"""Return the answer that `text` gives, or `None` where it gives none.

    A base model may go on with a question of its own. Where a line below the first answer opens one ("Question:",
    "Problem:", "Q:", "Human:", "User:"), the text counts up to there. One answer counts in any case, so that guessing
    several times gains nothing. The formats "number" and "text" take the whole text.

    Args:
        text: a completion or a reference answer.
        answer_format: where the answer stands.
            "boxed": in the last closed `\boxed{...}` or `\fbox{...}`, the inner one of nested boxes;
            "hash": after the last `####`, to the end of the line (GSM8K);
            "number": the last number, with its sign, `$`, `,`, `/`, `%` and exponent, or `\frac`;
            "text": the whole text;
            "auto": the first of these that is there: a box, `####`, "the answer is ...", the last formula between
            `$...$`, `\(...\)` or `\[...\]`, the whole text;
            anything else is a regular expression with one group, whose last match counts, as in "Answer: (.+)".

    Raises:
        ValueError: `answer_format` is neither a known name nor a regular expression with one group.

    Example::

        extract_answer(r"so \boxed{\frac{1}{2}}", "boxed")      # "\\frac{1}{2}"
        extract_answer("3 + 4 = 7\n#### 7", "hash")             # "7"
        extract_answer("Answer: 5 apples", "Answer: (.+)")      # "5 apples"
    """
    check_answer_format(answer_format)
    if answer_format not in ("number", "text"):
        text = _before_next_question(text, answer_format)
    answer: str | None = text
    if answer_format == "auto":
        answer = _boxed(text) or _hash(text) or _stated(text) or _last_formula(text) or text
    elif answer_format == "boxed":
        answer = _boxed(text)
    elif answer_format == "hash":
        answer = _hash(text)
    elif answer_format == "number":
        answer = _last_number(text)
    elif answer_format != "text":
        answer = _last_group(_compile(answer_format), text)
    return (answer or "").strip() or None


def check_answer_format(answer_format: str) -> None:
    """Raise ValueError unless `answer_format` is a known name or a regular expression with one group."""
    if answer_format not in ANSWER_FORMATS:
        _compile(answer_format)


@lru_cache(maxsize=64)
def _compile(pattern: str) -> re.Pattern[str]:
    expected = f"answer_format must be one of {', '.join(ANSWER_FORMATS)} or a regular expression with one group"
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{expected}, got {pattern!r}: {error}") from error
    if compiled.groups != 1:
        raise ValueError(f"{expected} such as 'Answer: (.+)', got {pattern!r} with {compiled.groups} groups")
    return compiled


_QUESTION = re.compile(r"^[ \t#*>]*+(?:Question|Problem|Exercise|Q|Human|User)(?: ?\d++)?\**+:", re.MULTILINE)


def _before_next_question(text: str, answer_format: str) -> str:
    """The text up to a question that opens below the first answer."""
    if not _QUESTION.search(text):
        return text
    if answer_format == "boxed":
        starts = [_first_box_end(text)]
    elif answer_format == "hash":
        starts = [text.find("####")]
    elif answer_format == "auto":
        starts = [_first_box_end(text), text.find("####")]
        if max(starts) < 0:
            starts = [_match_end(_STATEMENT, text)]
    else:
        starts = [_match_end(_compile(answer_format), text)]
    found = [start for start in starts if start >= 0]
    question = _QUESTION.search(text, min(found)) if found else None
    return text[: question.start()] if question else text


def _match_end(pattern: re.Pattern[str], text: str) -> int:
    match = pattern.search(text)
    return match.end() if match else -1


def _last_group(pattern: re.Pattern[str], text: str) -> str | None:
    """The group that took part in the last match."""
    answer = None
    for match in pattern.finditer(text):
        answer = match[match.lastindex or 0]
    return answer


_BOX_TOKENS = re.compile(r"\\(?:boxed|fbox)\s*+\{|\\.|[{}]", re.DOTALL)


def _boxed(text: str) -> str | None:
    """The content of the closed box that opens last; one pass with a stack, so that unclosed boxes cost nothing."""
    open_braces: list[int | None] = []  # where a box's content starts, `None` for a plain brace
    start, end = -1, -1
    for token in _BOX_TOKENS.finditer(text):
        if token[0] == "}":
            opened_at = open_braces.pop() if open_braces else None
            if opened_at is not None and opened_at > start:
                start, end = opened_at, token.start()
        elif token[0].endswith("{") and token[0] != r"\{":
            open_braces.append(token.end() if len(token[0]) > 1 else None)
    return text[start:end] if end >= 0 else None


def _first_box_end(text: str) -> int:
    """Where the box that closes first ends, -1 without one."""
    open_braces: list[bool] = []  # whether it is a box's
    for token in _BOX_TOKENS.finditer(text):
        if token[0] == "}":
            if open_braces and open_braces.pop():
                return token.end()
        elif token[0].endswith("{") and token[0] != r"\{":
            open_braces.append(len(token[0]) > 1)
    return -1


def _hash(text: str) -> str | None:
    _, mark, answer = text.rpartition("####")
    return answer.strip().partition("\n")[0] if mark else None


_STATEMENT = re.compile(r"\banswer\**(?:\s++is\b\s*+\**:?\**|\s*+[:=]\**)\s*+", re.IGNORECASE)
_DISPLAY = re.compile(r"\$\$([^$]+)\$\$|\\\[((?:(?!\\\[).)+?)\\\]", re.DOTALL)
_SENTENCE_END = re.compile(r"\.(?=\s|$)|\n")


def _stated(text: str) -> str | None:
    """What follows the last "the answer is" or "Answer:": a displayed formula, or the rest of the sentence."""
    matches = list(_STATEMENT.finditer(text))
    if not matches:
        return None
    start = matches[-1].end()
    display = _DISPLAY.match(text, start)
    if display:
        return display[display.lastindex or 0]
    end = _SENTENCE_END.search(text, start)
    return text[start : end.start() if end else len(text)].strip("* ")


# A formula never runs over the next opening mark: that keeps the search linear when nothing closes.
_FORMULA = re.compile(
    r"(?<!\\)\$\$([^$]+)\$\$|(?<!\\)\$([^$\n]+)(?<!\\)\$|\\\(((?:(?!\\\().)+?)\\\)|\\\[((?:(?!\\\[).)+?)\\\]",
    re.DOTALL,
)


def _last_formula(text: str) -> str | None:
    return _last_group(_FORMULA, text)


_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})++(?![\d,])|\d++)(?:\.\d++)?|\.\d++)(?:[eE][-+]?\d++)?"
_POWER = r"(?:(?: ?(?:\\times|\\cdot|[*\u00d7]) ?10)?\^(?:\{[-+]?\d++\}|[-+]?\d++))"
_UNSIGNED = rf"\$?+(?:\\[dt]?frac\{{\d++\}}\{{\d++\}}|{_DIGITS}(?: ?/ ?\d++|{_POWER})?)(?:\s?\\?%)?"
_NUMBER = re.compile(rf"(?<![\w.,)}}])[-+]?{_UNSIGNED}|{_UNSIGNED}")
_MINUS_SIGNS = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe58\ufe63\uff0d"), "-")


def plain_minus(text: str) -> str:
    """Return the text with the minus signs and hyphens of Unicode as "-"."""
    return text.translate(_MINUS_SIGNS)


def _last_number(text: str) -> str | None:
    matches = _NUMBER.findall(plain_minus(text))
    return matches[-1] if matches else None
