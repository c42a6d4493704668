"""How often the host looks after the rows changes no token."""

import pytest
import torch
from colocated import Colocated

from lit_specrl.engines import TransformersEngine, transformers_engine


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rare_checks_change_no_token(tiny_model, prompts, monkeypatch, temperature):
    colocated = Colocated(TransformersEngine(max_rows=6), tiny_model)
    colocated.sync()
    found = []
    for interval in (1, 5, 16):
        monkeypatch.setattr(transformers_engine, "_steps_between_checks", lambda device, steps=interval: steps)
        reports = []
        rollouts = colocated.generate(prompts, group=4, length=23, temperature=temperature, on_progress=reports.append)
        found.append(rollouts)
        assert (reports[-1].rows_done, reports[-1].num_tokens) == (16, rollouts.num_tokens)
    if temperature:  # some rows end early
        assert {len(response) for response in found[0].response_ids} > {23}
    for other in found[1:]:
        assert other.response_ids == found[0].response_ids
        assert other.finish_reasons == found[0].finish_reasons
        for mine, theirs in zip(other.sampling_logprobs, found[0].sampling_logprobs, strict=True):
            torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs))
