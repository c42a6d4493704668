"""Tensors in a file that is complete and belongs to the run, or is not used; a damaged one is set aside.

A safetensors file (never pickle) with a checksum and the identity of what it belongs to. The remaining metadata is JSON
in a tensor of its own, for the header of such a file may not exceed 100 MB.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_specrl.checkpoints.atomic_files import atomic_file
from lit_specrl.checkpoints.locks import delete

RejectionReason = Literal["damaged", "foreign", "unknown version"]
_METADATA = "metadata_json"


class RejectedFileError(Exception):
    """A file could not be used. It was renamed, so that it is neither loaded nor overwritten, unless it is whole.

    Args:
        path: where it was.
        rejected_path: where it is now; `None` for one that belongs to something else, which was left in its place.
        reason: "damaged", "foreign" (it belongs to something else) or "unknown version".
        detail: what was expected and what was found.
    """

    def __init__(self, path: Path, rejected_path: Path | None, reason: RejectionReason, detail: str) -> None:
        fate = "left as it is" if rejected_path is None else f"renamed to {rejected_path.name}"
        super().__init__(f"{path} is not used: {reason} ({detail}); it was {fate}")
        self.path, self.rejected_path, self.reason, self.detail = path, rejected_path, reason, detail


def write_tensor_file(
    path: str | os.PathLike[str],
    tensors: dict[str, Tensor],
    metadata: dict[str, Any],
    identity: dict[str, str],
    version: int,
) -> None:
    """Write a file that appears whole, in place of an older one, whenever the process is killed.

    The bytes go to another name in the same folder, are flushed to the disk, and take the name in one step. The remains
    of a killed process are deleted by the next write.

    Args:
        path: the file.
        tensors: by name, contiguous.
        metadata: anything that JSON can hold.
        identity: what the tensors belong to, such as the name of the model.
        version: of the format.
    """
    encoded = np.frombuffer(json.dumps(metadata).encode(), dtype=np.uint8).copy()
    tensors = {**tensors, _METADATA: torch.from_numpy(encoded)}
    header = {"version": str(version), "identity": json.dumps(identity), "checksum": _checksum(tensors)}
    with atomic_file(Path(path)) as partial:
        save_file(tensors, partial, header)


def read_tensor_file(
    path: str | os.PathLike[str], identity: dict[str, str], version: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `write_tensor_file`.

    Args:
        path: the file.
        identity: what the tensors must belong to.
        version: the format that the caller understands.

    Returns:
        The tensors and the metadata.

    Raises:
        RejectedFileError: the file is damaged or of another version, and has been set aside; or of another identity,
            and has been left for those whom it belongs to.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            _check_header(path, header, identity, version)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (FileNotFoundError, PermissionError, RejectedFileError):
        raise
    except Exception as error:  # safetensors raises all kinds where a header is wrong, and for a folder
        raise set_aside(path, "damaged", f"{type(error).__name__}: {error}") from error
    if header["checksum"] != _checksum(tensors):
        raise set_aside(path, "damaged", "its checksum does not match its content")
    return tensors, json.loads(tensors.pop(_METADATA).numpy().tobytes())


def set_aside(path: str | os.PathLike[str], reason: RejectionReason, detail: str) -> RejectedFileError:
    """Rename a file to `<name>.rejected` and return the error to raise.

    Args:
        path: the file.
        reason: why, in a word.
        detail: what was expected and what was found.
    """
    path = Path(path)
    rejected_path = path.with_name(path.name + ".rejected")
    with suppress(OSError):  # a folder that is read-only; the file is not used in any case
        delete(rejected_path)
        os.replace(path, rejected_path)
    return RejectedFileError(path, rejected_path, reason, detail)


def _check_header(path: Path, header: dict[str, str], identity: dict[str, str], version: int) -> None:
    if not {"version", "identity", "checksum"} <= header.keys():
        raise set_aside(path, "damaged", "its header lacks version, identity or checksum")
    if header["version"] != str(version):
        raise set_aside(path, "unknown version", f"expected version {version}, found {header['version']}")
    try:
        found = dict(json.loads(header["identity"]))
    except (ValueError, TypeError) as error:
        raise set_aside(path, "damaged", "its identity is not a JSON object") from error
    names = sorted(name for name in {*found, *identity} if found.get(name) != identity.get(name))
    if names:
        differences = (f"{name}: expected {identity.get(name)!r}, found {found.get(name)!r}" for name in names)
        raise RejectedFileError(path, None, "foreign", "; ".join(differences))


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        if tensor.numel():  # an empty one may have strides that refuse to be viewed as bytes
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
