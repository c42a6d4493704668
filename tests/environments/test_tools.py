"""Tools of one's own, and TRL's environments as they are."""

import asyncio
import json
from dataclasses import replace

import pytest
from reuse_runs import fit, questions
from tiny_models import CHAT_TEMPLATE, build_tokenizer
from training import grpo

from lit_specrl import Observation, ToolEnvironment
from lit_specrl.callbacks import RolloutCallback


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first.
        b: the second.
    """
    return a + b


class Counter:
    """As TRL takes it: no arguments, `reset` with the columns, public methods are tools."""

    def __init__(self):
        self.count, self.reward = None, 0.0

    def reset(self, **columns) -> str | None:
        self.count, self.columns = 0, columns
        return "Count."

    def increment(self, step: int) -> str:
        """Go on counting.

        Args:
            step: by how much.
        """
        if step < 1:
            raise ValueError("too small")
        self.count += step
        self.reward = float(self.count)
        return f"now {self.count}"

    def _hidden(self):
        raise AssertionError


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_calls_of_a_turn_are_answered_in_one_message():
    environment = ToolEnvironment([add, "json.dumps"])
    assert environment.step("Hm. " + call("add", a=2, b=3) + call("dumps", obj=[1])) == Observation(
        "5\n[1]", role="tool"
    )
    assert environment.step("5") is None


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ('<tool_call>{"name": add}</tool_call>', "error: no JSON: Expecting value"),
        (call("subtract", a=1), "error: expected a name of add and arguments, 'subtract' is missing"),
        (call("add", a=1), "error: add() missing 1 required positional argument: 'b'"),
        ('<tool_call>{"name": ["add"]}</tool_call>', "error: "),
    ],
)
def test_what_a_call_does_wrong_is_told_to_the_policy(said, told):
    assert ToolEnvironment([add]).step(said).text.startswith(told)


def test_what_a_tool_misses_is_its_own_error():
    prices = {}

    def price(city: str) -> int:
        return prices[city]

    assert ToolEnvironment([price]).step(call("price", city="Paris")).text == "error: KeyError('Paris')"


def test_a_copy_is_of_the_class_that_it_is_made_from():
    class Paid(ToolEnvironment):
        def step(self, text):
            said = super().step(text)
            return said and replace(said, reward=self.price)

    environment = Paid(environment_factory=Counter)
    environment.price, environment.said = -0.1, []
    copied = environment.copy()
    copied.said.append("x")
    assert environment.said == []
    copied.reset({})
    assert copied.step(call("increment", step=2)) == Observation("now 2", reward=-0.1, role="tool")
    assert environment.unwrapped.count is None


def test_an_environment_of_trl_runs_as_it_is():
    environment = ToolEnvironment(environment_factory=Counter)
    first, second = environment.copy(), environment.copy()
    assert first.reset({"level": 1}) == "Count." and second.reset({}) == "Count."
    assert first.step(call("increment", step=2) + call("increment", step=0)).text == "now 2\nerror: too small"
    assert first.unwrapped.reward == 2.0 and first.unwrapped.columns == {"level": 1}
    assert second.unwrapped.count == 0 and environment.unwrapped.count is None
    assert [schema["function"]["name"] for schema in environment.schemas] == ["increment"]
    assert first.step(call("_hidden")).text.startswith("error: expected a name of increment")


def test_tools_must_be_there_and_differ():
    with pytest.raises(ValueError, match="ToolEnvironment needs tools, or an environment_factory with public methods"):
        ToolEnvironment()
    with pytest.raises(ValueError, match="2 tools are named 'add'"):
        ToolEnvironment([add, add])
    with pytest.raises(ValueError, match="pattern must have a group"):
        ToolEnvironment([add], pattern="x")


def test_a_run_shows_the_tools_and_asks_rewards_of_trl(make_llama, tmp_path):
    """The schema stands in the prompt; the reward finds the objects."""
    model, tokenizer = make_llama(max_position_embeddings=1024), build_tokenizer()
    tokenizer.chat_template = "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}" + CHAT_TEMPLATE
    tokenizer.save_pretrained(model)
    prompts, found = [], []

    class Look(RolloutCallback):
        def on_rollout_end(self, trainer, pl_module, rollouts):
            prompts.extend(rollouts.prompts.prompts)

    def reward_func(environments, **kwargs):
        found.extend(environments)
        return [environment.reward for environment in environments]

    environment = ToolEnvironment(environment_factory=Counter, pattern="(.)")
    module = grpo(model, [reward_func], environment=environment, max_turns=2, max_completion_length=60)
    fit(module, questions(tmp_path), Look(), max_steps=1)
    assert all(prompt.startswith("[increment]<|user|>") and "\nCount.<|end|>" in prompt for prompt in prompts)
    assert len(found) == 8 and {type(entry) for entry in found} == {Counter} and len(set(map(id, found))) == 8
    assert found[0].columns["answer"] == "5"


async def slow_add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first.
        b: the second.
    """
    await asyncio.sleep(0)
    if a > 100:
        raise ValueError("too large")
    return a + b


class AsyncCounter(Counter):
    async def reset(self, **columns) -> str | None:
        return super().reset(**columns)

    async def increment(self, step: int) -> str:
        """Go on counting.

        Args:
            step: by how much.
        """
        return super().increment(step)


def call(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def test_coroutine_functions_are_awaited():
    def play():
        tools, counter = ToolEnvironment([slow_add]), ToolEnvironment(environment_factory=AsyncCounter).copy()
        return (
            tools.step(call("slow_add", a=2, b=3)).text,
            tools.step(call("slow_add", a=200, b=3)).text,
            counter.reset({}),
            counter.step(call("increment", step=2)).text,
        )

    async def in_a_notebook():
        return play()

    plain = ToolEnvironment(environment_factory=Counter).copy()
    plain.reset({})
    expected = ("5", "error: too large", "Count.", plain.step(call("increment", step=2)).text)
    assert play() == expected
    assert asyncio.run(in_a_notebook()) == expected
