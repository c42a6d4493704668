"""The newest response to every prompt, kept for the next epoch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_specrl.checkpoints.tensor_file import read_tensor_file, set_aside, write_tensor_file
from lit_specrl.types import FinishReason

FORMAT_VERSION = 2

_TOKEN_DTYPES = {
    "token_ids": np.int32,
    "previous_logprobs": np.float32,
    "generation_logprobs": np.float32,
    "reference_logprobs": np.float32,
}
_OLD_NAMES = {"previous_logprobs": "draft_logprobs"}  # in files of version 0.1
_ROW_FIELDS = ("uid", "sample", "reward", "reward_values", "finish_reason", "policy_version", "step", "num_reuses")
_LATER_ROW_FIELDS = {"num_equal": 0, "data": ""}  # what rows have whose file does not tell
# What Python holds for a row beside the tokens; tests measure that the sum is right.
_ROW_BYTES = 590
_ARRAY_BYTES = 112


@dataclass(frozen=True, slots=True, eq=False)
class CachedRollout:
    """One response with its log-probs and rewards; T tokens.

    Log-probs are float32, so that taking them from here instead of computing them again changes nothing.

    Example: the second of two tokens has become less probable since it was generated::

        CachedRollout(uid="a1", sample=0, token_ids=np.array([8, 2]), previous_logprobs=np.array([-0.1, -0.9]),
                      generation_logprobs=np.array([-0.1, -0.7]), finish_reason="stop", policy_version=4, step=4,
                      reward=1.0, reward_values={"exact": 1.0, "format": None})
    """

    uid: str
    """Identity of the prompt."""
    sample: int
    """Which of the prompt's G rollouts, from 0."""
    token_ids: NDArray[np.int32]
    """[T] end-of-text included when it was generated."""
    previous_logprobs: NDArray[np.float32]
    """[T] nats, as last recorded by the verifier, or when generated: the denominator of the next acceptance test."""
    generation_logprobs: NDArray[np.float32]
    """[T] nats, of each token when it was generated."""
    finish_reason: FinishReason
    """"stop" = end-of-text was generated, "length" = cut at `max_completion_length`."""
    policy_version: int
    """Version of the weights that `previous_logprobs` belong to."""
    step: int
    """Training step of the last write; its age is today's step minus this."""
    num_reuses: int = 0
    """Steps in a row in which the response was offered for reuse; 0 when it was generated afresh."""
    num_equal: int = 0
    """Times in a row that the prompt was answered afresh, and all rewards of its group were equal."""
    reward: float | None = None
    """Weighted sum over the reward functions; `None` where no reward applies."""
    reward_values: dict[str, float | None] | None = None
    """Unweighted rewards by function, `None` where one does not apply; `None` as a whole when not kept."""
    reference_logprobs: NDArray[np.float32] | None = None
    """[T] nats, under the reference model."""
    data: str = ""
    """Digest of the source and the further columns that the rewards belong to (`data_digest`); empty if unknown."""

    def __len__(self) -> int:
        return len(self.token_ids)

    def without_rewards(self) -> CachedRollout:
        """The response, to be rewarded again."""
        return replace(self, reward=None, reward_values=None, num_equal=0)

    @property
    def num_bytes(self) -> int:
        """Memory of the row: 12 bytes a token, 4 more with reference log-probs, and about 900 for the row itself."""
        arrays = (getattr(self, name) for name in _TOKEN_DTYPES)
        return _ROW_BYTES + sum(_ARRAY_BYTES + array.nbytes for array in arrays if array is not None)


