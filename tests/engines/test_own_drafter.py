"""A drafter from a user's own file, in the running engine."""

import importlib

import pytest
from colocated import Colocated

from lit_specrl.cli.fit import train as command_line
from lit_specrl.engines import VLLMEngine

OWN_DRAFTER = """
from lit_specrl.drafting import LookUpDrafter


class LastSeen(LookUpDrafter):
    def __init__(self, num_speculative_tokens: int = 3, default: int = 7) -> None:
        super().__init__(num_speculative_tokens)
        self.default = default

    def propose(self, token_ids, length):
        ids = token_ids.tolist()
        places = [place for place in range(len(ids) - 1) if ids[place] == ids[-1]]
        return ids[places[-1] + 1 :][:length] if places else [self.default]
"""
PROMPTS = [[1, 5, 9, 30, 31, 9, 30, 31, 9], [4, 4, 8, 4, 4, 8, 4, 4], [7, 50, 51, 52]]


@pytest.fixture
def own_drafters(tmp_path, monkeypatch):
    (tmp_path / "own_drafters.py").write_text(OWN_DRAFTER)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("own_drafters")


def generate(folder, drafter):
    """Greedy responses, and the steps of the engine."""
    engine = VLLMEngine(dtype="float32", max_num_seqs=8, cpu_kv_cache_gib=0.25)
    engine.drafter = drafter
    colocated = Colocated(engine, folder)
    colocated.sync()
    rollouts = colocated.generate(PROMPTS, group=2, length=24, temperature=0.0)
    steps = engine.decode_steps
    engine.shutdown()
    return rollouts.response_ids, steps


def test_greedy_tokens_are_the_same_with_a_drafter_of_ones_own(own_drafters, tiny_model):
    plain, _ = generate(tiny_model, None)
    drafted, steps = generate(tiny_model, own_drafters.LastSeen(3))
    assert drafted == plain
    assert sum(sum(step.drafted) for step in steps) > sum(sum(step.accepted) for step in steps) > 0


def test_a_token_that_the_policy_does_not_have_is_refused(own_drafters, tiny_model):
    with pytest.raises(ValueError, match="LastSeen proposes token 100000; token ids are 0 to"):
        generate(tiny_model, own_drafters.LastSeen(3, default=100_000))


def test_a_drafter_is_named_by_its_class_path(own_drafters, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(
        "trainer: {callbacks: [{class_path: SpeculativeRollout, init_args: {drafter: {class_path: "
        "own_drafters.LastSeen, init_args: {num_speculative_tokens: 2}}}}]}\n"
    )
    with pytest.raises(SystemExit) as ended:
        command_line(["fit", "--config", str(tmp_path / "run.yaml"), "--print_config"])
    assert not ended.value.code
    assert "class_path: own_drafters.LastSeen" in capsys.readouterr().out
