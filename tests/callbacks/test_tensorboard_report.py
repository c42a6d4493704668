import re

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

from lit_specrl import PPO
from lit_specrl.callbacks import RolloutCallback, TensorBoardReport
from lit_specrl.callbacks.tensorboard_report import LAYOUT, completions_table
from lit_specrl.losses import KLCoefficient
from lit_specrl.types import PromptBatch, RolloutRequest, Rollouts, SamplingConfig


class Lengths(RolloutCallback):
    def __init__(self):
        self.steps = []

    def on_experience_end(self, trainer, pl_module, rollouts, experience):
        self.steps.append([len(ids) for ids in rollouts.response_ids])


@pytest.fixture
def report(module, data, make_trainer, tmp_path):
    """Train two steps with a report; returns what TensorBoard reads, and the response lengths of each step."""

    def run(**options):
        lengths, logger = Lengths(), TensorBoardLogger(tmp_path, name="logs")
        module.kl_coefficient = KLCoefficient(options.pop("beta", 0.0))
        make_trainer(TensorBoardReport(**options), lengths, logger=logger, limit_val_batches=1.0).fit(
            module, datamodule=data
        )
        events = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0, "histograms": 0})
        return events.Reload(), lengths.steps

    return run


def texts(events, tag):
    return {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)}


def test_curves_have_the_names_of_trl_and_verl(report):
    events, lengths = report(beta=0.1)
    assert set(events.Tags()["scalars"]) == {
        "actor/grad_norm",
        "actor/lr",
        "actor/pg_clipfrac_lower",
        "actor/skipped_updates",
        "clip_ratio/high_mean",
        "clip_ratio/low_mean",
        "clip_ratio/region_mean",
        "completions/clipped_ratio",
        "completions/max_length",
        "completions/mean_length",
        "completions/min_length",
        "entropy",
        "epoch",
        "frac_reward_zero_std",
        "kl",
        "loss",
        "perf/computed_tokens",
        "perf/padding_fraction",
        "perf/rollout_tokens_per_s",
        "perf/rows_without_gradient",
        "perf/trained_tokens",
        "perf/trained_tokens_per_s",
        "policy_version",
        "reward",
        "reward_std",
        "rewards/counting/mean",
        "rewards/counting/nonfinite",
        "rewards/counting/std",
        "rewards/long/mean",
        "rewards/long/nonfinite",
        "rewards/long/std",
        "rewards/unscored",
        "sampling/importance_sampling_ratio/max",
        "sampling/importance_sampling_ratio/mean",
        "sampling/importance_sampling_ratio/min",
        "sampling/sampling_logp_difference/max",
        "sampling/sampling_logp_difference/mean",
        "timing_s/experience",
        "timing_s/gen",
        "timing_s/other",
        "timing_s/ref",
        "timing_s/reward",
        "timing_s/start_engine",
        "timing_s/step",
        "timing_s/update_actor",
        "timing_s/update_weights",
        "val-core/questions/acc/maj@1",
        "val-core/questions/acc/mean@1",
        "val-core/questions/acc/pass@1",
        "val_accuracy",
    }
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(0, 1.0), (1, 2.0)]
    assert [event.value for event in events.Scalars("completions/mean_length")] == [sum(step) / 4 for step in lengths]


def charts_of(events):
    layout = layout_pb2.Layout()
    (event,) = events.Tensors(metadata.CONFIG_SUMMARY_TAG)
    layout.ParseFromString(event.tensor_proto.string_val[0])
    return {
        category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
        for category in layout.category
    }


def assert_every_chart_has_curves(events):
    curves = events.Tags()["scalars"]
    for chart in (patterns for tab in charts_of(events).values() for patterns in tab.values()):
        for pattern in chart:
            assert any(re.search(pattern, curve) for curve in curves), pattern


def test_every_curve_of_the_layout_exists_and_every_chart_has_one(report):
    events, _ = report(beta=0.1)
    assert charts_of(events) == {
        tab: {title: tags for title, (_, tags) in tabs.items()} for tab, tabs in LAYOUT.items()
    }
    assert_every_chart_has_curves(events)


