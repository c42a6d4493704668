from datetime import datetime

import pytest
import transformers.utils.chat_template_utils as chat_template_utils
from tokenizers.processors import TemplateProcessing

from lit_specrl.data import PromptTemplate

ROW = {"question": "A B"}


def test_chat_opens_the_assistant_turn(tokenizer):
    assert PromptTemplate().render(ROW, tokenizer) == "<user> A B <end>\n<assistant>"


def test_chat_with_system_prompt_examples_suffix_and_template_arguments(tokenizer):
    template = PromptTemplate(
        system_prompt="Q",
        examples=[{"question": "C", "answer": "1"}],
        suffix=r"\boxed{}",
        chat_template_kwargs={"silent": True},
    )
    assert template.render(ROW, tokenizer) == (
        "<system> Q <end>\n<user> C\n\\boxed{} <end>\n<assistant> 1 <end>\n<user> A B\n\\boxed{} <end>\n<assistant> <silent>"
    )


def test_messages_keep_their_turns_and_the_last_carries_the_suffix(tokenizer):
    messages = [
        {"role": "system", "content": "Q"},
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "B"},
    ]
    template = PromptTemplate(suffix="!", examples=[{"question": "C", "answer": "2"}])
    assert template.render({"messages": messages}, tokenizer) == (
        "<system> Q <end>\n<user> C\n! <end>\n<assistant> 2 <end>\n"
        "<user> A <end>\n<assistant> 1 <end>\n<user> B\n! <end>\n<assistant>"
    )
    assert messages[-1] == {"role": "user", "content": "B"}


OPEN = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B 1"}]


def test_a_turn_of_the_assistant_at_the_end_is_continued(tokenizer):
    """It was closed, and a second turn of the assistant opened."""
    assert PromptTemplate().render({"messages": OPEN}, tokenizer) == "<user> A <end>\n<assistant> B 1"
    template = PromptTemplate(system_prompt="Q", suffix="!", examples=[{"question": "C", "answer": "2"}])
    assert template.render({"messages": OPEN}, tokenizer) == (
        "<system> Q <end>\n<user> C\n! <end>\n<assistant> 2 <end>\n<user> A\n! <end>\n<assistant> B 1"
    )
    assert OPEN == [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B 1"}]


def test_the_suffix_goes_to_the_user_also_where_a_tool_speaks_last(tokenizer):
    messages = [{"role": "user", "content": "A"}, {"role": "tool", "content": "B"}]
    rendered = PromptTemplate(suffix="!").render({"messages": messages}, tokenizer)
    assert rendered == "<user> A\n! <end>\n<tool> B <end>\n<assistant>"


def test_a_suffix_without_a_turn_of_the_user_is_refused(tokenizer):
    assert PromptTemplate().render({"messages": OPEN[1:]}, tokenizer) == "<assistant> B 1"
    with pytest.raises(ValueError, match="suffix needs a turn of the user to follow, but the row's messages have none"):
        PromptTemplate(suffix="!").render({"messages": OPEN[1:]}, tokenizer)


@pytest.mark.parametrize(
    "chat_template",
    [
        "{{ raise_exception('roles must alternate') }}{{ messages[0]['content'] }}",
        "{{ messages[0]['content'] }}",  # leaves out the turn to continue
    ],
)
def test_messages_that_the_chat_template_cannot_show_are_refused(tokenizer, chat_template):
    tokenizer.chat_template = chat_template
    with pytest.raises(ValueError, match="the chat template cannot show messages of user, assistant: "):
        PromptTemplate().render({"messages": OPEN}, tokenizer)


def test_the_date_that_a_chat_template_writes_is_the_same_on_every_day(tokenizer, monkeypatch):
    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2)

    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} " + tokenizer.chat_template
    assert PromptTemplate().render(ROW, tokenizer) == "26 Jul 2024 <user> A B <end>\n<assistant>"
    assert PromptTemplate(date="2026-11-27").render(ROW, tokenizer).startswith("27 Nov 2026 ")
    asked = PromptTemplate(chat_template_kwargs={"strftime_now": lambda _: "today"})
    assert asked.render(ROW, tokenizer).startswith("today ")


def test_a_plain_prompt_begins_as_the_tokenizer_begins_and_does_not_end(tokenizer):
    """An end-of-text token ended the prompt of tokenizers that add one."""
    template = PromptTemplate(kind="plain", text="{question}")
    for single, expected in [
        ("<s> $A <end>", [[1, 7, 8], [1, 9]]),
        ("$A <end>", [[7, 8], [9]]),
        ("$A", [[7, 8], [9]]),
        ("<s> <s> $A", [[1, 1, 7, 8], [1, 1, 9]]),
    ]:
        specials = [("<s>", 1), ("<end>", 5)]
        tokenizer._tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=specials)
        assert template.tokenize(["A B", "C"], tokenizer) == expected


def test_a_first_token_that_the_text_brings_itself_is_not_doubled(tokenizer):
    assert PromptTemplate(kind="plain").tokenize(["<s> A", "B"], tokenizer) == [[1, 7], [1, 8]]


def test_plain_text_fills_the_question_only(base_tokenizer):
    template = PromptTemplate(
        kind="plain", text="{x} Q: {question}\nA:", examples=[{"question": "C", "answer": "1"}], suffix="!"
    )
    assert (
        template.render({"question": "{question} B"}, base_tokenizer)
        == "{x} Q: C\n!\nA: 1\n\n{x} Q: {question} B\n!\nA:"
    )


def test_plain_text_takes_a_single_message(base_tokenizer):
    template = PromptTemplate(kind="plain", text="Q: {question}")
    assert template.render({"messages": [{"role": "user", "content": "A"}]}, base_tokenizer) == "Q: A"


