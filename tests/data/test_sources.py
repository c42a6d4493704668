import builtins
import gzip
import json
import re
import sys
from itertools import product
from types import SimpleNamespace

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from lit_specrl.data import (
    PRESETS,
    ArithmeticSource,
    FileSource,
    HubSource,
    PromptDataModule,
    ReasoningGymSource,
    RowsSource,
)
from lit_specrl.data.arithmetic import split_of
from lit_specrl.data.presets import resolve_source
from lit_specrl.data.prompts import further_columns

GSM = [
    {"question": "Two and three?", "answer": "Add them.\n#### 5", "level": 1},
    {"question": "A thousand?", "answer": "#### 1,000", "level": 2},
]
GSM_ROWS = [
    {"level": 1, "question": "Two and three?", "answer": "5"},
    {"level": 2, "question": "A thousand?", "answer": "1,000"},
]


@pytest.fixture
def write(tmp_path):
    def write_file(name, content):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, newline="")
        return str(path)

    return write_file


def jsonl(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def test_all_formats_give_the_same_rows(write, tmp_path):
    parquet = str(tmp_path / "gsm.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(GSM), parquet)
    packed = tmp_path / "gsm.jsonl.gz"
    packed.write_bytes(gzip.compress(jsonl(GSM).encode()))
    paths = [
        write("gsm.jsonl", jsonl(GSM)),
        write("gsm.JSONL", jsonl(GSM).replace("\n", "\r\n")),
        write("gsm.json", json.dumps(GSM, indent=1)),
        write("bom/gsm.jsonl", "\ufeff" + jsonl(GSM)),
        write("bom/gsm.json", "\ufeff" + json.dumps(GSM)),
        parquet,
        str(packed),
    ]
    for path in paths:
        source = FileSource(path, answer_format="hash")
        assert (path, source.name, source.load()) == (path, "gsm", GSM_ROWS)


def test_csv_cells_are_text(write):
    path = write("a.csv", '\ufeffquestion,answer,level\n"One, two\nand three?",007,1\n\nHi,,""\n')
    assert FileSource(path).load() == [
        {"question": "One, two\nand three?", "answer": "007", "level": "1"},
        {"question": "Hi", "answer": None, "level": ""},
    ]
    long_cell = "word " * 100_000
    path = write("b.csv", f"question,answer\n{long_cell},1\n")
    assert FileSource(path).load() == [{"question": long_cell, "answer": "1"}]


def test_columns_are_renamed_and_numbers_become_text(write):
    path = write(
        "a.jsonl", '{"problem": "1 + 1?", "result": 2, "subject": "sums"}\n\n{"problem": "Hi", "result": null}\n'
    )
    assert FileSource(path, question="problem", answer="result").load() == [
        {"subject": "sums", "question": "1 + 1?", "answer": "2"},
        {"question": "Hi", "answer": None},
    ]


def test_questions_may_be_messages_and_columns_nested(write):
    messages = [{"role": "user", "content": "1 + 1?"}]
    path = write("verl.jsonl", jsonl([{"prompt": messages, "reward_model": {"ground_truth": "2", "style": "rule"}}]))
    assert FileSource(path, question="prompt", answer="reward_model.ground_truth").load() == [
        {"reward_model": {"ground_truth": "2", "style": "rule"}, "messages": messages, "answer": "2"}
    ]


def test_limit_and_name(write):
    source = FileSource(write("gsm.jsonl", jsonl(GSM)), answer_format="hash", name="first", limit=1)
    assert (source.name, source.load()) == ("first", GSM_ROWS[:1])


def test_data_without_reference_answers(write):
    assert FileSource(write("a.jsonl", '{"question": "Hi"}'), answer=None).load() == [
        {"question": "Hi", "answer": None}
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", r"a\.jsonl is empty; expected at least one row"),
        ("a.json", "[]", r"a\.json is empty; expected at least one row"),
        ("a.jsonl", '{"question": "q", "answer": "1"}\n{"question"\n', r"a\.jsonl, line 2: not valid JSON .*: '\{\"question\"'"),
        ("a.jsonl", "[1]\n", r"a\.jsonl, line 1: expected a JSON object with named columns, got '\[1\]'"),
        ("a.json", '{"question": "q"}', r"a\.json: expected a list of JSON objects"),
        ("a.json", '{"q": 1}\n{"q": 2}', r"a\.json: not valid JSON .*; one object per line belongs into a \.jsonl file"),
        ("a.parquet", "text", r"a\.parquet: not a Parquet file"),
        ("a.json", "", r"a\.json is empty; expected at least one row"),
        ("a.csv", "", r"a\.csv is empty; expected at least one row"),
        ("a.csv", "question,answer\n", r"a\.csv is empty; expected at least one row"),
        ("a.parquet", "", r"a\.parquet is empty; expected at least one row"),
        ("a.xlsx", "", r"a\.xlsx: expected a file ending in \.jsonl, \.json, \.csv, \.parquet, got '\.xlsx'; convert it"),
        ("a.jsonl", "[\n{}\n]\n", r"a\.jsonl, line 1: not valid JSON .*: '\['; a list over several lines belongs into a \.json"),
        ("a.jsonl", '{"question": ' + "1" * 5000 + "}", r"a\.jsonl, line 1: not valid JSON \(Exceeds the limit"),
        ("a.json", '{"question": "q"}', r"a\.json: expected a list .*, got '\{\"question\": \"q\"\}'; put the objects between \["),
        ("a.csv", "question,answer\nOne, two?,3\n", r"a\.csv, line 2: expected 2 cells, .*\(question, answer\), got 3; put cells"),
        ("a.csv", "question,question\na,b\n", r"a\.csv: the first line names several columns \['question'\]"),
        ("a.csv", 'question,answer\n"q,1\n', r"a\.csv, line 2: not valid CSV \(unexpected end of data\)"),
        ("a.jsonl.gz", "text", r"a\.jsonl\.gz cannot be read: Not a gzipped file"),
        ("a.jsonl", '{"question": null, "answer": "1"}', r"row 1: expected a question as text .* in column 'question', got NoneType"),
        ("a.jsonl", '{"question": "q", "answer": Infinity}', r"row 1: the answer must be text or a number, got float: inf"),
        ("a.jsonl", '{"problem": "q", "answer": "1"}', r"row 1: no column 'question'; columns present: 'problem', 'answer'"),
        ("a.jsonl", '{"question": "q", "a.b": "1"}', r"row 1: no column 'answer'; .*`answer: null` when there is no reference"),
        ("a.jsonl", '{"question": "q", "answer": [1]}', r"row 1: the answer must be text or a number, got list: \[1\]"),
    ],
)  # fmt: skip
def test_unreadable_files_are_refused(write, name, content, message):
    with pytest.raises(ValueError, match=message):
        FileSource(write(name, content)).load()


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(GSM * 1000), path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:100] + b"?" * 100 + whole[200:]):
        path.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"a\.parquet: not a Parquet file, or a damaged one .*download it once more"
        ):
            FileSource(str(path)).load()
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(GSM).encode())[:-20])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz cannot be read: Compressed file ended .*copy it once more"):
        FileSource(str(path)).load()
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(GSM).encode("utf-16"))
    with pytest.raises(ValueError, match=r"a\.jsonl: expected text in UTF-8 .*iconv"):
        FileSource(str(path)).load()


