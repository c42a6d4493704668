"""Functions that the policy calls, as chat models write calls."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, Self

from transformers.utils import get_json_schema

from lit_specrl.environments.base import Environment, Observation
from lit_specrl.rewards.event_loop import EventLoop
from lit_specrl.rewards.function import import_function

_EVENT_LOOP = EventLoop()  # one for all rows: what belongs to a loop, such as an HTTP session, may be shared by them


class ToolEnvironment(Environment):
    """Runs the tools that a turn calls, and ends with a turn that calls none; takes the environments of TRL.

    A call names a tool and its arguments in JSON, as Qwen and Hermes models write it:
    `<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>`. Results of several calls of a turn are
    lines of one message. Coroutine functions are awaited. What a tool raises, and a call that cannot be read, is told
    to the policy, as in TRL.

    `PromptDataModule` shows the tools to the chat template, which needs types and a docstring with `Args:` for each.

    Args:
        tools: functions, or import paths of functions.
        environment_factory: TRL's: a class, or its import path, that is made without arguments for each row. All of
            its public methods but `reset` are tools; `reset` is given the columns of the row as arguments. Rewards of
            TRL's signature find the objects in `environments`.
        pattern: regular expression of a call; its first group is the JSON.
        role: whose message the results are in a chat template.

    Raises:
        ValueError: no tools, two of one name, an import path that leads nowhere, or a `pattern` without a group.

    Example::

        def add(a: int, b: int) -> int:
            '''Add two numbers.

            Args:
                a: the first.
                b: the second.
            '''
            return a + b

        GRPO(model, rewards=[ExactReward()], environment=ToolEnvironment([add]))
    """

    def __init__(
        self,
        tools: Sequence[Callable[..., Any] | str] = (),
        environment_factory: Callable[[], Any] | str | None = None,
        pattern: str = r"<tool_call>\s*(\{.*?\})\s*</tool_call>",
        role: str = "tool",
    ) -> None:
        self._calls = re.compile(pattern, re.DOTALL)
        if not self._calls.groups:
            raise ValueError(f"pattern must have a group around the JSON of a call, got {pattern!r}")
        self.pattern, self.role = pattern, role
        self._functions = [import_function(tool) if isinstance(tool, str) else tool for tool in tools]
        self._factory = (
            import_function(environment_factory) if isinstance(environment_factory, str) else environment_factory
        )
        self._object: Any = None if self._factory is None else self._factory()
        names = [tool.__name__ for tool in self._tools]
        self.tools = ", ".join(names)
        """Their names."""
        if not names:
            raise ValueError("ToolEnvironment needs tools, or an environment_factory with public methods; got none")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{names.count(name)} tools are named {name!r}; give them different names")

    @property
    def _tools(self) -> list[Callable[..., Any]]:
        methods = [] if self._object is None else inspect.getmembers(self._object, inspect.ismethod)
        own = [method for name, method in methods if not name.startswith("_") and name not in ("reset", "close")]
        return [*self._functions, *own]

    @property
    def schemas(self) -> list[dict[str, Any]]:
        return [get_json_schema(tool) for tool in self._tools]

    @property
    def unwrapped(self) -> Any:
        return self if self._object is None else self._object

    def copy(self) -> Self:
        other = deepcopy(self, {id(value): value for value in (self._functions, self._factory, self._object)})
        other._object = None if self._factory is None else self._factory()
        return other

    def reset(self, row: dict[str, Any]) -> str | None:
        begin = getattr(self._object, "reset", None)
        return None if begin is None else _awaited(begin(**row))

    def step(self, text: str) -> Observation | None:
        calls = [match[1] for match in self._calls.finditer(text)]
        if not calls:
            return None
        return Observation("\n".join(map(self._result, calls)), role=self.role)

    def close(self) -> None:
        end = getattr(self._object, "close", None)
        if end is not None:
            _awaited(end())

    def _result(self, call: str) -> str:
        """What the policy is told of a call."""
        tools = {tool.__name__: tool for tool in self._tools}
        try:
            asked = json.loads(call)
            tool, arguments = tools[asked["name"]], asked.get("arguments", {})
        except json.JSONDecodeError as error:
            return f"error: no JSON: {error}"
        except (KeyError, TypeError) as error:
            return f"error: expected a name of {', '.join(tools)} and arguments, {error} is missing"
        try:
            return str(_awaited(tool(**arguments)))
        except Exception as error:  # of the policy's making, which it may learn to avoid
            return f"error: {error!r}" if isinstance(error, KeyError) else f"error: {error}"


def _awaited(value: Any) -> Any:
    """What a call has returned, or what a coroutine that it has returned gives."""
    if not inspect.isawaitable(value):
        return value
    (result,) = _EVENT_LOOP.gather([value])
    if isinstance(result, BaseException):
        raise result
    return result