def test_a_critic_and_dynamic_sampling_have_charts_of_their_own(tiny_model, data, make_trainer, tmp_path):
    def varied(completions, **columns):
        return [float(len(set(text))) for text in completions]

    module = PPO(tiny_model, [varied], num_generations=2, max_completion_length=6, dynamic_sampling=True, beta=0.1)
    logger = TensorBoardLogger(tmp_path, name="logs")
    make_trainer(TensorBoardReport(), logger=logger, limit_val_batches=1.0).fit(module, datamodule=data)
    events = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0}).Reload()
    assert set(charts_of(events)) == {*LAYOUT, "critic", "dynamic sampling"}
    assert_every_chart_has_curves(events)


def test_completions_and_lengths_are_shown_for_every_step(report):
    events, lengths = report(num_completions=2)
    shown = texts(events, "completions/text_summary")
    assert list(shown) == [0, 1]
    assert shown[0].splitlines()[0] == "| prompt | answer | completion | counting | long | end |"
    prompts = [[line.split("|")[1].strip() for line in table.splitlines()[2:]] for table in shown.values()]
    chat = "<code>&lt;&#124;user&#124;&gt;{}&lt;&#124;end&#124;&gt;&lt;&#124;assistant&#124;&gt;</code>"
    assert prompts == [[chat.format("Hi"), chat.format("Why?")], [chat.format("2 &#124; 3"), chat.format("&lt;b&gt;")]]
    histograms = events.Histograms("completions/length")
    assert [(event.step, event.histogram_value.num, event.histogram_value.sum) for event in histograms] == [
        (step, 4, sum(values)) for step, values in enumerate(lengths)
    ]


def test_reports_come_every_n_steps_and_completions_can_be_left_out(report):
    events, _ = report(num_completions=0, every_n_steps=2)
    assert [event.step for event in events.Histograms("completions/length")] == [0]
    assert "completions/text_summary" not in events.Tags()["tensors"]


def test_the_settings_of_the_run_are_shown(report, module):
    events, _ = report()
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert events.summary_metadata["_hparams_/session_start_info"].plugin_data.plugin_name == "hparams"
    assert b"learning_rate" in events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"num_generations" in events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"batch_size" in events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    results = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    assert b"reward" in results
    assert b"val_accuracy" in results
    assert [event.value for event in events.Scalars("reward")] == [1.0, 2.0]  # no point that nothing was measured for


def test_other_loggers_are_left_alone(module, data, make_trainer, tmp_path):
    make_trainer(TensorBoardReport(), logger=CSVLogger(tmp_path), max_steps=1).fit(module, datamodule=data)
    assert not list(tmp_path.rglob("events.*"))


def test_the_table_shows_different_prompts_first_and_text_as_it_is():
    prompts = PromptBatch(["a", "b"], [[5], [6]], ["Q1", "Q2"], ["1", None], ["test"] * 2)
    rollouts = Rollouts(
        request=RolloutRequest(prompts, SamplingConfig(2, 4), seeds=[0, 1, 2, 3], policy_version=0),
        response_ids=[[7]] * 4,
        sampling_logprobs=[[0.0]] * 4,
        finish_reasons=["stop", "stop", "length", "stop"],
        policy_version=0,
        elapsed_s=1.0,
        texts=["a|b", "unseen", "<b>\n`x` & y", "unseen"],
        rewards={"math": [1.0, 0.0, 0.12345, 0.0], "format": [None, None, 1.0, None]},
    )
    assert completions_table(rollouts, limit=2).splitlines() == [
        "| prompt | answer | completion | math | format | end |",
        "|---|---|---|---|---|---|",
        "| <code>Q1</code> | <code>1</code> | <code>a&#124;b</code> | 1 | (none) | stop |",
        "| <code>Q2</code> | <code>(none)</code> | <code>&lt;b&gt;</code><br><code>&#96;x&#96; &amp; y</code> | 0.123 | 1 | length |",
    ]
    order = [line.split("|")[1].strip() for line in completions_table(rollouts, limit=3).splitlines()[2:]]
    assert order == ["<code>Q1</code>", "<code>Q2</code>", "<code>Q1</code>"]


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="expected num_completions >= 0 and every_n_steps >= 1, got -1 and 1"):
        TensorBoardReport(num_completions=-1)
    with pytest.raises(ValueError, match="got 4 and 0"):
        TensorBoardReport(every_n_steps=0)