def test_a_folder_is_refused(tmp_path):
    for source in (FileSource(str(tmp_path)), resolve_source(str(tmp_path))):
        with pytest.raises(ValueError, match=r" is a folder; expected a file ending in .*`HubSource` reads a folder"):
            source.load()


NUMINA = {
    "problem": "2+3?",
    "question": "What is asked?",
    "solution": r"It is \boxed{5}.",
    "answer": "five",
    "columns": 2,
    "messages": [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": r"It is \boxed{5}."}],
}


def test_the_named_columns_win_and_the_others_keep_their_names(write):
    path = write("numina.jsonl", jsonl([NUMINA]))
    with pytest.warns(
        UserWarning, match=r"do not see the column 'answer', because their `answer` is the reference in 'solu"
    ):
        [row] = FileSource(path, question="problem", answer="solution", answer_format="boxed").load()
    assert (row["question"], row["answer"]) == ("2+3?", "5")
    others = {name: NUMINA[name] for name in ("question", "columns", "messages")}
    assert further_columns(row) == others

    [row] = FileSource(path, question="messages").load()
    assert (row["messages"], row["answer"], "question" in row) == (NUMINA["messages"], "five", False)
    assert further_columns(row) == {name: NUMINA[name] for name in ("problem", "question", "solution", "columns")}


def test_an_answer_column_without_use_is_named(write):
    path = write("a.jsonl", jsonl([{"question": "q", "answer": "1"}]))
    with pytest.warns(
        UserWarning, match=r"column 'answer', because their `answer` is empty \(`answer: null`\); to keep it"
    ):
        [row] = FileSource(path, answer=None).load()
    assert (row["answer"], further_columns(row)) == (None, {})


@pytest.mark.parametrize(
    ("columns", "seen"),
    [
        ([], {}),
        (["level"], {"level": 1}),
        ({"source": "origin", "level": "level"}, {"origin": "web", "level": 1}),
        ({"answer": "solution"}, {"solution": "#### 5"}),  # also a column that has a use already
    ],
)
def test_columns_are_left_out_and_renamed(write, hub, columns, seen):
    record = {"question": "q", "answer": "#### 5", "source": "web", "level": 1}
    hub([record])
    path = write("a.jsonl", jsonl([record]))
    for source in (
        FileSource(path, answer_format="hash", columns=columns),
        HubSource("x/y", answer_format="hash", columns=columns),
    ):
        [row] = source.load()
        assert (row["question"], row["answer"], further_columns(row)) == ("q", "5", seen)


def test_columns_that_no_row_has_are_named(write):
    path = write("a.jsonl", jsonl([{"question": "q", "answer": "1"}, {"question": "r", "answer": "2", "level": 1}]))
    assert FileSource(path, columns=["level"]).load()[1] == {"level": 1, "question": "r", "answer": "2"}
    with pytest.raises(
        ValueError, match=r"no columns \['topic'\] to keep; columns present: \['question', 'answer', 'level'"
    ):
        FileSource(path, columns={"topic": "subject"}).load()


def test_gaps_among_the_answers_are_gaps(tmp_path):
    path = tmp_path / "a.parquet"
    pandas.DataFrame({"question": ["q", "r"], "answer": [5, None]}).to_parquet(path)
    assert [row["answer"] for row in FileSource(str(path)).load()] == ["5", None]
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"question": "q", "answer": NaN}\n{"question": "q", "answer": ""}\n{"question": "q", "answer": 1e-05}'
    )
    assert [row["answer"] for row in FileSource(str(path), answer_format="number").load()] == [None, None, "0.00001"]


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.jsonl: no such file .*check `path`"):
        FileSource(str(tmp_path / "gone.jsonl")).load()


