"""From a question to the text the policy sees."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

from jinja2 import TemplateError

QUESTION = "{question}"
_SAID = "\u2417said\u2417"  # stands for a message whose surroundings are wanted


@dataclass(frozen=True)
class PromptTemplate:
    r"""How a question becomes a prompt: by the tokenizer's chat template, or by a plain text.

    Args:
        kind: `chat` for models with a chat template, `plain` for base models.
        system_prompt: first turn of a chat.
        examples: solved questions shown first, each with `question` and `answer`; user and assistant turns in a chat,
            filled-in texts otherwise.
        suffix: instruction appended to every question on a line of its own, such as
            `Please reason step by step, and put your final answer within \boxed{}.`
        text: the plain text; `{question}` stands for the question, other braces are left alone.
        chat_template_kwargs: passed to `apply_chat_template`, such as `{"enable_thinking": False}`.
        date: the day that chat templates see where they write today's date (`strftime_now`), as in Llama 3. It is
            fixed, because the real one would make other prompts of the same questions on the next day: a resumed run
            would lose its place in the data and its prefix cache.

    Raises:
        ValueError: for settings that do not belong together.

    Example:
        >>> PromptTemplate(kind="plain", text="Q: {question}\nA:").render({"question": "2 + 3?"}, tokenizer=None)
        'Q: 2 + 3?\nA:'
    """

    kind: Literal["chat", "plain"] = "chat"
    system_prompt: str | None = None
    examples: list[dict[str, str]] | None = None
    suffix: str | None = None
    text: str = "Question: {question}\nAnswer:"
    chat_template_kwargs: dict[str, Any] | None = None
    date: str = "2024-07-26"

    def __post_init__(self) -> None:
        if self.kind not in ("chat", "plain"):
            raise ValueError(f"kind must be 'chat' or 'plain', got {self.kind!r}")
        if self.kind == "plain" and (self.system_prompt or self.chat_template_kwargs):
            raise ValueError("system_prompt and chat_template_kwargs need kind='chat'; with 'plain' put it into text")
        if QUESTION not in self.text:
            raise ValueError(f"text must contain {QUESTION}, got {self.text!r}")
        try:
            datetime.fromisoformat(self.date)
        except (TypeError, ValueError) as error:
            raise ValueError(f"date must be a day such as '2024-07-26', got {self.date!r}") from error
        for example in self.examples or []:
            if set(example) != {"question", "answer"}:
                raise ValueError(f"each of examples must have 'question' and 'answer', got {sorted(example)}")

    def render(self, row: dict[str, Any], tokenizer: Any) -> str:
        """Return the prompt text of a row with `question` or `messages`; `question` counts where a row has both.

        A conversation that ends with a turn of the assistant is left open there, for the policy to continue that turn.

        Raises:
            ValueError: for a tokenizer without a chat template (kind `chat`), or messages that the kind or the chat
                template cannot show.
        """
        return self._render_chat(row, tokenizer) if self.kind == "chat" else self._render_plain(row)

    def tokenize(self, texts: list[str], tokenizer: Any) -> list[list[int]]:
        """Token ids of rendered prompts, ragged; a chat template writes its own special tokens.

        A plain text gets those that the tokenizer puts before it, unless it begins with them already, but none behind
        it: after an end-of-text token there is nothing to continue.
        """
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        if self.kind == "chat":
            return ids
        opening = opening_tokens(texts[0], tokenizer)
        return [own if own[: len(opening)] == opening else opening + own for own in ids]

    def messages(self, row: dict[str, Any]) -> list[dict[str, str]]:
        """The conversation that a prompt shows: system prompt, examples, the row's own turns with the suffix.

        A plain prompt shows the row's own turn alone.
        """
        turns = self._turns(row)
        if self.kind == "plain":
            return turns
        if self.system_prompt and turns[0]["role"] == "system":
            raise ValueError("the row's messages bring their own system turn; leave out system_prompt")
        opening = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        if turns[0]["role"] == "system":
            opening, turns = turns[:1], turns[1:]
        return [*opening, *self._example_turns(), *turns]

    def with_tools(self, schemas: list[dict[str, Any]]) -> PromptTemplate:
        """The template that shows tools, given as JSON schemas; a plain text shows none."""
        if not schemas or self.kind == "plain":
            return self
        return replace(self, chat_template_kwargs={"tools": schemas} | (self.chat_template_kwargs or {}))

    def with_observation(self, prompt: str, observation: str, tokenizer: Any) -> str:
        """A rendered prompt with the first words of an environment: a line of its own behind the user's, or what
        follows a plain text.

        Raises:
            ValueError: the prompt does not end with a turn of the user.
        """
        if self.kind == "plain":
            return prompt + observation
        closing = self._apply([{"role": "user", "content": _SAID}], tokenizer).partition(_SAID)[2]
        if not prompt.endswith(closing):
            raise ValueError(
                "what an environment says first is added to the user's turn that a prompt ends with, expected "
                f"{closing!r} at its end, got {prompt[-80:]!r}; return None from its reset"
            )
        return f"{prompt.removesuffix(closing)}\n{observation}{closing}"

    def between_turns(self, observation: str, role: str, tokenizer: Any, last_token: int) -> list[int]:
        """Token ids between what the policy has said in a turn and what it says in the next.

        In a chat these are the end of its turn, the observation as a message, and the beginning of the next turn; a
        plain text has the observation alone. What the policy has said is no part of it and is never tokenised again.

        Args:
            observation: of an environment.
            role: whose message it is.
            tokenizer: the policy's.
            last_token: with which the policy has ended its turn; where the chat template writes the same, it is left
                out here.

        Raises:
            ValueError: messages that the chat template cannot show.
        """
        if self.kind == "plain":
            return list(tokenizer(observation, add_special_tokens=False)["input_ids"])
        messages = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": _SAID},
            {"role": role, "content": observation},
        ]
        text = self._apply(messages, tokenizer).partition(_SAID)[2]
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids[1:] if ids[:1] == [last_token] else ids

    def _render_chat(self, row: dict[str, Any], tokenizer: Any) -> str:
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                "this tokenizer has no chat template (base models often have none); use"
                r" PromptTemplate(kind='plain', text='Question: {question}\nAnswer:') or set tokenizer.chat_template"
            )
        messages = self.messages(row)
        return self._apply(messages, tokenizer, continued=messages[-1]["role"] == "assistant")

    def _apply(self, messages: list[dict[str, Any]], tokenizer: Any, continued: bool = False) -> str:
        arguments: dict[str, Any] = {"add_generation_prompt": not continued, "continue_final_message": continued}
        if "strftime_now" in str(tokenizer.chat_template):
            arguments["strftime_now"] = datetime.fromisoformat(self.date).strftime
        arguments |= self.chat_template_kwargs or {}
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(turn["role"] for turn in messages)
            raise ValueError(f"the chat template cannot show messages of {roles}: {str(error)[:200]}") from error

    def _render_plain(self, row: dict[str, Any]) -> str:
        turns = self._turns(row)
        if len(turns) > 1:
            raise ValueError(f"kind='plain' shows one question, but the row has {len(turns)} messages; use kind='chat'")
        shown = [f"{self._fill(example['question'])} {example['answer']}\n\n" for example in self.examples or []]
        return "".join(shown) + self.text.replace(QUESTION, turns[0]["content"])

    def _turns(self, row: dict[str, Any]) -> list[dict[str, str]]:
        """The row's own turns; the last one of the user carries the suffix."""
        turns = list(row_turns(row))
        if self.suffix:
            asking = [n for n, turn in enumerate(turns) if turn["role"] == "user"] or [len(turns) - 1]
            turn = turns[asking[-1]]
            if turn["role"] == "assistant":
                raise ValueError("suffix needs a turn of the user to follow, but the row's messages have none")
            turns[asking[-1]] = {**turn, "content": self._with_suffix(turn["content"])}
        return turns

    def _example_turns(self) -> Iterable[dict[str, str]]:
        for example in self.examples or []:
            yield {"role": "user", "content": self._with_suffix(example["question"])}
            yield {"role": "assistant", "content": example["answer"]}

    def _fill(self, question: str) -> str:
        return self.text.replace(QUESTION, self._with_suffix(question))

    def _with_suffix(self, question: str) -> str:
        return f"{question}\n{self.suffix}" if self.suffix else question


def row_turns(row: dict[str, Any]) -> list[dict[str, str]]:
    """The turns of a row as of `PromptSource.load`, without those of a template."""
    return row["messages"] if row.get("question") is None else [{"role": "user", "content": row["question"]}]


def opening_tokens(text: str, tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before a text, such as the one for its beginning.

    Raises:
        ValueError: for a tokenizer that changes the text where it adds special tokens.
    """
    own, dressed = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer(text)["input_ids"]
    for start in range(len(dressed) - len(own) + 1):
        if dressed[start : start + len(own)] == own:
            return dressed[:start]
    raise ValueError(
        f"the tokenizer reads {text[:80]!r} as {dressed[:20]} with its special tokens and as {own[:20]} without; "
        "expected the same tokens between them"
    )
