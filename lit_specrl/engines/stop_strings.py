"""Stop strings, found in the tokens of a response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_MARGIN = 4  # tokens before a stop string, for the bytes of a character and a blank that some tokenizers leave out


class StopStrings:
    """Finds the token that completes a stop string; a `TextEnd`.

    The text is that of the response alone, special tokens included, so that a stop string may be one. A token may go on
    behind the stop string that it completes.

    Args:
        tokenizer: of the policy.
        stop: texts that end a response.

    Example: with a token for each character, the sixth completes the stop string::

        StopStrings(tokenizer, ["###"])(tokenizer("Hi ###!").input_ids)  # 6
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        # a token adds a byte at least
        self.reach = max(len(text.encode()) for text in stop) - 1 + _MARGIN
        self._completing = self._tokens_with({text[-1] for text in stop})

    def __call__(self, token_ids: Sequence[int], start: int = 0) -> int | None:
        """Tokens up to and including the first, from `start` on, that completes a stop string, or `None`."""
        for place in range(start, len(token_ids)):
            if self._completing is not None and token_ids[place] not in self._completing:
                continue
            text = self._tokenizer.decode(token_ids[max(0, place - self.reach) : place + 1], skip_special_tokens=False)
            if any(stop in text for stop in self._stop):
                return place + 1
        return None

    def _tokens_with(self, characters: set[str]) -> frozenset[int] | None:
        """Tokens whose text has one of these; `None` for all, where a token's own text does not tell."""
        if any(not character.isascii() or character == " " for character in characters):
            return None
        texts = self._tokenizer.batch_decode([[token] for token in range(len(self._tokenizer))])
        return frozenset(token for token, text in enumerate(texts) if characters & set(text))