def test_an_answer_in_another_format_is_refused(write):
    path = write("a.jsonl", jsonl([GSM[0], {"question": "q", "answer": "just 5"}]))
    with pytest.raises(
        ValueError, match=r"row 2: no answer in format 'hash' found in 'just 5'; correct the row, or choose"
    ):
        FileSource(path, answer_format="hash").load()


@pytest.fixture
def hub(monkeypatch):
    """Answer `load_dataset` with the given rows or error; returns what it was called with."""

    def serve(answer):
        calls = []

        def load_dataset(*args, **kwargs):
            calls.append((args, kwargs))
            if isinstance(answer, Exception):
                raise answer
            return datasets.Dataset.from_list(answer)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return serve


def test_hub_data_is_asked_for_and_read(hub):
    calls = hub(GSM)
    source = HubSource("openai/gsm8k", "main", split="test", answer_format="hash", revision="v1", limit=1)
    assert (source.name, source.load()) == ("gsm8k", GSM_ROWS[:1])
    assert calls == [(("openai/gsm8k", "main"), {"split": "test", "revision": "v1"})]


def test_hub_columns_that_nobody_needs_are_left_behind(hub):
    hub([{**GSM[0], "solution": "long"}])
    assert HubSource("x/y", columns=["level"], answer_format="hash").load() == GSM_ROWS[:1]
    with pytest.raises(
        ValueError, match=r"no columns \['topic'\] to keep; columns present: \['question', 'answer', 'level'"
    ):
        HubSource("x/y", columns=["topic"]).load()


