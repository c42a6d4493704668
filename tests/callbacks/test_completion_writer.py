import json

import pytest

from lit_specrl.callbacks import CompletionWriter


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_predictions_become_one_line_each(module, data, make_trainer, tmp_path):
    path = tmp_path / "out" / "completions.jsonl"
    predictions = make_trainer(CompletionWriter(str(path))).predict(module, datamodule=data)
    records = read(path)
    assert records == [record for batch in predictions for record in batch]
    assert [(record["source"], record["prompt"], record["answer"]) for record in records] == [
        ("questions", "<|user|>Hi<|end|><|assistant|>", None),
        ("questions", "<|user|>Why?<|end|><|assistant|>", "one"),
        ("questions", "<|user|>2 | 3<|end|><|assistant|>", "two"),
        ("questions", "<|user|><b><|end|><|assistant|>", "three"),
    ]
    for record in records:
        assert list(record) == ["uid", "source", "prompt", "answer", "completion", "completion_length", "finish_reason"]
        assert 1 <= record["completion_length"] <= 6
    assert [entry.name for entry in path.parent.iterdir()] == ["completions.jsonl"]


def test_a_second_run_replaces_the_file_and_what_an_interrupted_one_left(module, data, make_trainer, tmp_path):
    path = tmp_path / "completions.jsonl"
    path.write_text("old\n")
    (tmp_path / "completions.jsonl.partial").write_text("older\n")
    make_trainer(CompletionWriter(str(path))).predict(module, datamodule=data, return_predictions=False)
    assert len(read(path)) == 4


def test_an_interrupted_run_leaves_the_old_file_and_a_partial_one(module, data, make_trainer, tmp_path, monkeypatch):
    path = tmp_path / "completions.jsonl"
    path.write_text("old\n")
    data.eval_batch_size = 2

    def predict_step(batch, batch_idx):
        if batch_idx == 1:
            raise RuntimeError("out of memory")
        return [{"completion": "é"}]

    monkeypatch.setattr(module, "predict_step", predict_step)
    with pytest.raises(RuntimeError, match="out of memory"):
        make_trainer(CompletionWriter(str(path))).predict(module, datamodule=data)
    assert path.read_text() == "old\n"
    assert read(tmp_path / "completions.jsonl.partial") == [{"completion": "é"}]


def test_several_ranks_write_files_of_their_own(module, data, make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.Trainer.world_size", 2)
    monkeypatch.setattr("lightning.pytorch.Trainer.global_rank", 1)
    writer, trainer = CompletionWriter(str(tmp_path / "completions.jsonl")), make_trainer()
    writer.on_predict_start(trainer, module)
    writer.write_on_batch_end(trainer, module, [{"completion": "a"}], None, None, 0, 0)
    writer.on_predict_end(trainer, module)
    assert read(tmp_path / "completions.rank1.jsonl") == [{"completion": "a"}]
