"""Turns the policy's outputs for responses into samples for a drafter."""

from __future__ import annotations

import torch
import xxhash

from lit_specrl.drafting.distillation.buffer import DistillationSample
from lit_specrl.drafting.networks import DraftNetwork
from lit_specrl.models.capture import CaptureSpec, TeacherOutput
from lit_specrl.types import Experience


class TeacherOutputCollector:
    """Keeps a random choice of the rows that the policy computes. A `Student` of the module.

    Args:
        network: the drafter; its `layers` and `vocabulary` decide what is kept.
        num_top: most likely tokens whose log-probs are kept.
        generator: of the choice.
    """

    def __init__(self, network: DraftNetwork, num_top: int, generator: torch.Generator) -> None:
        self.network, self.num_top, self.generator = network, num_top, generator
        self.fraction = 1.0
        """Share of the rows that is kept."""
        self.num_rows_left: float = torch.inf
        """Rows to choose from; what the policy computes after those is not looked at."""
        self._samples: list[DistillationSample] = []

    def asks(self, part: Experience) -> CaptureSpec | None:
        if self.num_rows_left <= 0:
            return None
        self.num_rows_left -= part.num_rows
        chosen = torch.rand(part.num_rows, generator=self.generator) < self.fraction
        rows = (chosen & part.loss_mask.any(-1).cpu()).nonzero().squeeze(-1).tolist()
        return CaptureSpec(rows, self.network.layers, self.network.vocabulary, self.num_top) if rows else None

    def listens(self, part: Experience, taught: list[TeacherOutput]) -> None:
        for row, features, top_tokens, top_logprobs, log_mass in taught:
            prompt = int(part.prompt_index[row])
            prompt_ids = part.prompt_ids[prompt, part.prompt_mask[prompt]].int().cpu()
            response_ids = part.response_ids[row, part.response_mask[row]].int().cpu()
            sample = DistillationSample(
                uid=xxhash.xxh3_64_hexdigest(prompt_ids.numpy().tobytes()),
                token_ids=torch.cat([prompt_ids, response_ids]),
                num_prompt_tokens=len(prompt_ids),
                features=features,
                top_tokens=top_tokens,
                top_logprobs=top_logprobs,
                log_mass=log_mass,
                reward=float(part.rewards[row]),
                weight=1.0,
                policy_version=part.policy_version,
            )
            self._samples.append(sample)

    def pop(self) -> list[DistillationSample]:
        """What was kept since the last call."""
        samples, self._samples = self._samples, []
        return samples
