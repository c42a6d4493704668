"""Classes of transformers that vLLM changes where it runs a model by transformers' own code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_ABSENT = object()


class BorrowedClasses:
    """Gives classes of transformers back as they were, and vLLM's models classes of their own.

    vLLM 0.32 has no code for some families (SmolLM3, OLMo 2) and takes transformers' classes. It puts its compilation
    into the class itself, which is the policy's class, too: the policy then fails for want of vLLM's attributes.
    """

    def __init__(self) -> None:
        self._before: dict[type, tuple[tuple[type, ...], dict[str, Any]]] = {}

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note what the classes are like that vLLM changes meanwhile, and give them back where it raises."""
        from vllm.model_executor.models.transformers import base

        module: Any = base
        original = module.support_torch_compile

        def support_torch_compile(**options: Any) -> Callable[[type], type]:
            def decorate(cls: type) -> type:
                self._before.setdefault(cls, (cls.__bases__, dict(vars(cls))))
                return original(**options)(cls)

            return decorate

        module.support_torch_compile = support_torch_compile
        try:
            yield
        except BaseException:
            self.give_back([])
            raise
        finally:
            module.support_torch_compile = original

    def give_back(self, models: Iterable[torch.nn.Module]) -> None:
        """Restore the classes.

        Args:
            models: vLLM's, whose modules go on as they are.
        """
        for cls, (bases, before) in self._before.items():
            changed = {
                name: value
                for name, value in vars(cls).items()
                if before.get(name, _ABSENT) is not value and name not in ("__dict__", "__weakref__")
            }
            added = tuple(base for base in cls.__bases__ if base not in bases)
            own = type(cls.__name__, (cls, *added), {**changed, "__module__": cls.__module__})
            for module in (module for model in models for module in model.modules() if type(module) is cls):
                module.__class__ = own
            for name in changed:
                if name in before:
                    setattr(cls, name, before[name])
                else:
                    delattr(cls, name)
            cls.__bases__ = bases
        self._before = {}
