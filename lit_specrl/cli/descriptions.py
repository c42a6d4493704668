"""What docstrings say of classes and arguments, read from the source: nothing is imported."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from docstring_parser import parse


@dataclass
class Description:
    """What a class is for, and what its arguments mean."""

    text: str = ""
    arguments: dict[str, str] = field(default_factory=dict)

    @property
    def first_sentence(self) -> str:
        paragraph = " ".join(self.text.partition("\n\n")[0].split())
        return re.split(r"(?<!et al)(?:\.|:) (?=[A-Z`])", paragraph)[0].rstrip(".")


@lru_cache
def description(class_path: str) -> Description:
    """Of one class without its bases.

    Args:
        class_path: module and name.
    """
    module, _, name = class_path.rpartition(".")
    for node in ast.walk(_source(module)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            texts = [ast.get_docstring(node)] + [
                ast.get_docstring(part)
                for part in node.body
                if isinstance(part, ast.FunctionDef) and part.name == "__init__"
            ]
            parsed = [parse(text) for text in texts if text]
            arguments = {one.arg_name: one.description or "" for doc in parsed for one in doc.params}
            text = next(filter(None, texts), "").partition("\n\nArgs:")[0].partition("\n\nExample")[0]
            return Description(text.strip(), {name: " ".join(text.split()) for name, text in arguments.items()})
    return Description()


@lru_cache
def _source(module: str) -> ast.Module:
    package, *parts = module.split(".")
    spec = find_spec(package)  # of the top: others would be imported on the way
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder, *parts)
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return ast.parse(file.read_text("utf-8"))
    return ast.Module([], [])
