import csv
import json
import re
import struct
from pathlib import Path

import pytest
import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

from lit_specrl import PPO
from lit_specrl.callbacks import LoggerReport, RolloutCallback, RunSummary
from lit_specrl.callbacks.logger_report import LAYOUT, completions_table
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
        make_trainer(LoggerReport(**options), lengths, logger=logger, limit_val_batches=1.0).fit(
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


def test_a_curve_has_points_where_it_was_measured(report):
    """Lightning repeats a value to the end of the epoch; the engine starts in the first step alone."""
    events, lengths = report()
    assert len(lengths) == 2
    assert len(events.Scalars("reward")) == 2
    assert [event.step for event in events.Scalars("timing_s/start_engine")] == [events.Scalars("reward")[0].step]


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
    make_trainer(LoggerReport(), logger=logger, limit_val_batches=1.0).fit(module, datamodule=data)
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


class OwnLogger(Logger):
    """A user's, with a table and nothing else."""

    name, version, save_dir = "own", 0, "somewhere"

    def __init__(self):
        super().__init__()
        self.metrics, self.settings, self.tables = {}, {}, []

    def log_metrics(self, metrics, step=None):
        self.metrics[step] = dict(metrics)

    def log_hyperparams(self, params, *args, **kwargs):
        self.settings |= dict(params)

    def log_table(self, key, columns, data, step):
        self.tables.append((key, columns, data, step))


@pytest.fixture
def everywhere(module, data, make_trainer, tmp_path, monkeypatch, capsys):
    """Two steps into all loggers at once; returns them, and what is said at the end."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr("wandb.run", None)
    loggers = [
        TensorBoardLogger(tmp_path, name="tensorboard"),
        CSVLogger(tmp_path, name="csv"),
        WandbLogger(save_dir=str(tmp_path), project="test", offline=True),
        OwnLogger(),
    ]
    make_trainer(LoggerReport(num_completions=2), RunSummary(), logger=loggers).fit(module, datamodule=data)
    return loggers, capsys.readouterr().out


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_several_loggers_show_the_same_run_each_as_far_as_it_can(everywhere, tmp_path):
    (board, files, wandb_logger, own), said = everywhere
    columns = ["prompt", "answer", "completion", "counting", "long", "end"]
    events = EventAccumulator(board.log_dir, size_guidance={"tensors": 0, "histograms": 0}).Reload()
    assert [event.value for event in events.Scalars("reward")] == [1.0, 2.0]
    assert len(events.Histograms("completions/length")) == len(texts(events, "completions/text_summary")) == 2

    # CSV
    folder = Path(files.log_dir)
    assert [float(row["reward"]) for row in rows_of(folder / "metrics.csv") if row["reward"]] == [1.0, 2.0]
    shown = rows_of(folder / "completions.csv")
    assert [row["step"] for row in shown] == ["0", "0", "1", "1"] and list(shown[0]) == ["step", *columns]
    assert shown[0]["prompt"] == "<|user|>Hi<|end|><|assistant|>"
    counts = [
        sum(int(row["count"]) for row in rows_of(folder / "completions_length.csv") if row["step"] == str(step))
        for step in (0, 1)
    ]
    assert counts == [4, 4]
    assert "num_generations: 2" in (folder / "hparams.yaml").read_text()

    # the user's own
    assert [own.metrics[step]["reward"] for step in (0, 1)] == [1.0, 2.0]
    assert own.settings["num_generations"] == 2
    assert [(key, names, step) for key, names, _, step in own.tables] == [("completions", columns, n) for n in (0, 1)]
    assert [[str(cell or "") for cell in row[:3]] for row in own.tables[0][2]] == [
        [row["prompt"], row["answer"], row["completion"]] for row in shown[:2]
    ]

    # Weights & Biases
    wandb_logger.experiment.finish()
    wandb.teardown()  # the file is written when the process that writes it has ended
    history, config = wandb_records(tmp_path)
    assert [row["reward"] for row in history if "reward" in row] == [1.0, 2.0]
    assert config["num_generations"] == 2
    found = [row["completions/length/values"] for row in history if "completions/length/values" in row]
    assert [sum(counts) for counts in found] == [4, 4]
    tables = [json.loads(path.read_text()) for path in tmp_path.glob("wandb/offline-run-*/files/media/table/*.json")]
    assert sorted(table["data"][0][0] for table in tables) == sorted(row["prompt"] for row in shown[::2])
    assert all(table["columns"] == columns for table in tables)

    # the end of the run
    assert f"tensorboard --logdir {board.save_dir}" in said
    assert f"{folder / 'metrics.csv'}, and the files beside it" in said.replace("\n", "")
    assert f"wandb sync {tmp_path}/wandb/offline-run-" in said
    assert "Curves: somewhere (OwnLogger)" in said


def test_mlflow_shows_it_where_it_is_installed(module, data, make_trainer, tmp_path, monkeypatch, capsys):
    pytest.importorskip("mlflow", reason="MLflow is no requirement of the tests: its packages change those of vLLM")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("test", tracking_uri=f"file:{tmp_path}/mlruns")
    make_trainer(LoggerReport(num_completions=2), RunSummary(), logger=logger).fit(module, datamodule=data)
    client, run_id = logger.experiment, logger.run_id
    assert [metric.value for metric in client.get_metric_history(run_id, "reward")] == [1.0, 2.0]
    assert client.get_run(run_id).data.params["num_generations"] == "2"
    assert [file.path for file in client.list_artifacts(run_id, "completions")] == [
        *(f"completions/0000000{step}.md" for step in (0, 1)),
        "completions/length",
    ]
    assert f"mlflow ui --backend-store-uri file:{tmp_path}/mlruns" in capsys.readouterr().out


def wandb_records(folder):
    """History and configuration of an offline run."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    history, config = [], {}
    for data in log_records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        for item in record.config.update:
            config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        if record.HasField("history"):
            items = record.history.item
            history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return history, config


def log_records(content, block=2**15, header=7):
    """Records of a file in LevelDB's log format, behind a header of the file: checksum, length and kind before each
    part (1 whole, 2 first, 3 middle, 4 last)."""
    at, parts = header, []
    while at + header <= len(content):
        if block - at % block < header:
            at += block - at % block
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + header])
        parts.append(content[at + header : at + header + length])
        at += header + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


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
    assert completions_table(rollouts, limit=2).markdown().splitlines() == [
        "| prompt | answer | completion | math | format | end |",
        "|---|---|---|---|---|---|",
        "| <code>Q1</code> | <code>1</code> | <code>a&#124;b</code> | 1 | (none) | stop |",
        "| <code>Q2</code> | (none) | <code>&lt;b&gt;</code><br><code>&#96;x&#96; &amp; y</code> | 0.123 | 1 | length "
        "|",
    ]
    order = [line.split("|")[1].strip() for line in completions_table(rollouts, limit=3).markdown().splitlines()[2:]]
    assert order == ["<code>Q1</code>", "<code>Q2</code>", "<code>Q1</code>"]


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="expected num_completions >= 0 and every_n_steps >= 1, got -1 and 1"):
        LoggerReport(num_completions=-1)
    with pytest.raises(ValueError, match="got 4 and 0"):
        LoggerReport(every_n_steps=0)