class RolloutStore:
    """Keeps the newest response for each prompt and sample index, the oldest making room when memory runs short.

    Args:
        max_bytes: most memory for rows, as counted by `num_bytes`; `None` for no limit.

    Raises:
        ValueError: `max_bytes` is not positive.

    Example:
        >>> tokens, logprobs = np.array([8, 2]), np.array([-0.1, -0.7])
        >>> store = RolloutStore()
        >>> store.put([CachedRollout("a1", 0, tokens, logprobs, logprobs, "stop", policy_version=4, step=4)])
        >>> store.get("a1", 0).token_ids
        array([8, 2], dtype=int32)
        >>> store.get("a1", 1) is None
        True
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(f"max_bytes must be positive, got {max_bytes}; leave it out for no limit")
        self.max_bytes = max_bytes
        self.num_evicted = 0
        """Rows that made room for others so far; an overwritten row is not one of them."""
        self._rows: dict[tuple[str, int], CachedRollout] = {}  # in order of the last write
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[CachedRollout]:
        """All rows, the least recently written first."""
        return iter(self._rows.values())

    @property
    def num_bytes(self) -> int:
        """Memory of all rows, in bytes."""
        return self._num_bytes

    def get(self, uid: str, sample: int) -> CachedRollout | None:
        """The row of a prompt's sample, or `None`; not a copy, so leave it as it is."""
        return self._rows.get((uid, sample))

    def put(self, rows: Iterable[CachedRollout]) -> None:
        """Copy rows into the store, in place of those with the same uid and sample; then evict down to `max_bytes`.

        Args:
            rows: their arrays may be of any numeric type, and views of larger ones.

        Raises:
            ValueError: the arrays of a row differ in length, or its finish reason is unknown; nothing has been stored.
        """
        self._insert([_compact(row) for row in rows])

    @classmethod
    def merge(cls, stores: Iterable[RolloutStore], max_bytes: int | None = None) -> RolloutStore:
        """One store with the rows of all; where several hold the same row, the one of the latest step is taken.

        Args:
            stores: such as those of all ranks of a former run.
            max_bytes: of the new store.
        """
        stores = list(stores)
        merged = cls(max_bytes)
        merged.num_evicted = sum(store.num_evicted for store in stores)
        merged._insert(sorted((row for store in stores for row in store), key=lambda row: row.step))
        return merged

    def split(self, world_size: int, owner: Callable[[str], int]) -> list[RolloutStore]:
        """Distribute the rows over ranks, each store with the limit of this one.

        Args:
            world_size: number of ranks.
            owner: rank of a uid, from 0 to world_size - 1.

        Returns:
            One store per rank; `num_evicted` goes to the first, so that their sum stays right.

        Raises:
            ValueError: `owner` names a rank that does not exist.
        """
        shares: list[list[CachedRollout]] = [[] for _ in range(world_size)]
        for row in self:
            rank = owner(row.uid)
            if not 0 <= rank < world_size:
                raise ValueError(f"owner must return a rank from 0 to {world_size - 1}, got {rank} for uid {row.uid!r}")
            shares[rank].append(row)
        stores = [RolloutStore(self.max_bytes) for _ in shares]
        stores[0].num_evicted = self.num_evicted
        for store, share in zip(stores, shares, strict=True):
            store._insert(share)
        return stores

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The whole state as tensors and as metadata of lists, dicts, numbers and strings.

        Fit for JSON and for a checkpoint that is loaded with `weights_only=True`.

        Returns:
            Per field of tokens, the rows behind one another: [sum of T]; and the metadata.
        """
        rows = list(self)
        tensors = {}
        for name, dtype in _TOKEN_DTYPES.items():
            arrays = [array for row in rows if (array := getattr(row, name)) is not None]
            tensors[name] = torch.from_numpy(np.concatenate([np.empty(0, dtype), *arrays]))
        metadata = {
            "version": FORMAT_VERSION,
            "num_evicted": self.num_evicted,
            "lengths": [len(row) for row in rows],
            "has_reference_logprobs": [row.reference_logprobs is not None for row in rows],
            **{name: [getattr(row, name) for row in rows] for name in (*_ROW_FIELDS, *_LATER_ROW_FIELDS)},
        }
        return tensors, metadata

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, Tensor], metadata: dict[str, Any], max_bytes: int | None = None
    ) -> RolloutStore:
        """A store with the state of `to_tensors`.

        Args:
            tensors: of `to_tensors`.
            metadata: of `to_tensors`.
            max_bytes: of the new store.

        Raises:
            ValueError: another version, or state that does not fit together.
            KeyError: a part is missing.
        """
        if metadata.get("version") != FORMAT_VERSION:
            raise ValueError(f"a rollout store of version {FORMAT_VERSION} was expected, got {metadata.get('version')}")
        num_rows = len(metadata["uid"])
        columns = {name: metadata[name] for name in _ROW_FIELDS}
        columns |= {name: metadata.get(name, [value] * num_rows) for name, value in _LATER_ROW_FIELDS.items()}
        for name in _TOKEN_DTYPES:
            present = metadata.get(f"has_{name}", [True] * num_rows)
            stored = tensors[_OLD_NAMES.get(name, name) if name not in tensors else name]
            columns[name] = _cut(stored.cpu().numpy(), metadata["lengths"], present)
        if any(len(column) != num_rows for column in columns.values()):
            raise ValueError(f"all columns must have {num_rows} rows")
        store = cls(max_bytes)
        store.num_evicted = metadata["num_evicted"]
        store.put(
            CachedRollout(**dict(zip(columns, cells, strict=True))) for cells in zip(*columns.values(), strict=True)
        )
        return store

    def save(self, path: str | os.PathLike[str], identity: dict[str, str]) -> None:
        """Write the store into a safetensors file that is whole at any moment: the old one or the new one.

        Args:
            path: the file; its folder exists.
            identity: what the token ids and log-probs belong to, such as model and tokenizer.
        """
        write_tensor_file(path, *self.to_tensors(), identity, FORMAT_VERSION)

    @classmethod
    def load(cls, path: str | os.PathLike[str], identity: dict[str, str], max_bytes: int | None = None) -> RolloutStore:
        """Read a file of `save`, completely or not at all.

        Args:
            path: the file.
            identity: what it must belong to.
            max_bytes: of the new store.

        Raises:
            RejectedFileError: the file is damaged or has an unknown version, and has been renamed to `<name>.rejected`;
                or it belongs to something else, and has been left. `reason` says which.
            FileNotFoundError: there is no such file.
        """
        tensors, metadata = read_tensor_file(path, identity, FORMAT_VERSION)
        try:
            return cls.from_tensors(tensors, metadata, max_bytes)
        except (KeyError, TypeError, ValueError) as error:  # a sound file of something else
            raise set_aside(path, "damaged", f"not the state of a rollout store: {error!r}") from error

    def _insert(self, rows: list[CachedRollout]) -> None:
        for row in rows:
            self._remove(row.uid, row.sample)
            self._rows[row.uid, row.sample] = row
            self._num_bytes += row.num_bytes
        self._evict()

    def _remove(self, uid: str, sample: int) -> None:
        row = self._rows.pop((uid, sample), None)
        self._num_bytes -= row.num_bytes if row is not None else 0

    def _evict(self) -> None:
        if self.max_bytes is None or self._num_bytes <= self.max_bytes:
            return
        for row in sorted(self, key=lambda row: row.step):  # equal steps stay in order of writing
            if self._num_bytes <= self.max_bytes:
                return
            self._remove(row.uid, row.sample)
            self.num_evicted += 1


def _compact(row: CachedRollout) -> CachedRollout:
    """The row with arrays of its own, in the types of the store."""
    if row.finish_reason not in ("stop", "length"):
        raise ValueError(f"finish_reason must be 'stop' or 'length', got {row.finish_reason!r}")
    arrays: dict[str, Any] = {
        name: np.array(value, dtype=dtype)  # always a copy: a view would keep the padded batch alive
        for name, dtype in _TOKEN_DTYPES.items()
        if (value := getattr(row, name)) is not None
    }
    lengths = {name: array.shape for name, array in arrays.items()}
    if set(lengths.values()) != {(len(row),)}:
        raise ValueError(f"the arrays of a row must have one entry per token, got {lengths} for uid {row.uid!r}")
    return replace(row, **arrays)


def _cut(joined: NDArray[Any], lengths: list[int], present: list[bool]) -> list[NDArray[Any] | None]:
    """Undo the concatenation of the rows where `present` is True."""
    if len(lengths) != len(present) or sum(n for n, there in zip(lengths, present, strict=True) if there) != len(
        joined
    ):
        raise ValueError(f"lengths of rows do not add up to the {len(joined)} tokens that are there")
    pieces: list[NDArray[Any] | None] = []
    start = 0
    for length, there in zip(lengths, present, strict=True):
        pieces.append(joined[start : start + length] if there else None)
        start += length if there else 0
    return pieces