def test_hub_downloads_once_ahead(hub):
    calls = hub(GSM)
    HubSource("x/y").download()
    assert len(calls) == 1


def test_an_unreachable_hub_says_what_to_do(hub):
    hub(ConnectionError("Couldn't reach 'x/y' on the Hub"))
    with pytest.raises(ValueError, match=r"'x/y' is not in the local cache .* HF_ENDPOINT .* FileSource at a local"):
        HubSource("x/y").load()


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("no such dataset"),
        ValueError("Unknown split 'tset'"),
        datasets.exceptions.DatasetGenerationError("damaged"),
    ],
)
def test_an_unknown_dataset_or_split_is_refused(hub, error):
    hub(error)
    with pytest.raises(ValueError, match=rf"'x/y' \(config_name=None, split='tset'\) cannot be loaded: {error}"):
        HubSource("x/y", split="tset").load()


def test_hub_data_without_the_column_or_without_rows_is_refused(hub):
    hub([{"problem": "q", "answer": "1"}])
    with pytest.raises(
        ValueError, match=r"dataset 'x/y', row 1: no column 'question'; columns present: 'problem', 'answer'"
    ):
        HubSource("x/y").load()
    hub([])
    with pytest.raises(ValueError, match=r"dataset 'x/y' is empty"):
        HubSource("x/y").load()


def test_a_local_folder_is_read_like_a_hub_dataset(write, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write("train.jsonl", jsonl(GSM))
    assert HubSource(str(tmp_path), answer_format="hash").load() == GSM_ROWS


def test_reasoning_gym_entries_become_rows(monkeypatch):
    def create_dataset(task, size, seed, min_terms):
        return [{"question": f"{task} {seed} {n}", "answer": n, "metadata": {"t": min_terms}} for n in range(size)]

    monkeypatch.setitem(sys.modules, "reasoning_gym", SimpleNamespace(create_dataset=create_dataset))
    assert ReasoningGymSource("chain_sum", size=1, seed=7, options={"min_terms": 2}).load() == [
        {
            "question": "chain_sum 7 0",
            "answer": "0",
            "task": "chain_sum",
            "entry": {"question": "chain_sum 7 0", "answer": 0, "metadata": {"t": 2}},
        }
    ]


def test_reasoning_gym_entries_without_an_answer_have_none(monkeypatch):
    entries = [{"question": "q", "answer": answer} for answer in (None, 2.0, ["a"])]
    monkeypatch.setitem(sys.modules, "reasoning_gym", SimpleNamespace(create_dataset=lambda *_, **__: entries))
    assert [row["answer"] for row in ReasoningGymSource("countdown").load()] == [None, "2", "['a']"]


def test_reasoning_gym_refusals_name_the_task(monkeypatch):
    def create_dataset(task, size, seed):
        raise ValueError("Dataset 'sums' not registered")

    monkeypatch.setitem(sys.modules, "reasoning_gym", SimpleNamespace(create_dataset=create_dataset))
    with pytest.raises(
        ValueError, match=r"refuses task 'sums' with size=1000, options=\{\}: Dataset 'sums' not registered"
    ):
        ReasoningGymSource("sums").load()


def test_missing_reasoning_gym_names_the_extra(monkeypatch):
    real_import = builtins.__import__

    def no_gym(name, *args, **kwargs):
        if name == "reasoning_gym":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_gym)
    with pytest.raises(ImportError, match=re.escape("run `pip install lit_specrl[reasoning-gym]`")):
        ReasoningGymSource("chain_sum").load()


