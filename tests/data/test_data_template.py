import pytest

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
        ({"text": "Question: {q}"}, r"text must contain \{question\}, got 'Question: \{q\}'"),
        ({"examples": [{"question": "C"}]}, r"each of examples must have 'question' and 'answer', got \['question'\]"),
    ],
)
def test_settings_that_do_not_belong_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PromptTemplate(**arguments)
