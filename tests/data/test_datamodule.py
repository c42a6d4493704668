import json
import sys
import warnings
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_specrl.data import (
    PRESETS,
    ArithmeticSource,
    FileSource,
    HubSource,
    PromptDataModule,
    PromptSource,
    PromptTemplate,
)
from lit_specrl.data.datamodule import named_sources
from lit_specrl.rewards import Reward, RewardFunction
from lit_specrl.types import SamplingConfig


class Words(PromptSource):
    """Rows written in the test."""

    def __init__(self, *questions, name="words"):
        self.rows = [{"question": question, "answer": question[0], "size": len(question)} for question in questions]
        self.name = name
        self.num_downloads = 0

    def download(self):
        self.num_downloads += 1

    def load(self):
        return self.rows


class Model(L.LightningModule):
    """Collects the batches of each stage."""

    def __init__(self, tokenizer=None):
        super().__init__()
        self.tokenizer = tokenizer
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches = []

    def training_step(self, batch):
        self.batches.append(batch)
        return self.weight.sum()

    def validation_step(self, batch):
        self.batches.append(batch)

    test_step = validation_step

    def predict_step(self, batch):
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def trainer():
    def make(**arguments):
        return L.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0, **arguments,
        )  # fmt: skip

    return make


@pytest.fixture
def setup(trainer, tokenizer):
    """Run `setup` as the Trainer does it, on any rank of any number of ranks."""

    def run(data, stage="fit", rank=0, world_size=1, monkeypatch=None, model=None):
        data.trainer = trainer()
        data.trainer.strategy.connect(Model(tokenizer) if model is None else model)
        if world_size > 1:
            ranks = property(lambda _: {"rank": rank, "num_replicas": world_size})
            monkeypatch.setattr(L.Trainer, "distributed_sampler_kwargs", ranks)
        data.setup(stage)
        return data

    return run


def prompts_of(batches):
    return [batch.prompts for batch in batches]


PLAIN = PromptTemplate(kind="plain", text="{question}")


def test_a_fit_trains_on_shuffled_batches_and_validates_on_all_prompts_in_order(trainer, tokenizer):
    model = Model(tokenizer)
    sampling = SamplingConfig(num_generations=4, temperature=0.6)
    data = PromptDataModule(
        Words("A", "B", "C", "Q", "1"), validation=[Words("A", "B", "C"), Words("Q", name="more")], template=PLAIN,
        batch_size=2, eval_batch_size=3, validation_sampling=sampling,
    )  # fmt: skip
    trainer(max_epochs=1).fit(model, data)
    train, validation = model.batches[:2], model.batches[2:]
    assert [len(batch) for batch in train] == [2, 2]
    assert [batch.sampling for batch in train] == [None, None]
    assert prompts_of(validation) == [["A", "B"], ["C", "Q"]]
    assert [batch.sampling for batch in validation] == [sampling, sampling]
    assert [batch.sources for batch in validation] == [["words", "words"], ["words", "more"]]
    assert [batch.columns for batch in validation] == [[{"size": 1}, {"size": 1}], [{"size": 1}, {"size": 1}]]


def test_validation_is_optional(trainer, tokenizer):
    model = Model(tokenizer)
    trainer(max_epochs=2).fit(model, PromptDataModule(Words("A"), template=PLAIN, batch_size=1))
    assert prompts_of(model.batches) == [["A"], ["A"]]


def test_test_and_predict_have_their_own_data(trainer, tokenizer):
    model, sampling = Model(tokenizer), SamplingConfig(temperature=0)
    data = PromptDataModule(test=Words("A"), predict=Words("B"), template=PLAIN, test_sampling=sampling)
    trainer().test(model, data, verbose=False)
    predicted = trainer().predict(model, data)
    assert prompts_of(model.batches + predicted) == [["A"], ["B"]]
    assert [batch.sampling for batch in model.batches + predicted] == [sampling, sampling]


