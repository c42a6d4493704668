"""From the rows of a data set to tokenised prompts with stable identities."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import xxhash
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_specrl.data.shown_answers import shows_answer
from lit_specrl.data.sources import OWN_COLUMNS
from lit_specrl.data.template import PromptTemplate, row_turns
from lit_specrl.types import PromptBatch

REWARD_ARGUMENTS = {
    "prompts": "the rendered prompts",
    "completions": "the responses",
    "completion_ids": "the tokens of the responses",
    "finish_reason": "why responses ended",
    "answer": "the reference answers",
    "source": "the names of the data sources",
    "prompt_messages": "the conversations that the prompts show",
    "transcripts": "the responses with what their environments have written",
    "turns": "what the policy has said in each turn",
    "environment_reward": "what the environments have given",
    "environments": "the environments of the rows",
    "self": "the reward itself",
}
"""Names under which rewards are given something else than a column of the data."""

OF_ENVIRONMENTS = {"transcripts", "turns", "environment_reward", "environments"}
"""Those that are given with an environment alone."""


def build_prompts(
    rows: dict[str, list[dict[str, Any]]],
    template: PromptTemplate,
    tokenizer: Any,
    max_prompt_length: int,
    overlong: Literal["drop", "raise"] = "drop",
    rewarded: bool = True,
) -> tuple[PromptBatch, int]:
    """Render and tokenise all rows; warns of prompts that show their own answer.

    Args:
        rows: rows as of `PromptSource.load`, by the name of their source.
        template: how a row becomes text.
        tokenizer: the policy's tokenizer.
        max_prompt_length: longest prompt, in tokens.
        overlong: leave longer prompts out, or refuse them.
        rewarded: whether rewards will be given the further columns.

    Returns:
        All prompts as one `PromptBatch`, and how many were left out.

    Raises:
        ValueError: for a row that cannot be rendered, for a column that rewards could not be given, for a prompt that
            is too long under `overlong="raise"`, and when no prompt is short enough.
    """
    for source, source_rows in rows.items():
        if not source_rows:
            raise ValueError(f"source {source!r} is empty; expected at least one row")
        if rewarded:
            _check_column_names(source, {name for row in source_rows for name in further_columns(row)})
    entries = [(source, row) for source, source_rows in rows.items() for row in source_rows]
    texts = [_render(source, row, template, tokenizer) for source, row in entries]
    for source, source_rows in rows.items():
        _warn_of_shown_answers(source, source_rows)
    prompt_ids = template.tokenize(texts, tokenizer)
    kept = [i for i, ids in enumerate(prompt_ids) if len(ids) <= max_prompt_length]
    num_dropped = len(texts) - len(kept)
    if num_dropped and (overlong == "raise" or not kept):
        longest = max(range(len(texts)), key=lambda i: len(prompt_ids[i]))
        raise ValueError(
            f"{num_dropped} of {len(texts)} prompts are longer than max_prompt_length={max_prompt_length} tokens, the "
            f"longest has {len(prompt_ids[longest])} ({texts[longest][:80]!r} ...); raise max_prompt_length"
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
        columns=_filled_up([further_columns(entries[i][1]) for i in kept]),
        messages=[template.messages(entries[i][1]) for i in kept],
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


def further_columns(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of a row as of `PromptSource.load` that only rewards look at.

    Example:
        >>> row = {"question": "2 + 3?", "answer": "5", "level": 1, "messages": [], "columns": {"question": "?"}}
        >>> further_columns(row)
        {'level': 1, 'messages': [], 'question': '?'}
    """
    own = {name: value for name, value in row.items() if name not in OWN_COLUMNS}
    if row.get("question") is not None and "messages" in row:
        own["messages"] = row["messages"]
    return own | row.get("columns", {})


def _filled_up(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the columns of all rows, `None` where one has none: a batch of rows without a column that a reward
    takes must not lack it."""
    names = dict.fromkeys(name for row in rows for name in row)  # in their order
    return [dict.fromkeys(names) | row for row in rows]


def _check_column_names(source: str, names: set[Any]) -> None:
    for name in sorted(names, key=str):
        if not isinstance(name, str):
            raise ValueError(f"source {source!r}: the names of columns must be text, got {name!r}")
        if name in REWARD_ARGUMENTS:
            raise ValueError(
                f"source {source!r}: the data has a column {name!r}, a name under which rewards are given"
                f" {REWARD_ARGUMENTS[name]}. Set `columns` of its FileSource or HubSource to the further columns to keep, without"
                f" it (`columns: []` for none) or under a new name (`columns: {{{name}: data_{name}}}`)"
            )


def _warn_of_shown_answers(source: str, rows: list[dict[str, Any]]) -> None:
    showing = [row for row in rows if shows_answer(row_turns(row), row.get("answer"))]
    if showing:
        end = row_turns(showing[0])[-1]["content"][-80:]
        rank_zero_warn(
            f"source {source!r}: {len(showing)} of {len(rows)} prompts show their own reference answer, such as "
            f"{showing[0]['answer'][:40]!r} in {end!r}; a policy learns to copy it. Name the column with the bare "
            "question by `question`, or take the solution out of the messages."
        )


def _render(source: str, row: dict[str, Any], template: PromptTemplate, tokenizer: Any) -> str:
    asks = row.get("question") is not None or isinstance(row.get("messages"), list)
    turns = row_turns(row) if asks else []
    well_formed = all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in turns
    )
    if not turns or not well_formed or not turns[-1]["content"].strip():
        raise ValueError(
            f"source {source!r}: expected a question as text, or messages with text in 'role' and 'content', got"
            f" {str(row)[:200]}"
        )
    if not isinstance(row.get("answer"), str | None):
        raise ValueError(f"source {source!r}: the answer must be text or None, got {row['answer']!r}")
    text = template.render(row, tokenizer)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"source {source!r}: {ascii(text)[:200]} is no text: {error}; correct the row") from error
    return text
