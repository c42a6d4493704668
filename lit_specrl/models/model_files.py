"""Whether the folder of a model is whole, before any weights are read."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from lit_specrl.models.model_name import hub_options

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_INDEX = "model.safetensors.index.json"
_LONGEST_HEADER = 100_000_000  # bytes, of safetensors
_ANSWER_S = 10.0  # seconds that the hub may take; its own client tries for half a minute, file by file


def is_out_of_reach(name_or_path: str) -> bool:
    """Whether a model is neither a local folder nor cached, and the hub does not answer, or does not know it."""
    if Path(name_or_path).is_dir():
        return False
    revision = hub_options(name_or_path).get("revision")
    try:
        if isinstance(try_to_load_from_cache(name_or_path, "config.json", revision=revision), str):
            return False
        if constants.HF_HUB_OFFLINE:
            return True
        HfApi().model_info(name_or_path, revision=revision, timeout=_ANSWER_S)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return True
    except HfHubHTTPError:  # it answers; transformers knows the rest
        return False
    except Exception:  # of whatever client it has; a name that cannot be one of the hub
        return True
    return False


def check_weights(folder: str | Path) -> None:
    """Refuse a folder whose weights are missing or cut.

    Args:
        folder: of a model; what is no folder, or holds weights in another format than safetensors, is left to
            transformers.

    Raises:
        ValueError: which file, and how it is wrong.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    files = _listed(folder) or sorted(folder.glob("*.safetensors"))
    if not files and not any(folder.glob("*.bin")):
        raise ValueError(f"the model folder {folder} has no weights (*.safetensors); copy them there")
    for file in files:
        if not file.is_file():
            there = len([other for other in files if other.is_file()])
            raise ValueError(
                f"the model folder {folder} lacks {file.name} ({there} of {len(files)} files are there); copy it there"
            )
        expected, found = _expected_size(file), file.stat().st_size
        if expected != found:
            what = "is no safetensors file" if expected is None else f"should have {expected} bytes and has {found}"
            raise ValueError(f"{file} {what}; it was probably cut when it was copied: fetch it again")


def check_tokenizer(folder: str | Path) -> None:
    """Refuse a folder of a model without its tokenizer.

    Raises:
        ValueError: there is none.
    """
    if Path(folder).is_dir() and not any((Path(folder) / name).is_file() for name in _TOKENIZERS):
        raise ValueError(
            f"the model folder {folder} has no tokenizer (tokenizer.json); copy the tokenizer's files there"
        )


def _listed(folder: Path) -> list[Path]:
    """Files of weights in the index of a model that has several."""
    index = folder / _INDEX
    if not index.is_file():
        return []
    try:
        return [folder / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} is no index of weights ({type(error).__name__}: {error}); fetch it again") from error


def _expected_size(file: Path) -> int | None:
    """Bytes that a safetensors file should have by its header; `None` where it has none."""
    try:
        with file.open("rb") as content:
            (length,) = struct.unpack("<Q", content.read(8))
            if length > _LONGEST_HEADER:
                return None
            if length > file.stat().st_size:
                return 8 + length
            header = json.loads(content.read(length))
        return (
            8
            + length
            + max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        )
    except (struct.error, ValueError, KeyError, TypeError):
        return None
