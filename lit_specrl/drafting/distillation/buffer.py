"""The policy's outputs for recent responses, kept to train the drafter."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lit_specrl.checkpoints.tensor_file import read_tensor_file, set_aside, write_tensor_file

FORMAT_VERSION = 1
_LEAST_SCORE = 1e-3

_TENSOR_FIELDS = ("token_ids", "features", "top_tokens", "top_logprobs", "log_mass")
_ROW_FIELDS = ("uid", "num_prompt_tokens", "reward", "weight", "policy_version")


@dataclass(frozen=True, slots=True, eq=False)
class DistillationSample:
    """One response with the policy's outputs for it: P tokens of prompt, R of response.

    The policy's distribution is its whole softmax at the sampling temperature, before any truncation (top-p, top-k), so
    that every log-prob is finite.

    Example: one response token after a prompt of one; the policy gave 0.7 and 0.2 to the tokens 4 and 1 of the draft
    vocabulary, and 0.05 to the rest of it::

        DistillationSample(uid="a1", token_ids=torch.tensor([8, 2], dtype=torch.int32), num_prompt_tokens=1,
               features=torch.zeros(1, 0), top_tokens=torch.tensor([[4, 1]], dtype=torch.int32),
               top_logprobs=torch.tensor([[0.7, 0.2]]).log(), log_mass=torch.tensor([0.95]).log(),
               reward=1.0, weight=1.6, policy_version=4)

    Raises:
        ValueError: a tensor has another shape or type than its field says, or `num_prompt_tokens` is not between 1 and
            P + R.
    """

    uid: str
    """Identity of the prompt."""
    token_ids: Tensor
    """[P + R] int32, prompt then response, in the policy's vocabulary."""
    num_prompt_tokens: int
    """P, at least 1."""
    features: Tensor
    """[P + R - 1, F] bfloat16 or float32, hidden states of the policy at all tokens but the last.

    F = 0 for drafters that need none.
    """
    top_tokens: Tensor
    """[R, k] int32, the k most probable tokens at each response token, as indices into the draft vocabulary."""
    top_logprobs: Tensor
    """[R, k] float32, nats, of these under the policy's whole softmax."""
    log_mass: Tensor
    """[R] float32, nats, log-prob of the whole draft vocabulary under the policy; 0 where every token is in it."""
    reward: float
    """As the reward functions gave it; NaN without a reward."""
    weight: float
    """w(r), how much the response counts (`reward_weights`)."""
    policy_version: int
    """Version of the weights that the features and log-probs belong to."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_prompt_tokens <= self.token_ids.numel():
            raise ValueError(
                f"num_prompt_tokens must be between 1 and the {self.token_ids.numel()} tokens of uid {self.uid!r}, got "
                f"{self.num_prompt_tokens}"
            )
        length, num_responses = len(self), self.num_response_tokens
        k = self.top_tokens.shape[-1] if self.top_tokens.dim() else 0
        feature_size = self.features.shape[-1] if self.features.dim() else 0
        self._check("token_ids", "[P + R]", (length,), torch.int32)
        self._check("features", "[P + R - 1, F]", (length - 1, feature_size), torch.bfloat16, torch.float32)
        self._check("top_tokens", "[R, k]", (num_responses, k), torch.int32)
        self._check("top_logprobs", "[R, k]", (num_responses, k), torch.float32)
        self._check("log_mass", "[R]", (num_responses,), torch.float32)
        if not k:
            raise ValueError(
                f"top_tokens must name at least one token a place, got shape {list(self.top_tokens.shape)}"
            )

    def __len__(self) -> int:
        """P + R."""
        return self.token_ids.numel()

    @property
    def num_response_tokens(self) -> int:
        """R; 0 is allowed, and teaches nothing."""
        return len(self) - self.num_prompt_tokens

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors' entries, in bytes."""
        return sum(getattr(self, name).nbytes for name in _TENSOR_FIELDS)

    def _check(self, name: str, legend: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
        tensor = getattr(self, name)
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(
                f"{name} must be {legend} = {list(shape)} of {expected} for {self.num_prompt_tokens} tokens of prompt "
                f"and {self.num_response_tokens} of response, got {list(tensor.shape)} of "
                f"{str(tensor.dtype).removeprefix('torch.')} for uid {self.uid!r}"
            )


class DistillationBuffer:
    """Keeps the newest samples, the oldest making room when memory runs short.

    Every sample stays until it is evicted or expires, also where several have the same uid: they are different
    responses, or of different policies.

    Args:
        max_bytes: most memory for the tensors of all samples.
        max_age: most versions of the policy that a sample may be behind; 0 keeps only those of the present policy.

    Raises:
        ValueError: `max_bytes` is not positive or `max_age` is negative.

    Example:
        >>> token_ids, top = torch.tensor([8, 2], dtype=torch.int32), torch.tensor([[4, 1]], dtype=torch.int32)
        >>> logprobs = torch.tensor([[-0.4, -1.6]]), torch.tensor([-0.1])
        >>> known = {"reward": 1.0, "weight": 1.6, "policy_version": 4}
        >>> sample = DistillationSample("a1", token_ids, 1, torch.zeros(1, 0), top, *logprobs, **known)
        >>> buffer = DistillationBuffer(max_bytes=10**6, max_age=2)
        >>> buffer.put([sample])
        >>> len(buffer), buffer.num_bytes
        (1, 28)
        >>> buffer.expire(policy_version=7)
        >>> len(buffer)
        0
    """

    def __init__(self, max_bytes: int, max_age: int) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be positive, got {max_bytes}")
        if max_age < 0:
            raise ValueError(f"max_age must be 0 or more versions of the policy, got {max_age}")
        self.max_bytes, self.max_age = max_bytes, max_age
        self.num_evicted = 0
        """Samples that found no room or made room for others so far; an expired one is not one of them."""
        self._samples: deque[DistillationSample] = deque()  # the oldest on the left
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[DistillationSample]:
        """All samples, the oldest first; not copies, so leave them as they are."""
        return iter(self._samples)

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors of all samples, in bytes."""
        return self._num_bytes

    def put(self, samples: Iterable[DistillationSample]) -> None:
        """Copy samples into the buffer, then evict the oldest down to `max_bytes`.

        A sample larger than the whole buffer is not taken, counts as evicted and leaves the others alone.

        Args:
            samples: the oldest first; their tensors may be views, may have a gradient and may come from inference mode.
        """
        for sample in samples:
            if sample.num_bytes > self.max_bytes:
                self.num_evicted += 1
                continue
            self._samples.append(_own(sample))
            self._num_bytes += sample.num_bytes
            while self._num_bytes > self.max_bytes:
                self._num_bytes -= self._samples.popleft().num_bytes
                self.num_evicted += 1

    def expire(self, policy_version: int) -> None:
        """Drop the samples of policies more than `max_age` versions behind.

        Args:
            policy_version: of the present policy.
        """
        self._samples = deque(sample for sample in self if sample.policy_version >= policy_version - self.max_age)
        self._num_bytes = sum(sample.num_bytes for sample in self)

    def draw(
        self, fraction: float, generator: torch.Generator, scores: Tensor | None = None
    ) -> list[DistillationSample]:
        """Some of the samples in random order, none twice.

        With `scores` the next one is each of those that are left with a chance in proportion to its score (weighted
        sampling without replacement by exponential keys, Efraimidis & Spirakis 2006).

        Args:
            fraction: share of the samples, from 0 to 1, rounded up to whole samples.
            generator: decides which ones; on the host where there are scores.
            scores: [N], in the order of the samples, not negative; a score of 0 counts as a thousandth. `None` for
                equal chances.

        Raises:
            ValueError: `fraction` is outside [0, 1].
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must be between 0 and 1, got {fraction}")
        num_drawn = math.ceil(fraction * len(self) - 1e-9)  # 0.07 * 100 is a little more than 7
        order = torch.randperm(len(self), generator=generator, device=generator.device)
        if scores is not None:
            waits = torch.empty(len(self), dtype=torch.float64).exponential_(generator=generator)
            order = (waits / scores.double().clamp(min=_LEAST_SCORE)).argsort(stable=True)
        samples = list(self)
        return [samples[index] for index in order[:num_drawn].tolist()]

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The whole state as tensors and as metadata of lists, dicts, numbers and strings.

        Fit for JSON and for a checkpoint that is loaded with `weights_only=True`. The tensors are not copies, for
        features may fill half of the memory; and each is on its own, because samples of one buffer may differ in k, F
        and the type of the features.

        Returns:
            Per sample and field a tensor, such as "0.features"; and the metadata.
        """
        tensors = {
            f"{index}.{name}": getattr(sample, name) for index, sample in enumerate(self) for name in _TENSOR_FIELDS
        }
        columns = {name: [getattr(sample, name) for sample in self] for name in _ROW_FIELDS}
        return tensors, {"version": FORMAT_VERSION, "num_evicted": self.num_evicted, **columns}

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, Tensor], metadata: dict[str, Any], max_bytes: int, max_age: int
    ) -> DistillationBuffer:
        """A buffer with the state of `to_tensors`.

        Args:
            tensors: of `to_tensors`.
            metadata: of `to_tensors`.
            max_bytes: of the new buffer.
            max_age: of the new buffer; nothing expires before `expire` is called.

        Raises:
            ValueError: another version, or state that does not fit together.
            KeyError: a part is missing.
        """
        if metadata.get("version") != FORMAT_VERSION:
            raise ValueError(f"a sample buffer of version {FORMAT_VERSION} was expected, got {metadata.get('version')}")
        if len(tensors) != len(_TENSOR_FIELDS) * len(metadata["uid"]):
            raise ValueError(
                f"{len(metadata['uid'])} samples of {len(_TENSOR_FIELDS)} tensors were expected, got {len(tensors)} "
                "tensors"
            )
        buffer = cls(max_bytes, max_age)
        rows = zip(*(metadata[name] for name in _ROW_FIELDS), strict=True)
        for index, row in enumerate(rows):
            fields: dict[str, Any] = {name: tensors[f"{index}.{name}"] for name in _TENSOR_FIELDS}
            buffer.put([DistillationSample(**dict(zip(_ROW_FIELDS, row, strict=True)), **fields)])
        buffer.num_evicted += metadata["num_evicted"]
        return buffer

    def save(self, path: str | os.PathLike[str], identity: dict[str, str]) -> None:
        """Write the buffer into a safetensors file that is whole at any moment: the old one or the new one.

        Args:
            path: the file; its folder exists.
            identity: what the tokens and features belong to, such as policy, tokenizer and draft vocabulary.
        """
        tensors, metadata = self.to_tensors()
        write_tensor_file(
            path, {name: tensor.cpu() for name, tensor in tensors.items()}, metadata, identity, FORMAT_VERSION
        )

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], identity: dict[str, str], max_bytes: int, max_age: int
    ) -> DistillationBuffer:
        """Read a file of `save`, completely or not at all.

        Args:
            path: the file.
            identity: what it must belong to.
            max_bytes: of the new buffer.
            max_age: of the new buffer.

        Raises:
            RejectedFileError: the file is damaged or has an unknown version, and has been renamed to `<name>.rejected`;
                or it belongs to something else, and has been left. `reason` says which.
            FileNotFoundError: there is no such file.
            ValueError: `max_bytes` is not positive or `max_age` is negative.
        """
        cls(max_bytes, max_age)  # a wrong setting is not the file's fault
        tensors, metadata = read_tensor_file(path, identity, FORMAT_VERSION)
        try:
            return cls.from_tensors(tensors, metadata, max_bytes, max_age)
        except (KeyError, TypeError, ValueError) as error:  # a sound file of something else
            raise set_aside(path, "damaged", f"not the state of a sample buffer: {error!r}") from error


def _own(sample: DistillationSample) -> DistillationSample:
    """The sample with tensors of its own.

    A view would keep the padded batch alive and a gradient the graph; what inference mode made cannot be trained on.
    """
    with torch.inference_mode(False):
        copies: dict[str, Any] = {name: _copy(getattr(sample, name)) for name in _TENSOR_FIELDS}
    return replace(sample, **copies)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)