def test_chat_tokens_are_those_of_the_chat_template_and_plain_text_gets_the_special_tokens(tokenizer):
    chat, plain = PromptTemplate(), PromptTemplate(kind="plain", text="Q : {question}")
    messages = [{"role": "user", "content": "A B"}]
    chat_ids = chat.tokenize([chat.render(ROW, tokenizer)], tokenizer)
    assert chat_ids == [[2, 7, 8, 5, 3]]
    assert chat_ids == [tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]]
    assert plain.tokenize([plain.render(ROW, tokenizer)], tokenizer) == [[1, 10, 11, 7, 8]]


def test_a_tokenizer_without_chat_template_is_pointed_to_plain_text(base_tokenizer):
    with pytest.raises(ValueError, match=r"no chat template .* use PromptTemplate\(kind='plain'"):
        PromptTemplate().render(ROW, base_tokenizer)


def test_a_second_system_prompt_is_refused(tokenizer):
    with pytest.raises(ValueError, match="bring their own system turn; leave out system_prompt"):
        PromptTemplate(system_prompt="Q").render({"messages": [{"role": "system", "content": "A"}]}, tokenizer)


def test_plain_text_refuses_a_conversation(tokenizer):
    messages = [{"role": "system", "content": "Q"}, {"role": "user", "content": "A"}]
    with pytest.raises(
        ValueError, match="kind='plain' shows one question, but the row has 2 messages; use kind='chat'"
    ):
        PromptTemplate(kind="plain").render({"messages": messages}, tokenizer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "jinja"}, "kind must be 'chat' or 'plain', got 'jinja'"),
        ({"kind": "plain", "system_prompt": "x"}, "system_prompt and chat_template_kwargs need kind='chat'"),
        (
            {"kind": "plain", "chat_template_kwargs": {"a": 1}},
            "system_prompt and chat_template_kwargs need kind='chat'",
        ),
        ({"date": "today"}, "date must be a day such as '2024-07-26', got 'today'"),
        ({"text": "Question: {q}"}, r"text must contain \{question\}, got 'Question: \{q\}'"),
        ({"examples": [{"question": "C"}]}, r"each of examples must have 'question' and 'answer', got \['question'\]"),
    ],
)
def test_settings_that_do_not_belong_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PromptTemplate(**arguments)


CHATML = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}<system>\nQ<end>\n{% endif %}"
    "<{{ message.role }}>\n{{ message.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% if silent %}<silent>{% endif %}{% endif %}"
)
MERGING = (  # as Qwen writes results of tools, with a beginning of its own for each turn, as Llama 3 has it
    "<s>{% for message in messages %}{% if message.role == 'tool' %}<user>\n<tool>{{ message.content }}</tool><end>"
    "{% else %}<{{ message.role }}>\n{{ message.content }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


@pytest.mark.parametrize("role", ["user", "tool"])
@pytest.mark.parametrize("chat_template", [CHATML, MERGING])
def test_turns_joined_are_the_conversation_as_the_template_writes_it(letters, chat_template, role):
    """Prompt, what was said, and what stands between turns make up the tokens of the whole conversation."""
    letters.chat_template = chat_template
    template = PromptTemplate()
    messages, end = [{"role": "user", "content": "A B"}], letters.convert_tokens_to_ids("<end>")
    ids = template.tokenize([template.render({"messages": messages}, letters)], letters)[0]
    for said, observation in [("calc: 1", "2"), ("B", " A\n"), ("", "C")]:
        ids += [*letters(said, add_special_tokens=False)["input_ids"], end]
        ids += template.between_turns(observation, role, letters, end)
        messages += [{"role": "assistant", "content": said}, {"role": role, "content": observation}]
    assert ids == template.tokenize([template.render({"messages": messages}, letters)], letters)[0]


def test_a_turn_that_ends_otherwise_is_closed_as_the_template_does(letters):
    letters.chat_template = CHATML
    between = PromptTemplate().between_turns("2", "user", letters, last_token=letters.convert_tokens_to_ids("<silent>"))
    assert letters.decode(between) == "<end>\n<user>\n2<end>\n<assistant>\n"
    plain = PromptTemplate("plain").between_turns("A B", "user", letters, last_token=5)
    assert plain == letters("A B", add_special_tokens=False)["input_ids"]


def test_a_role_that_the_template_cannot_show_is_refused(letters):
    letters.chat_template = "{% if messages[-1].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}" + CHATML
    with pytest.raises(ValueError, match="the chat template cannot show messages of user, assistant, tool: no tools"):
        PromptTemplate().between_turns("2", "tool", letters, last_token=5)


def test_what_an_environment_says_first_is_a_line_of_the_user(tokenizer):
    template = PromptTemplate(suffix="!", chat_template_kwargs={"silent": True})
    prompt = template.render(ROW, tokenizer)
    expected = "<user> A B\n!\nGo on <end>\n<assistant> <silent>"
    assert template.with_observation(prompt, "Go on", tokenizer) == expected
    assert PromptTemplate("plain").with_observation("Q:", " A", tokenizer) == "Q: A"
    with pytest.raises(ValueError, match="added to the user's turn that a prompt ends with, expected ' <end>"):
        PromptTemplate().with_observation("<user> A B <end>\n<assistant> 1", "Go on", tokenizer)


def test_tools_are_shown_by_chat_templates_alone():
    assert PromptTemplate(chat_template_kwargs={"silent": True}).with_tools([{"a": 1}]).chat_template_kwargs == {
        "silent": True,
        "tools": [{"a": 1}],
    }
    template = PromptTemplate("plain")
    assert template.with_tools([{"a": 1}]) is template
