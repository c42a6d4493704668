"""The token by which a chat template ends a turn of the assistant."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

_CONTENT = "lit specrl"  # a template may trim blanks at its ends


def end_of_turn_id(tokenizer: Any) -> int | None:
    """Id of the special token that the chat template writes behind the content of an assistant turn.

    `None` for a tokenizer without a template, and for a template that writes none there.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    turns = [{"role": "user", "content": "lit"}, {"role": "assistant", "content": _CONTENT}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except (TemplateError, ValueError):  # of templates for other conversations
        return None
    _, found, rest = text.rpartition(_CONTENT)
    rest = rest.lstrip()
    special = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    fitting = [content for content in special if content and rest.startswith(content)]
    return special[max(fitting, key=len)] if found and fitting else None
