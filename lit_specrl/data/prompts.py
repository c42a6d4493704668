"""From the rows of a data set to tokenised prompts with stable identities."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import xxhash

from lit_specrl.data.template import PromptTemplate
from lit_specrl.types import PromptBatch

OWN_COLUMNS = ("question", "messages", "answer")


def build_prompts(
    rows: dict[str, list[dict[str, Any]]],
    template: PromptTemplate,
    tokenizer: Any,
    max_prompt_length: int,
    overlong: Literal["drop", "raise"] = "drop",
) -> tuple[PromptBatch, int]:
    """Render and tokenise all rows.

    Args:
        rows: rows as of `PromptSource.load`, by the name of their source.
        template: how a row becomes text.
        tokenizer: the policy's tokenizer.
        max_prompt_length: longest prompt, in tokens.
        overlong: leave longer prompts out, or refuse them.

    Returns:
        All prompts as one `PromptBatch`, and how many were left out.

    Raises:
        ValueError: for a row that cannot be rendered, for a prompt that is too long under `overlong="raise"`, and when
            no prompt is short enough.
    """
    entries = [(source, row) for source, source_rows in rows.items() for row in source_rows]
    texts = [_render(source, row, template, tokenizer) for source, row in entries]
    prompt_ids = template.tokenize(texts, tokenizer)
    kept = [i for i, ids in enumerate(prompt_ids) if len(ids) <= max_prompt_length]
    num_dropped = len(texts) - len(kept)
    if num_dropped and (overlong == "raise" or not kept):
        longest = max(range(len(texts)), key=lambda i: len(prompt_ids[i]))
        raise ValueError(
            f"{num_dropped} of {len(texts)} prompts are longer than max_prompt_length={max_prompt_length} tokens, the longest"
            f" has {len(prompt_ids[longest])} ({texts[longest][:80]!r} ...); raise max_prompt_length"
            + (" or set overlong='drop'" if kept else "")
        )
    answers = [entries[i][1].get("answer") for i in kept]
    kept_ids = [list(prompt_ids[i]) for i in kept]
    prompts = PromptBatch(
        uids=prompt_uids(kept_ids, answers),
        prompt_ids=kept_ids,
        prompts=[texts[i] for i in kept],
        answers=answers,
        sources=[entries[i][0] for i in kept],
        columns=[{name: v for name, v in entries[i][1].items() if name not in OWN_COLUMNS} for i in kept],
    )
    return prompts, num_dropped


def prompt_uids(prompt_ids: list[list[int]], answers: list[str | None]) -> list[str]:
    """Identities that survive shuffling and changes to the rest of the data: a hash of prompt tokens and answer.

    Equal rows are told apart by how many came before: `<hash>`, `<hash>-1`, `<hash>-2`.

    Args:
        prompt_ids: [B] token ids, ragged.
        answers: [B] reference answers.
    """
    seen: Counter[str] = Counter()
    uids = []
    for ids, answer in zip(prompt_ids, answers, strict=True):
        key = xxhash.xxh3_64_hexdigest(f"{','.join(map(str, ids))}|{answer!r}".encode())
        uids.append(f"{key}-{seen[key]}" if seen[key] else key)
        seen[key] += 1
    return uids


def _render(source: str, row: dict[str, Any], template: PromptTemplate, tokenizer: Any) -> str:
    messages = row.get("messages") or [{"role": "user", "content": row.get("question")}]
    well_formed = isinstance(messages, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in messages
    )
    if not well_formed or not messages[-1]["content"].strip():
        raise ValueError(
            f"source {source!r}: expected a question as text, or messages with text in 'role' and 'content', got"
            f" {str(row)[:200]}"
        )
    if not isinstance(row.get("answer"), str | None):
        raise ValueError(f"source {source!r}: the answer must be text or None, got {row['answer']!r}")
    return template.render(row, tokenizer)
