"""An acceptance rule of the user's own, and what the callback tells about rules."""

import math
import sys

import pytest

from lit_specrl.callbacks import PrefixCache
from lit_specrl.cli.fit import train as command_line
from lit_specrl.prefix_cache import RatioAcceptance
from lit_specrl.prefix_cache.lenience import AdaptiveLenience

OWN_RULE = """
from lit_specrl.prefix_cache import AcceptanceRule, num_leading_true


class Threshold(AcceptanceRule):
    def __init__(self, nats: float = 3.0) -> None:
        self.nats = nats

    def __call__(self, target_logprobs, previous_logprobs, generation_logprobs, cached_mask, uniforms):
        return num_leading_true(cached_mask & (target_logprobs > -self.nats))
"""


def test_a_rule_from_a_users_file_is_named_by_its_class_path(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_rules.py").write_text(OWN_RULE)
    (tmp_path / "run.yaml").write_text(
        "trainer: {callbacks: [{class_path: PrefixCache, init_args: {acceptance: {class_path: own_rules.Threshold, "
        "init_args: {nats: 2.5}}}}]}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as ended:
        command_line(["fit", "--config", str(tmp_path / "run.yaml"), "--print_config"])
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert "class_path: own_rules.Threshold" in printed and "nats: 2.5" in printed
    rule = sys.modules["own_rules"].Threshold(2.5)
    cache = PrefixCache(acceptance=rule)
    assert cache.rule is rule and rule.needs_logprobs
    assert cache.describe(None) == {"prefix cache": "Threshold, approximate"}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "ratio, lenience 1, approximate"),
        ({"log_lenience": 0.5}, "ratio, lenience 1.65, approximate"),
        ({"lenience": 0.0}, "ratio, lenience 0, exact"),
        ({"acceptance": "off"}, "off, exact"),
        ({"acceptance": RatioAcceptance(1.5, level="sequence")}, "RatioAcceptance, lenience 1.5, approximate"),
        ({"adaptive_lenience": AdaptiveLenience(0.1)}, "ratio, lenience 1 to 1.65 (adaptive), approximate"),
    ],
)
def test_a_cache_is_described_in_a_line(options, line):
    assert PrefixCache(**options).describe(None) == {"prefix cache": line}


def test_log_lenience_is_in_nats():
    assert PrefixCache(log_lenience=0.5).rule == RatioAcceptance(math.exp(0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lenience": 1.5, "log_lenience": 0.5}, r"lenience=1\.5 and log_lenience=0\.5 say the same thing"),
        ({"acceptance": RatioAcceptance(), "drift_bound": 1.0}, r"drift_bound=1\.0 belongs to a named rule"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PrefixCache(**options)


def test_adaptive_lenience_steers_a_rule_that_has_one():
    cache = PrefixCache(acceptance=RatioAcceptance(3.0, level="sequence"), adaptive_lenience=AdaptiveLenience(0.1))
    assert cache.rule == RatioAcceptance(1.0, level="sequence")