def test_arithmetic_rows_are_literal():
    assert ArithmeticSource(3, seed=0).load() == [
        {"question": "What is 8 + 8 + 5?", "answer": "21"},
        {"question": "What is 6 + 5 + 1?", "answer": "12"},
        {"question": "What is 5 + 3 + 4?", "answer": "12"},
    ]


def test_the_two_arithmetic_splits_make_up_all_sums_and_share_none():
    sizes = {
        split: sum(split_of(list(t)) == split for t in product(range(1, 10), repeat=3))
        for split in ("train", "validation")
    }
    assert sizes == {"train": 563, "validation": 166}
    terms = {}
    for split, size in sizes.items():
        questions = [row["question"] for row in ArithmeticSource(size, seed=len(split), split=split).load()]
        assert len(set(questions)) == size
        terms[split] = {tuple(sorted(re.findall(r"\d", question))) for question in questions}
    assert terms["train"] & terms["validation"] == set()


def test_more_arithmetic_than_there_is_names_the_number():
    with pytest.raises(
        ValueError, match=r"num_prompts=200 but the validation split .* has only 166 distinct questions"
    ):
        ArithmeticSource(200, split="validation").load()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_prompts": 0}, "num_prompts must be at least 1, got 0"),
        ({"num_terms": 1}, "num_terms must be at least 2, got 1"),
        ({"max_term": 0}, "max_term must be at least 1, got 0"),
        ({"split": "test"}, "split must be 'train' or 'validation', got 'test'"),
    ],
)
def test_arithmetic_settings_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ArithmeticSource(**arguments)


def test_presets_and_paths_resolve_to_sources(write):
    assert resolve_source("deepmath") is PRESETS["deepmath"]
    assert {name: source.name for name, source in PRESETS.items()} == {name: name for name in PRESETS}
    assert resolve_source(write("gsm.jsonl", jsonl(GSM))).load()[0]["question"] == "Two and three?"


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown data 'deepmaths'; .* deepmath, gsm8k, gsm8k_test, math500, dapo_math, a path"
    ):
        resolve_source("deepmaths")


def test_fields_that_other_turns_have_are_no_fields_of_a_turn(tmp_path):
    """Parquet gives all turns the fields of any; templates ask whether a turn has tool calls."""
    turns = [
        {"role": "user", "content": "2 + 3?", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}, {"name": "say", "id": 1}]},
    ]
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": turns, "answer": "5"}]), path)
    (row,) = FileSource(str(path), question="prompt").load()
    assert row["messages"] == [
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}, {"name": "say", "id": 1}]},
    ]


ROWS = [{"prompt": "2 + 3?", "solution": "#### 5", "level": 1}, {"prompt": "1 + 1?", "solution": "#### 2", "level": 2}]


@pytest.mark.parametrize("of", [list, tuple, datasets.Dataset.from_list])
def test_rows_in_memory(of):
    source = RowsSource(of(ROWS), "prompt", "solution", "hash", name="sums")
    expected = [
        {"question": "2 + 3?", "answer": "5", "level": 1},
        {"question": "1 + 1?", "answer": "2", "level": 2},
    ]
    assert source.load() == source.load() == expected
    assert RowsSource(of(ROWS), "prompt", None, limit=1, columns=[]).load() == [{"question": "2 + 3?", "answer": None}]


@pytest.mark.parametrize(
    ("rows", "got"),
    [
        (iter(ROWS), "got list_iterator"),
        (ROWS[0], "got dict; take one split"),
        ("rows.jsonl", "got str"),
        (None, "got None"),
    ],
)
def test_what_is_no_rows_is_refused(rows, got):
    with pytest.raises(TypeError, match=f"rows must be a list of mappings or a Dataset, {got}"):
        RowsSource(rows)


@pytest.mark.parametrize("data", [datasets.Dataset.from_list(ROWS), ROWS])
def test_rows_in_place_of_a_source_are_told_where_they_go(data):
    with pytest.raises(TypeError, match=r"rows in memory and a Dataset go into RowsSource\(\.\.\.\)"):
        PromptDataModule(data)