def test_only_the_data_of_the_stage_is_downloaded(trainer, tokenizer):
    train, validation = Words("A"), Words("B")
    data = PromptDataModule(train, validation=validation, template=PLAIN, batch_size=1)
    trainer().validate(Model(tokenizer), data, verbose=False)
    assert (train.num_downloads, validation.num_downloads) == (0, 1)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_see_different_prompts_in_training_and_evaluation(setup, monkeypatch, world_size):
    letters = "ABCQ12"
    ranks = []
    for rank in range(world_size):
        data = PromptDataModule(Words(*letters), validation=Words(*letters), template=PLAIN, batch_size=6)
        setup(data, rank=rank, world_size=world_size, monkeypatch=monkeypatch)
        ranks.append([next(iter(data.train_dataloader())).prompts, next(iter(data.val_dataloader())).prompts])
    for train_and_validation in zip(*ranks, strict=True):
        assert {len(prompts) for prompts in train_and_validation} == {6 // world_size}
        assert sorted(prompt for prompts in train_and_validation for prompt in prompts) == sorted(letters)


def test_limit_train_batches_walks_on_through_the_data(trainer, tokenizer):
    model = Model(tokenizer)
    data = PromptDataModule(Words("A", "B", "C", "Q"), template=PLAIN, batch_size=1, shuffle=False)
    trainer(max_epochs=3, limit_train_batches=2).fit(model, data)
    assert prompts_of(model.batches) == [["A"], ["B"], ["C"], ["Q"], ["A"], ["B"]]


def test_dropped_prompts_are_counted_and_reported(setup):
    data = PromptDataModule(Words("A", "A B", "A B C"), template=PLAIN, batch_size=1, max_prompt_length=3)
    with pytest.warns(
        UserWarning, match=r"train data: 1 of 3 prompts are longer than max_prompt_length=3 tokens and were"
    ):
        setup(data)
    assert data.num_dropped == {"train": 1}


def test_overlong_prompts_can_be_refused(setup):
    data = PromptDataModule(Words("A B C"), template=PLAIN, batch_size=1, max_prompt_length=3, overlong="raise")
    with pytest.raises(ValueError, match="1 of 1 prompts are longer than max_prompt_length=3"):
        setup(data)


def test_what_is_left_over_is_reported(setup, caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        setup(PromptDataModule(Words("A", "B", "C"), validation=Words("A", "B", "C"), template=PLAIN, batch_size=2))
    assert caplog.messages[-2:] == [
        "train data: 3 prompts, 1 steps an epoch; 1 prompts sit out each epoch.",
        "validation data: 3 prompts in 2 steps.",
    ]


@pytest.mark.parametrize(("stage", "split"), [("fit", "train"), ("validate", "validation"), ("test", "test")])
def test_a_stage_without_data_is_refused(setup, stage, split):
    with pytest.raises(
        MisconfigurationException, match=rf"no data for `{stage}`: give `{split}` a preset, a file or a source"
    ):
        setup(PromptDataModule(), stage)


def test_a_fit_without_training_data_is_refused(trainer, tokenizer):
    with pytest.raises(MisconfigurationException, match="no data for `fit`: give `train` a preset"):
        trainer().fit(Model(tokenizer), PromptDataModule(validation=Words("A")))


def test_a_module_without_tokenizer_is_refused(setup):
    with pytest.raises(MisconfigurationException, match=r"Model has no `tokenizer`"):
        setup(PromptDataModule(Words("A")), model=Model())


def test_a_missing_chat_template_is_refused_in_setup(setup, base_tokenizer):
    with pytest.raises(ValueError, match="no chat template"):
        setup(PromptDataModule(Words("A"), batch_size=1), model=Model(base_tokenizer))


def test_data_outside_a_trainer_is_refused():
    with pytest.raises(
        MisconfigurationException, match=r"works inside a Trainer: `trainer\.fit\(module, datamodule\)`"
    ):
        PromptDataModule(Words("A")).setup("fit")


def test_overfit_batches_is_refused(trainer, tokenizer):
    with pytest.raises(MisconfigurationException, match=r"overfit_batches does not work .* give the source a `limit`"):
        trainer(overfit_batches=1).fit(Model(tokenizer), PromptDataModule(Words("A"), template=PLAIN, batch_size=1))


def test_a_batch_size_that_does_not_divide_is_refused(setup, monkeypatch):
    with pytest.raises(ValueError, match="batch_size=8 prompts per step cannot be divided among 3 ranks"):
        setup(PromptDataModule(Words("A"), template=PLAIN), world_size=3, monkeypatch=monkeypatch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"overlong": "cut"}, "overlong must be 'drop' or 'raise', got 'cut'"),
        ({"max_prompt_length": 0}, "max_prompt_length must be at least 1 token, got 0"),
        ({"train": "deepmaths"}, "unknown data 'deepmaths'"),
        ({"train": [Words("A"), Words("B")]}, r"several sources are called \['words'\]; give each a `name` of its own"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PromptDataModule(**arguments)


def test_the_keys_of_a_dict_name_the_sources(setup):
    data = PromptDataModule(validation={"x": Words("A"), "y": Words("B")}, template=PLAIN)
    assert next(iter(setup(data, "validate").val_dataloader())).sources == ["x", "y"]


class Rows(PromptSource):
    """Rows with the given answers."""

    def __init__(self, *answers, name="rows", **columns):
        self.rows = [{"question": "A", "answer": answer, **columns} for answer in answers]
        self.name = name

    def load(self):
        return self.rows


def rewarding(tokenizer, **needs):
    """A module whose rewards, by name, need an answer or not."""
    model = Model(tokenizer)
    model.rewards = SimpleNamespace(
        rewards=[SimpleNamespace(name=name, needs_answer=need, needed_columns=set) for name, need in needs.items()]
    )
    return model


SPLITS = [("fit", "train"), ("fit", "validation"), ("validate", "validation"), ("test", "test")]


@pytest.mark.parametrize(("stage", "split"), SPLITS)
def test_data_without_answers_is_refused_where_a_reward_needs_them(setup, tokenizer, stage, split):
    """A run with NumericReward trained to its end at reward 0."""
    answered = {"train": Rows("1")} if split == "validation" else {}
    data = PromptDataModule(**answered, **{split: [Rows(None, name="x"), Rows(None, name="y")]}, batch_size=1)
    with pytest.raises(
        MisconfigurationException,
        match=rf"^{split} data: none of the 2 prompts \(1 from 'x', 1 from 'y'\) has a reference answer, which reward"
        " 'numeric' compares with; name the column that holds it by `answer`",
    ):
        setup(data, stage, model=rewarding(tokenizer, brevity=False, numeric=True))


@pytest.mark.parametrize(("stage", "split"), SPLITS)
def test_single_gaps_among_the_answers_are_counted(setup, tokenizer, stage, split):
    answered = {"train": Rows("1")} if split == "validation" else {}
    data = PromptDataModule(**answered, **{split: Rows("1", None)}, batch_size=1)
    with pytest.warns(
        UserWarning,
        match=rf"{split} data: 1 of 2 prompts \(1 from 'rows'\) have no reference answer; reward 'math', 'nu",
    ):
        setup(data, stage, model=rewarding(tokenizer, math=True, numeric=True))


@pytest.mark.parametrize(("stage", "split"), SPLITS)
def test_columns_that_a_reward_needs_are_asked_for_before_the_run(setup, tokenizer, stage, split):
    def judge(completions, gold, answer, level=1, **columns):
        return [0.0 for _ in completions]

    model = Model(tokenizer)
    model.rewards = SimpleNamespace(rewards=[RewardFunction(judge)])
    answered = {"train": Rows("1", gold="1")} if split == "validation" else {}
    data = PromptDataModule(**answered, **{split: Rows("1", golden="1")}, batch_size=1)
    with pytest.raises(
        MisconfigurationException,
        match=rf"^{split} data: reward 'judge' needs the column 'gold', which no prompt has; did you mean 'golden'\? "
        "Columns present: golden",
    ):
        setup(data, stage, model=model)


def test_a_reward_that_reads_environments_needs_one(setup, tokenizer):
    def of_environment(environments, **columns):
        return [0.0 for _ in environments]

    model = Model(tokenizer)
    model.rewards = SimpleNamespace(rewards=[RewardFunction(of_environment)])
    with pytest.raises(
        MisconfigurationException,
        match="reward 'of_environment' needs 'environments', the environments of the rows; the module has no environment",
    ):
        setup(PromptDataModule(Rows("1"), batch_size=1), "fit", model=model)
    model.environment = object()
    setup(PromptDataModule(Rows("1"), batch_size=1), "fit", model=model)


def test_columns_that_a_reward_class_names_are_asked_for(setup, tokenizer):
    class Gold(Reward):
        def __call__(self, prompts, completions, gold, level=1):
            return [0.0 for _ in gold]

    model = Model(tokenizer)
    model.rewards = SimpleNamespace(rewards=[Gold()])
    setup(PromptDataModule(Rows("1", gold="1"), batch_size=1), "fit", model=model)
    with pytest.raises(MisconfigurationException, match="reward 'gold' needs the column 'gold', which no prompt has"):
        setup(PromptDataModule(Rows("1"), batch_size=1), "fit", model=model)


def test_every_prompt_has_the_columns_of_all_sources(setup, tokenizer):
    """A step whose prompts all came from the other source called the reward without its argument."""
    data = setup(PromptDataModule([Rows("1", name="x", gold="5"), Rows("2", name="y")], batch_size=1))
    batches = sorted(data.train_dataloader(), key=lambda batch: batch.sources)
    assert [batch.columns for batch in batches] == [[{"gold": "5"}], [{"gold": None}]]


def test_nobody_asks_for_answers_that_no_reward_needs(setup, tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        setup(PromptDataModule(Rows(None, "1"), batch_size=1), model=rewarding(tokenizer, brevity=False))
        setup(PromptDataModule(predict=Rows(None)), "predict", model=rewarding(tokenizer, numeric=True))


def test_columns_that_rewards_could_not_be_given_are_refused_but_for_predict(setup):
    with pytest.raises(
        ValueError, match="the data has a column 'source', a name under which rewards are given the names"
    ):
        setup(PromptDataModule(Rows("1", source="web"), batch_size=1))
    setup(PromptDataModule(predict=Rows("1", source="web")), "predict")


def test_questions_to_predict_need_no_answers_and_a_path_has_the_columns_of_the_training_data(setup, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"problem": "2 + 3?", "gold": "5"}\n')
    (tmp_path / "ask.jsonl").write_text('{"problem": "1 + 1?"}\n{"problem": "2 + 2?", "gold": "4"}\n')
    source = FileSource(str(tmp_path / "train.jsonl"), question="problem", answer="gold")
    data = setup(PromptDataModule(source, predict=str(tmp_path / "ask.jsonl"), template=PLAIN), "predict")
    (batch,) = data.predict_dataloader()
    assert (batch.prompts, batch.answers) == (["1 + 1?", "2 + 2?"], [None, "4"])

    data = setup(
        PromptDataModule(predict=FileSource(str(tmp_path / "ask.jsonl"), "problem"), template=PLAIN), "predict"
    )
    (batch,) = data.predict_dataloader()
    assert batch.answers == [None, None]
    assert batch.columns == [{"gold": None}, {"gold": "4"}]
    with pytest.raises(ValueError, match="no column 'answer'"):  # to learn from, answers are needed
        setup(PromptDataModule(FileSource(str(tmp_path / "ask.jsonl"), "problem"), template=PLAIN))


def test_presets_by_name():
    assert named_sources(["deepmath", "gsm8k"]) == {"deepmath": PRESETS["deepmath"], "gsm8k": PRESETS["gsm8k"]}
    assert list(PromptDataModule("deepmath").sources["train"]) == ["deepmath"]


CONFIG = """
data:
  train:
    class_path: ArithmeticSource
    init_args: {num_prompts: 64, num_terms: 2}
  validation:
    sums:
      class_path: ArithmeticSource
      init_args: {num_prompts: 8, split: validation}
    file:
      class_path: lit_specrl.data.FileSource
      init_args: {path: test.jsonl, answer_format: hash}
    math500: math500
  test:
  - gsm8k_test
  - class_path: HubSource
    init_args: {path: x/y, answer: null}
  template:
    kind: chat
    system_prompt: Add.
    examples: [{question: What is 1 + 1?, answer: "2"}]
    chat_template_kwargs: {enable_thinking: false}
  validation_sampling: {num_generations: 4, temperature: 0.6}
  batch_size: 16
"""


@pytest.mark.parametrize("subclass_mode", [False, True])
def test_everything_can_be_written_in_yaml(tmp_path, subclass_mode):
    text = CONFIG
    if subclass_mode:
        text = text.replace("\n  ", "\n    ").replace("data:", "data:\n  class_path: PromptDataModule\n  init_args:")
    config = tmp_path / "config.yaml"
    config.write_text(text)
    data = LightningCLI(
        Model, PromptDataModule, subclass_mode_data=subclass_mode, run=False, args=["--config", str(config)],
        save_config_callback=None,
    ).datamodule  # fmt: skip
    train, validation, test = (data.sources[split] for split in ("train", "validation", "test"))
    assert (train["arithmetic"].num_prompts, train["arithmetic"].num_terms) == (64, 2)
    assert list(validation) == ["sums", "file", "math500"]
    assert validation["sums"].split == "validation"
    assert isinstance(validation["file"], FileSource) and validation["file"].answer_format == "hash"
    assert validation["math500"] is PRESETS["math500"]
    assert isinstance(test["y"], HubSource) and test["y"].answer is None and "gsm8k_test" in test
    assert data.template == PromptTemplate(
        system_prompt="Add.",
        examples=[{"question": "What is 1 + 1?", "answer": "2"}],
        chat_template_kwargs={"enable_thinking": False},
    )
    assert data.sampling["validation"] == SamplingConfig(num_generations=4, temperature=0.6)
    assert data.batch_size == 16


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data.train", "deepmath"], PRESETS["deepmath"]),
        (["--data.train", "ArithmeticSource", "--data.train.num_prompts", "7"], None),
    ],
)
def test_sources_on_the_command_line(arguments, expected):
    cli = LightningCLI(Model, PromptDataModule, run=False, args=[*arguments, "--data.template.kind", "plain"], save_config_callback=None)  # fmt: skip
    (source,) = cli.datamodule.sources["train"].values()
    assert source is expected or (isinstance(source, ArithmeticSource) and source.num_prompts == 7)
    assert cli.datamodule.template.kind == "plain"


FILES = {
    "list.json": json.dumps([{"question": "Hi", "answer": "5"}, {"question": "Ho", "answer": "6"}]),
    "object.json": json.dumps({"class_path": "ArithmeticSource"}),
    "one.jsonl": json.dumps({"question": "Hi", "answer": "5"}),
    "ONE.JSONL": json.dumps({"class_path": "ArithmeticSource"}),
    "two.jsonl": '{"question": "Hi", "answer": "5"}\n' * 2,
    "words.jsonl": "deepmath",
    "pair.csv": "question,answer\nHi,5\n",
    "empty.csv": "",
    "odd name #1.jsonl": "x: 1",
    "test.jsonl": "null",  # as a module of the standard library
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A working folder with files that can be read as configuration, and a module beside each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).with_suffix(".py").write_text("raise SystemExit('imported')")
    monkeypatch.delitem(sys.modules, "test", raising=False)


def read_arguments(subclass_mode, *arguments):
    return LightningCLI(
        Model, PromptDataModule, subclass_mode_data=subclass_mode, run=False, save_config_callback=None,
        args=[*(["--data=PromptDataModule"] if subclass_mode else []), *arguments],
    ).datamodule  # fmt: skip


@pytest.mark.parametrize("way", ["command line", "appended", "file"])
@pytest.mark.parametrize("subclass_mode", [False, True])
@pytest.mark.usefixtures("files")
def test_a_path_is_a_path_wherever_it_stands(way, subclass_mode):
    """The content of a file that is valid JSON or YAML was taken for the setting."""
    names = list(FILES)
    for train, predict in zip(names[::2], names[1::2], strict=True):
        several = {f"source {name}": name for name in names}
        settings = {"train": train, "validation": names, "test": several, "predict": predict}
        if way == "file":
            nested = {"class_path": "PromptDataModule", "init_args": settings} if subclass_mode else settings
            with open("config.yaml", "w") as file:
                json.dump({"data": nested}, file)
            data = read_arguments(subclass_mode, "--config=config.yaml")
        elif way == "appended":
            settings = {"train": names, "predict": [predict]}
            appended = [f"--data.{split}+={name}" for split, split_names in settings.items() for name in split_names]
            data = read_arguments(subclass_mode, *appended)
        else:
            texts = {split: value if isinstance(value, str) else json.dumps(value) for split, value in settings.items()}
            data = read_arguments(subclass_mode, *(f"--data.{split}={text}" for split, text in texts.items()))
        for split, value in settings.items():
            sources = list(data.sources[split].values())
            expected = [value] if isinstance(value, str) else list(value.values() if isinstance(value, dict) else value)
            assert [str(source.path) for source in sources] == expected
        assert list(data.sources["test"]) == list(settings.get("test", {}))
    assert sys.modules.keys().isdisjoint(name.split(".")[0] for name in names)


@pytest.mark.usefixtures("files")
def test_a_saved_configuration_names_the_same_data(tmp_path):
    """A run saves its configuration beside its checkpoints, for the commands that follow."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    cli = LightningCLI(
        Model, PromptDataModule, run=False, save_config_callback=None,
        args=["--config=config.yaml", "--data.train=one.jsonl", "--data.predict=gsm8k"],
    )  # fmt: skip
    (tmp_path / "saved.yaml").write_text(cli.parser.dump(cli.config, skip_none=False))
    saved = read_arguments(False, "--config=saved.yaml").sources
    for split, sources in cli.datamodule.sources.items():
        assert {name: vars(source) for name, source in saved[split].items()} == {
            name: vars(source) for name, source in sources.items()
        }


@pytest.mark.usefixtures("files")
def test_classes_are_classes_also_beside_files_of_their_names():
    open("ArithmeticSource.jsonl", "w").close()
    data = read_arguments(
        True, "--data.train=ArithmeticSource", "--data.train.num_prompts=7", "--data.validation=lit_specrl.data.FileSource",
        "--data.validation.path=one.jsonl", '--data.test={"class_path": "HubSource", "init_args": {"path": "x/y"}}',
        '--data.predict=[{"class_path": "FileSource", "init_args": {"path": "list.json", "columns": {"a": "b"}}}]',
    )  # fmt: skip
    sources = [next(iter(data.sources[split].values())) for split in ("train", "validation", "test", "predict")]
    assert [type(source) for source in sources] == [ArithmeticSource, FileSource, HubSource, FileSource]
    assert (sources[0].num_prompts, str(sources[1].path), sources[3].columns) == (7, "one.jsonl", {"a": "b"})


def test_the_date_of_chat_templates_is_read_with_and_without_quotes(tmp_path):
    for date in ("2026-11-27", "'2026-11-27'"):
        (tmp_path / "config.yaml").write_text(f"data: {{template: {{date: {date}}}}}")
        assert read_arguments(False, f"--config={tmp_path / 'config.yaml'}").template.date == "2026-11-27"
