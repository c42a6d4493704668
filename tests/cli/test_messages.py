"""Mistakes that users make, and what the command line answers: one screen, the right sentence, no traceback.

With `LIT_SPECRL_MESSAGES=FILE` the answers go into that file, a line for each mistake: exit code, lines printed, first
line.
"""

import copy
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from lit_specrl.cli import main as cli

ROOT = Path(__file__).parents[2]
SCREEN = 12  # lines
FIT = ["fit", "--config", "run.yaml"]
REMOVED = object()

FILES = {
    "my_rewards.py": "limit = 3\n\ndef short(completions, **columns):\n    return [float(len(text)) for text in completions]\n\n"
    "def broken(completions, **columns):\n    return [1 / 0 for _ in completions]\n\n"
    "def words(completions, **columns):\n    return ['good' for _ in completions]\n\n"
    "def few(completions, **columns):\n    return [1.0]\n",
    "unfinished.py": "def short(completions, **columns)\n    return [0.0 for _ in completions]\n",
    "needy.py": "import package_that_is_not_there\n\ndef short(completions, **columns):\n    return [0.0 for _ in completions]\n",
    "eager.py": "raise RuntimeError('no key in the environment')\n",
    "my_callbacks.py": "import lightning as L\n\nclass Breaks(L.Callback):\n    def on_train_batch_end(self, *arguments):\n"
    "        raise KeyError('accuracy')\n\nclass Full(L.Callback):\n    def on_train_batch_end(self, *arguments):\n"
    "        raise OSError(28, 'No space left on device', 'runs/last.ckpt')\n\nclass Picky(L.Callback):\n    def __init__(self, path):\n        open(path)\n",
    "empty.yaml": "",
    "list.yaml": "- model\n- data\n",
    "word.yaml": "quickstart\n",
    "brackets.yaml": "model:\n  class_path: [GRPO\ndata: 2\n",
    "indented.yaml": "model:\n  class_path: GRPO\n   init_args: {}\n",
    "tabs.yaml": "model:\n\tclass_path: GRPO\n",
    "rows.txt": "2+3\n",
    "broken.jsonl": '{"question": "2+3?"\n',
    "columns.jsonl": '{"problem": "2+3?", "answer": "5"}\n',
    "nothing.jsonl": "",
}


def callback(name, **arguments):
    return {"trainer.callbacks": [{"class_path": name, "init_args": arguments}]}


def engine(**arguments):
    return callback("SpeculativeRollout", engine={"class_path": "VLLMEngine", "init_args": arguments})


def drafted(name, **arguments):
    drafter = {"class_path": name, "init_args": arguments}
    return callback("SpeculativeRollout", engine={"class_path": "VLLMEngine"}, drafter=drafter)


def model(**arguments):
    return {f"model.init_args.{name}": value for name, value in arguments.items()}


def data(**arguments):
    return {f"data.init_args.{name}": value for name, value in arguments.items()}


def trainer(**arguments):
    return {f"trainer.{name}": value for name, value in arguments.items()}


SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}

CONFIGURATION = {
    # commands and files
    "no command": ([], {}, "a command is missing"),
    "misspelt command": (["fti"], {}, "there is no command 'fti'; did you mean fit?"),
    "a file in place of a command": (["run.yaml"], {}, "there is no command 'run.yaml'; expected one of fit, validate"),
    "fit alone": (["fit"], {}, "begin with: lit-specrl fit --config recipes/quickstart.yaml"),
    "validate alone": (["validate"], {}, "validate needs a configuration"),
    "a file without --config": (
        ["fit", "run.yaml"],
        {},
        "unexpected argument 'run.yaml'; did you mean --config run.yaml?",
    ),
    "--config without a file": (["fit", "--config"], {}, "--config needs a file"),
    "missing file": (["fit", "--config", "nowhere.yaml"], {}, "there is no configuration file nowhere.yaml"),
    "misspelt file": (["fit", "--config", "rum.yaml"], {}, "did you mean run.yaml?"),
    "a folder as file": (["fit", "--config", "."], {}, ". cannot be read: is a directory"),
    "empty file": (["fit", "--config", "empty.yaml"], {}, "empty.yaml is empty"),
    "a list as configuration": (
        ["fit", "--config", "list.yaml"],
        {},
        "must be a mapping with the keys model, data and trainer, got a list",
    ),
    "a word as configuration": (
        ["fit", "--config", "word.yaml"],
        {},
        "must be a mapping with the keys model, data and trainer, got the text",
    ),
    "open bracket": (["fit", "--config", "brackets.yaml"], {}, "line 3"),
    "wrong indentation": (["fit", "--config", "indented.yaml"], {}, "line 3"),
    "tab": (["fit", "--config", "tabs.yaml"], {}, "line 2, column 1"),
    # unknown names
    "misspelt option": (
        [*FIT, "--model.init_args.num_generatons=4"],
        {},
        "GRPO has no num_generatons; did you mean num_generations?",
    ),
    "misspelt short option": ([*FIT, "--model.num_generatons", "4"], {}, "did you mean num_generations?"),
    "shortened option": ([*FIT, "--trainer.max_epoch=4"], {}, "trainer has no max_epoch; did you mean max_epochs?"),
    "option of no section": ([*FIT, "--max_epochs=4"], {}, "has no max_epochs; it belongs under trainer"),
    "option of another section": ([*FIT, "--num_generations=4"], {}, "has no num_generations; it belongs under model"),
    "misspelt section": (FIT, {"trainner": {"max_epochs": 2}}, "has no trainner; did you mean trainer?"),
    "an earlier version's argument": (
        FIT,
        model(kl_in_reward=True),
        "GRPO has no kl_in_reward; here it is kl: {in_reward: ...}",
    ),
    "TRL's argument": (FIT, model(reward_funcs=["x.y"]), "GRPO has no reward_funcs; here it is rewards"),
    "misspelt argument": (FIT, model(rewardz=[]), "GRPO has no rewardz; did you mean rewards?"),
    "misspelt data argument": (FIT, data(batchsize=4), "PromptDataModule has no batchsize; did you mean batch_size?"),
    "misspelt trainer argument": (FIT, trainer(maxepochs=4), "trainer has no maxepochs; did you mean max_epochs?"),
    "argument beside class_path": (FIT, {"model.num_generations": 4}, "num_generations belongs under init_args"),
    "argument of a critic": (
        FIT,
        model(critic={"class_path": "SeparateCritic", "init_args": {"warm_up": 3}}),
        "SeparateCritic has no warm_up; did you mean warmup_steps?",
    ),
    "argument of a reward": (
        FIT,
        model(rewards=[{"class_path": "FormatReward", "init_args": {"patern": "a"}}]),
        "FormatReward has no patern; did you mean pattern?",
    ),
    "argument of a callback": (
        FIT,
        callback("PrefixCache", lenienc=2),
        "PrefixCache has no lenienc; did you mean lenience?",
    ),
    "argument of an engine": (FIT, engine(max_num_seq=4), "VLLMEngine has no max_num_seq; did you mean max_num_seqs?"),
    "argument of an optimizer without a class": (
        [*FIT, "--model.init_args.optimizer=null", "--model.init_args.optimizer.lr=1e-5"],
        {},
        "optimizer needs a class_path, such as torch.optim.AdamW",
    ),
    "a learning rate of the module": (
        [*FIT, "--model.lr=1e-5"],
        {},
        "GRPO has no lr; here it is optimizer: {class_path: torch.optim.AdamW, init_args: {lr: ...}}",
    ),
    "misspelt argument of a class that is written out as an option": (
        [*FIT, "--model.init_args.rewards+={class_path: MathReward, init_args: {timeut: 5}}"],
        {},
        "MathReward has no timeut; did you mean timeout_s?",
    ),
    "argument of the optimizer": (
        FIT,
        model(optimizer={"class_path": "torch.optim.AdamW", "init_args": {"weightdecay": 0}}),
        "AdamW has no weightdecay; did you mean weight_decay?",
    ),
    "argument of a template": (FIT, data(template={"sufix": "x"}), "has no sufix; did you mean suffix?"),
    "argument of sampling": (
        FIT,
        model(eval_sampling={"temprature": 1}),
        "SamplingConfig has no temprature; did you mean temperature?",
    ),
    "argument of a source": (
        FIT,
        {"data.init_args.train.init_args.num_prompt": 3},
        "ArithmeticSource has no num_prompt; did you mean num_prompts?",
    ),
    "misspelt algorithm": (FIT, {"model.class_path": "GRP0"}, "there is no class GRP0; did you mean GRPO?"),
    "misspelt algorithm as option": ([*FIT, "--model=DAPOO"], {}, "there is no class DAPOO; did you mean DAPO?"),
    "misspelt data module": (
        FIT,
        {"data.class_path": "PromptData"},
        "there is no class PromptData; did you mean PromptDataModule?",
    ),
    "misspelt callback": (FIT, callback("PrefixCach"), "there is no class PrefixCach; did you mean PrefixCache?"),
    "misspelt callback of Lightning": (FIT, callback("ModelCheckpont"), "did you mean ModelCheckpoint?"),
    "misspelt reward": (FIT, model(rewards=[{"class_path": "MathsReward"}]), "did you mean MathReward?"),
    "misspelt engine": (
        FIT,
        callback("SpeculativeRollout", engine={"class_path": "VLLMEngin"}),
        "did you mean VLLMEngine?",
    ),
    "misspelt drafter": (FIT, drafted("NGramDraft"), "did you mean NGramDrafter?"),
    "misspelt critic": (FIT, model(critic={"class_path": "SeperateCritic"}), "did you mean SeparateCritic?"),
    "misspelt optimizer": (
        FIT,
        model(optimizer={"class_path": "torch.optim.AdamWW", "init_args": {"lr": 1}}),
        "did you mean torch.optim.AdamW?",
    ),
    "missing module of a class": (
        FIT,
        callback("my_package.MyCallback"),
        "there is no class my_package.MyCallback: No module named 'my_package'",
    ),
    "a reward as callback": (
        FIT,
        callback("lit_specrl.rewards.MathReward"),
        "lit_specrl.rewards.MathReward is not one of",
    ),
    "an engine as drafter": (FIT, drafted("lit_specrl.VLLMEngine"), "lit_specrl.VLLMEngine is not one of"),
    # missing
    "no model": (FIT, {"model": REMOVED}, "the configuration has no model"),
    "no rewards": (FIT, {"model.init_args.rewards": REMOVED}, "GRPO needs rewards"),
    "no model name": (FIT, {"model.init_args.model": REMOVED}, "GRPO needs model"),
    "no pattern": (FIT, model(rewards=[{"class_path": "FormatReward"}]), "FormatReward needs pattern"),
    "empty rewards": (FIT, model(rewards=[]), "rewards must hold at least one reward, got none"),
    "no data": (FIT, {"data.init_args.train": REMOVED}, "PromptDataModule has no data for `fit`"),
    # types
    "text for a number": (
        [*FIT, "--model.num_generations=many"],
        {},
        "num_generations must be a whole number, got the text 'many'",
    ),
    "fraction for a count": (
        FIT,
        model(num_generations=2.5),
        "num_generations must be a whole number, got the number 2.5",
    ),
    "text for a fraction": (FIT, model(temperature="warm"), "temperature must be a number, got the text 'warm'"),
    "text for a learning rate": (
        FIT,
        model(optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": "1e-6 or so"}}),
        "lr must be a number",
    ),
    "text for a switch": (FIT, data(shuffle="perhaps"), "shuffle must be true or false, got the text 'perhaps'"),
    "a list for a name": (FIT, model(model=["a", "b"]), "model must be text, got a list ['a', 'b']"),
    "a mapping for a number": (FIT, data(batch_size={"train": 2}), "batch_size must be a whole number, got a mapping"),
    "null for a count": (FIT, model(num_generations=None), "num_generations must not be null; leave it out"),
    "null for a number": (FIT, data(batch_size=None), "batch_size must be at least 1 prompt, got None"),
    "a value that is none of several": (
        FIT,
        model(scale_rewards="grup"),
        "scale_rewards must be one of group, batch, none, got the text 'grup'",
    ),
    "an estimator that there is not": (
        FIT,
        model(advantage_estimator="grpoo"),
        "advantage_estimator must be one of 'grpo', 'rloo', 'gae', 'reinforce_plus_plus'",
    ),
    "a loss that there is not": (FIT, model(loss_type="grpoo"), "loss_type must be one of grpo, dapo"),
    "another value that is none of several": (FIT, data(overlong="cut"), "overlong must be one of drop, raise"),
    "a number as callbacks": (FIT, trainer(callbacks=3), "callbacks must be a list (of a class_path such as"),
    "a number as trainer": (FIT, {"trainer": 3}, "trainer must be a mapping, got the number 3"),
    "a list as init_args": (FIT, {"model.init_args": ["a"]}, "init_args must be a mapping, got a list"),
    "a number as class_path": (
        FIT,
        {"model.class_path": 3},
        "class_path must be the name of a class, got the number 3",
    ),
    # values
    "one generation": (FIT, model(num_generations=1), "got num_generations=1; use at least 2"),
    "no generations": (FIT, model(num_generations=0), "num_generations must be at least 1, got 0"),
    "temperature 0": (FIT, model(temperature=0), "temperature must be positive in training, got 0"),
    "negative temperature": (FIT, model(temperature=-1), "temperature must not be negative, got -1"),
    "no tokens": (FIT, model(max_completion_length=0), "max_completion_length must be at least 1 token, got 0"),
    "top_p 2": (FIT, model(top_p=2.0), "top_p must lie in (0, 1], got 2.0"),
    "top_p with correction": (FIT, model(top_p=0.9), "importance_sampling is biased under top_p=0.9"),
    "min_p with correction": (FIT, model(min_p=0.1), "importance_sampling is biased under min_p=0.1"),
    "min_p 2": (FIT, model(min_p=2.0), "min_p must lie in [0, 1], got 2.0"),
    "no penalty": (FIT, model(repetition_penalty=0), "repetition_penalty must be positive, got 0"),
    "empty stop string": (FIT, model(stop=[""]), "stop must hold texts that are not empty, got ['']"),
    "unknown loss": (FIT, model(loss_type="ppo2"), "loss_type"),
    "negative epsilon": (FIT, model(epsilon=-0.2), "epsilon"),
    "negative beta": (FIT, model(beta=-1.0), "beta"),
    "gae without critic": (FIT, model(advantage_estimator="gae"), "critic"),
    "no minibatches": (FIT, model(num_minibatches=0), "num_minibatches must be at least 1, got 0"),
    "dtype of the policy": (
        FIT,
        model(dtype="float23"),
        "dtype must be one of float32, bfloat16, float16, got 'float23'",
    ),
    "gradient norm 0": (FIT, model(max_grad_norm=0), "max_grad_norm must be positive, got 0"),
    "batch size 0": (FIT, data(batch_size=0), "batch_size must be at least 1 prompt, got 0"),
    "evaluation batch size -1": (FIT, data(eval_batch_size=-1), "eval_batch_size must be at least 1 prompt, got -1"),
    "prompt length 0": (FIT, data(max_prompt_length=0), "max_prompt_length must be at least 1 token, got 0"),
    "minibatches do not divide": (FIT, model(num_minibatches=4), "num_minibatches=4; make batch_size a multiple of it"),
    "batch larger than the data": (FIT, data(batch_size=64), "64"),
    "too long for the model": (FIT, model(max_completion_length=1000), "do not fit the 256 positions"),
    "unknown preset": (FIT, data(train="deepmaths"), "deepmath"),
    "missing data file": (FIT, data(train="questions.jsonl"), "questions.jsonl: no such file"),
    "data file of another kind": (
        FIT,
        data(train={"class_path": "FileSource", "init_args": {"path": "rows.txt"}}),
        "expected a file ending in .jsonl",
    ),
    "data that is no JSON": (FIT, data(train="broken.jsonl"), "broken.jsonl, line 1: not valid JSON"),
    "data with other columns": (FIT, data(train="columns.jsonl"), "no column 'question'"),
    "empty data": (FIT, data(train="nothing.jsonl"), "nothing.jsonl"),
    "sleep level 5": (FIT, engine(sleep_level=5), "sleep_level must be 0, 1, 2 or auto, got 5"),
    "no sequences": (FIT, engine(max_num_seqs=0), "max_num_seqs must be at least 1, got 0"),
    "unknown option of vLLM": (
        FIT,
        engine(options={"max_num_seq": 4}),
        "vLLM has no option 'max_num_seq'; did you mean max_num_seqs?",
    ),
    "negative cache": (
        FIT,
        engine(cpu_kv_cache_gib=-1),
        "must be a positive number of GiB, such as 0.5, got -1",
    ),
    "endless cache": (
        FIT,
        engine(cpu_kv_cache_gib=float("inf")),
        "must be a positive number of GiB, such as 0.5, got inf",
    ),
    "twice the GPU": (
        FIT,
        engine(gpu_memory_utilization=2),
        "gpu_memory_utilization is a fraction of the GPU's memory and must lie in (0, 1], got 2",
    ),
    "dtype of the engine": (
        FIT,
        engine(dtype="float23"),
        "dtype must be one of auto, bfloat16, float16, float32, got 'float23'",
    ),
    "engine too short": (FIT, engine(max_model_len=16), "max_model_len=16 is less than"),
    "speculation as option of vLLM": (
        FIT,
        engine(options={"speculative_config": {}}),
        "give SpeculativeRollout a drafter",
    ),
    "drafter without vLLM": (
        FIT,
        callback(
            "SpeculativeRollout", engine={"class_path": "TransformersEngine"}, drafter={"class_path": "NGramDrafter"}
        ),
        "cannot speculate",
    ),
    "drafts of no tokens": (
        FIT,
        drafted("NGramDrafter", num_speculative_tokens=0),
        "num_speculative_tokens must be at least 1, got 0",
    ),
    "history without a cache": (FIT, drafted("HistoryDrafter", siblings=False), "add PrefixCache()"),
    "negative lenience": (FIT, callback("PrefixCache", lenience=-0.5), "lenience"),
    # rewards
    "missing module of a reward": (
        FIT,
        model(rewards=["their_rewards.short"]),
        "there is no module 'their_rewards' in the working folder",
    ),
    "missing function of a reward": (
        FIT,
        model(rewards=["my_rewards.shrt"]),
        "found no such name; did you mean short?",
    ),
    "a number as reward": (FIT, model(rewards=["my_rewards.limit"]), "found a int"),
    "a reward without module": (
        FIT,
        model(rewards=["short"]),
        "a reward function is given as 'package.module.function', got 'short'",
    ),
    "a reward that does not parse": (FIT, model(rewards=["unfinished.short"]), "unfinished.py, line 1 is not Python"),
    "a reward with a missing package": (FIT, model(rewards=["needy.short"]), "needs 'package_that_is_not_there'"),
    "a reward that fails when imported": (
        FIT,
        model(rewards=["eager.short"]),
        "importing module 'eager' failed: RuntimeError: no key",
    ),
    "two rewards of one name": (
        FIT,
        model(rewards=["my_rewards.short", "my_rewards.short"]),
        "2 rewards are named 'short'",
    ),
    "pattern that is no pattern": (
        FIT,
        model(rewards=[{"class_path": "FormatReward", "init_args": {"pattern": "("}}]),
        "pattern",
    ),
    # models
    "missing model folder": (FIT, model(model="./models/mine"), "'./models/mine' is neither a folder"),
    "missing model of the hub": (FIT, model(model="nobody/nothing-1B"), "'nobody/nothing-1B' is neither a folder"),
    "an empty folder as model": (FIT, model(model="models/empty"), "'models/empty' is neither a folder"),
    "a model without tokenizer": (FIT, model(model="models/mute"), "has no tokenizer"),
    "a model without weights": (FIT, model(model="models/weightless"), "has no weights"),
    "cut weights": (FIT, model(model="models/cut"), "it was probably cut when it was copied"),
    "a missing shard": (
        FIT,
        model(model="models/sharded"),
        "lacks model-00002-of-00002.safetensors (1 of 2 files are there)",
    ),
    "weights that are text": (FIT, model(model="models/text"), "is no safetensors file"),
    "unknown architecture": (FIT, model(model="models/alien"), "cannot be used"),
    "missing critic": (
        FIT,
        {
            "model.class_path": "PPO",
            **model(critic={"class_path": "SeparateCritic", "init_args": {"model": "models/none"}}),
        },
        "'models/none' is neither a folder",
    ),
    "missing draft model": (FIT, drafted("DraftModel", model="models/none"), "'models/none' is neither a folder"),
    "missing head": (FIT, drafted("Eagle3Drafter", model="models/none"), "'models/none' is no EAGLE-3 head"),
    # trainer
    "16-mixed": (FIT, trainer(precision="16-mixed"), "use 'bf16-mixed' or '32-true'"),
    "unknown precision": (FIT, trainer(precision="bf61"), "precision"),
    "unknown strategy": (FIT, trainer(strategy="dpp"), "there is no strategy 'dpp'; did you mean ddp?"),
    "unknown accelerator": (FIT, trainer(accelerator="gpuu"), "accelerator"),
    "no devices": (FIT, trainer(devices=0), "devices must be at least 1"),
    "too many devices": (FIT, trainer(devices=4096), "devices=4096 are more than there are"),
    "no epochs": (FIT, trainer(max_epochs=-3), "max_epochs"),
    "missing checkpoint": ([*FIT, "--ckpt_path=nowhere.ckpt"], {}, "there is no checkpoint nowhere.ckpt"),
    "a text as checkpoint": (
        [*FIT, "--ckpt_path=run.yaml"],
        {},
        "run.yaml cannot be used: the file is cut off or damaged, or is not a checkpoint",
    ),
    "a class alone": (FIT, {"model": "GRPO"}, "GRPO needs model and rewards under model.init_args"),
    "misspelt logger": ([*FIT, "--trainer.logger=TensorBoardLogge"], {}, "did you mean TensorBoardLogger?"),
    "argument of an added callback": (
        [*FIT, "--trainer.callbacks+=PrefixCache", "--trainer.callbacks.lenienc=2"],
        {},
        "PrefixCache has no lenienc; did you mean lenience?",
    ),
    "a reward in place of a list": (FIT, model(rewards="MathReward"), "rewards must be a list"),
    "missing file among several": (FIT, data(train={"a": "nope.json"}), "nope.json: no such file"),
    "a file as output folder": (
        FIT,
        trainer(default_root_dir="run.yaml"),
        "the output folder run.yaml cannot be written",
    ),
    "an output folder in a file": (
        FIT,
        trainer(default_root_dir="run.yaml/runs"),
        "cannot be written: not a directory",
    ),
    "unwritable output folder": (
        FIT,
        trainer(default_root_dir="/proc/runs"),
        "the output folder /proc/runs cannot be written",
    ),
    "constructor of the user": (
        FIT,
        callback("my_callbacks.Picky", path="nowhere.txt"),
        "nowhere.txt: no such file or directory",
    ),
    "validation without data": (
        ["validate", "--config", "run.yaml"],
        {},
        "PromptDataModule has no data for `validate`",
    ),
    # other commands
    "export alone": (["export"], {}, "lit-specrl export needs checkpoint and folder;"),
    "export of nothing": (
        ["export", "nowhere.ckpt", "exported"],
        {},
        "nowhere.ckpt cannot be used: there is no such file",
    ),
    "export of a text": (
        ["export", "run.yaml", "exported"],
        {},
        "run.yaml cannot be used: the file is cut off or damaged",
    ),
    "export over a folder": (["export", "run.yaml", "models"], {}, "models exists already"),
    "export with another dtype": (
        ["export", "run.yaml", "exported", "--dtype=float23"],
        {},
        "dtype must be one of float32, bfloat16, got the text 'float23'",
    ),
    "misspelt option of export": (
        ["export", "run.yaml", "exported", "--adapter=true"],
        {},
        "has no adapter; did you mean adapter_only?",
    ),
    "unknown benchmark": (["bench", "logprob"], {}, "there is no benchmark 'logprob'; did you mean logprobs?"),
    "misspelt option of a benchmark": (["bench", "logprobs", "--repeat=3"], {}, "has no repeat; did you mean repeats?"),
    "text for a number of a benchmark": (
        ["bench", "logprobs", "--repeats=many"],
        {},
        "repeats must be a whole number, got the text 'many'",
    ),
    "benchmark without callbacks": (["bench", "rollout", "--config=run.yaml"], {}, "bench rollout needs --without;"),
    "benchmark without a name": (["bench"], {}, "a benchmark is missing; expected one of rollout, engine, logprobs"),
    "benchmark without an unknown callback": (
        ["bench", "rollout", "--config=run.yaml", "--without=PrefixCache"],
        {},
        "--without PrefixCache: there is no such callback",
    ),
    "benchmark with a misspelt option of fit": (
        ["bench", "rollout", "--config=run.yaml", "--without=PrefixCache", "--model.bet=1"],
        {},
        "GRPO has no bet; did you mean beta?",
    ),
    "drafter without a folder": (["drafter", "--config=run.yaml"], {}, "lit-specrl drafter needs --output;"),
    "two drafters": (
        ["drafter", "--config=run.yaml", "--output=head", "--head=a", "--draft_model=b"],
        {},
        "--head and --draft_model are two drafters; give one of them",
    ),
    "drafter without a configuration": (["drafter", "--output=head"], {}, "a configuration is missing"),
    "drafter from no rollouts": (
        ["drafter", "--config=run.yaml", "--output=head", "--num_rollouts=0"],
        {},
        "num_rollouts must be at least 1, got 0",
    ),
}
RUN_TIME = {
    "a reward that raises": (
        FIT,
        model(rewards=["my_rewards.broken"]),
        "reward 'broken' failed: ZeroDivisionError: division by zero",
        "my_rewards.py:7 in <listcomp>",
    ),
    "a reward that returns words": (
        FIT,
        model(rewards=["my_rewards.words"]),
        "must return numbers or None, got 'good'",
        "",
    ),
    "a reward that returns too few": (FIT, model(rewards=["my_rewards.few"]), "expected 4, got 1", ""),
    "a full disk": (
        FIT,
        callback("my_callbacks.Full"),
        "runs/last.ckpt: no space left on device; make room, or write elsewhere",
        "",
    ),
    "a callback that raises": (
        FIT,
        callback("my_callbacks.Breaks"),
        "KeyError: 'accuracy'",
        "my_callbacks.py:5 in on_train_batch_end",
    ),
}


@pytest.fixture(scope="module")
def settings(tiny_model):
    """A complete configuration."""
    arguments = {"model": tiny_model, "rewards": ["my_rewards.short"], "num_generations": 2, "max_completion_length": 6}
    questions = {"class_path": "ArithmeticSource", "init_args": {"num_prompts": 4}}
    return {
        "model": {"class_path": "GRPO", "init_args": {**arguments, "optimizer": SGD}},
        "data": {
            "class_path": "PromptDataModule",
            "init_args": {"train": questions, "batch_size": 2, "max_prompt_length": 64},
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": "runs",
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
        },
    }


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """A working folder with files that are wrong in all ways."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    weights = (Path(tiny_model) / "model.safetensors").read_bytes()
    (folder / "models/empty").mkdir(parents=True)
    for name in ("mute", "weightless", "cut", "sharded", "text", "alien"):
        copied = folder / "models" / name
        copied.mkdir()
        for file in Path(tiny_model).iterdir():
            (copied / file.name).write_bytes(file.read_bytes())
    for file in (folder / "models/mute").glob("tokenizer*"):
        file.unlink()
    (folder / "models/weightless/model.safetensors").unlink()
    (folder / "models/cut/model.safetensors").write_bytes(weights[:-1000])
    (folder / "models/text/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    (folder / "models/sharded/model.safetensors").rename(folder / "models/sharded/model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "models/sharded/model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    state = {"model": "models/other", "step": 1, "policy_version": 1, "skipped_updates": [0, 0]}
    saved = {"epoch": 0, "global_step": 1, "pytorch-lightning_version": "2.6.6", "state_dict": {}}
    torch.save({**saved, "rlvr": state, "state_dict": {"policy.model.a": torch.zeros(2, 3)}}, folder / "other.ckpt")
    torch.save(saved, folder / "foreign.ckpt")
    config = json.loads((folder / "models/alien/config.json").read_text())
    (folder / "models/alien/config.json").write_text(json.dumps({**config, "model_type": "alien"}))
    return folder


@pytest.fixture(scope="module")
def table():
    """What was answered, for the file that was asked for."""
    rows = []
    yield rows
    file = os.environ.get("LIT_SPECRL_MESSAGES")
    if file:
        Path(file).write_text("".join(f"{code}  {lines:2}  {name}: {first}\n" for name, code, lines, first in rows))


@pytest.fixture
def answer(folder, settings, table, monkeypatch, request):
    """Calls the command line in this process, as if it were a new one; returns exit code and lines."""
    from lightning.pytorch.cli import LightningCLI

    commands = LightningCLI.subcommands()

    def answer(name, arguments, changes):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "argv", ["lit-specrl", *arguments])
        monkeypatch.setenv("TMPDIR", str(folder))
        monkeypatch.setattr(tempfile, "tempdir", None)
        asked = arguments[0] if arguments and arguments[0] in commands else "fit"  # the parsers of the others take time
        monkeypatch.setattr(LightningCLI, "subcommands", staticmethod(lambda: {asked: commands[asked]}))
        Path("run.yaml").write_text(yaml.safe_dump(changed(settings, changes)))
        return printed(name, cli.main, table)

    return answer


def changed(settings, changes):
    settings = copy.deepcopy(settings)
    for path, value in changes.items():
        *parents, last = path.split(".")
        part = settings
        for parent in parents:
            part = part[parent]
        if value is REMOVED:
            del part[last]
        else:
            part[last] = value
    return settings


def printed(name, call, table):
    """Exit code and lines of both outputs of a call."""
    with tempfile.TemporaryFile("w+") as file, warnings.catch_warnings():
        saved = os.dup(1), os.dup(2)
        streams = sys.stdout, sys.stderr
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(2), "w")
            with pytest.raises(SystemExit) as end:
                call()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            sys.stdout, sys.stderr = streams
            for number, old in enumerate(saved, start=1):
                os.dup2(old, number)
                os.close(old)
        file.seek(0)
        lines = file.read().splitlines()
    first = next((line for line in lines if line.startswith("lit-specrl")), lines[0] if lines else "")
    table.append((name, end.value.code, len(lines), first[:160]))
    return end.value.code, lines


@pytest.mark.parametrize("mistake", CONFIGURATION)
def test_a_mistake_is_answered_on_one_screen(mistake, answer):
    arguments, changes, message = CONFIGURATION[mistake]
    code, lines = answer(mistake, arguments, changes)
    text = " ".join(" ".join(lines).split())
    assert code == 2, text
    assert message in text
    assert not any(line.startswith("Traceback") for line in lines)
    assert len(lines) <= SCREEN, text


@pytest.mark.parametrize("mistake", RUN_TIME)
def test_what_fails_in_a_run_is_told_with_the_place_in_the_users_code(mistake, answer):
    arguments, changes, message, place = RUN_TIME[mistake]
    code, lines = answer(mistake, arguments, changes)
    start = next(index for index, line in enumerate(lines) if line.startswith("lit-specrl fit: "))
    text = " ".join(" ".join(lines[start:]).split())
    assert code == 1
    assert message in text and place in text
    assert "Traceback" not in " ".join(lines)
    assert len(lines) - start <= SCREEN / 2


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("other.ckpt", "the checkpoint is of a run with model 'models/other', and does not fit this one with model"),
        ("foreign.ckpt", "it is a checkpoint of Lightning, but not of a module of lit_specrl"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_told_in_one_sentence(checkpoint, message, answer):
    code, lines = answer(checkpoint, [*FIT, f"--ckpt_path={checkpoint}"], {})
    start = next(index for index, line in enumerate(lines) if line.startswith("lit-specrl fit: "))
    assert code == 2
    assert message in " ".join(lines[start:])
    assert len(lines) - start <= SCREEN / 2


def test_debug_prints_the_traceback_and_otherwise_a_file_has_it(answer):
    _, lines = answer("debug", [*FIT, "--model.temperature=0", "--debug"], {})
    assert "Traceback (most recent call last):" in lines
    _, lines = answer("no debug", [*FIT, "--model.temperature=0"], {})
    file = lines[-1].partition("traceback: ")[2].removesuffix(" (--debug prints it)")
    assert "ValueError: temperature must be positive" in Path(file).read_text()


# -------------------------------------------------------------------------------------------------------- own processes


def test_what_can_be_said_without_imports_is_said_without_them():
    program = (
        "import sys; from lit_specrl.cli import main as cli; sys.argv = ['lit-specrl', 'fit', '--config', 'nowhere.yaml']\n"
        "try: cli.main()\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n"
    assert done.stderr.startswith("lit-specrl fit: there is no configuration file nowhere.yaml")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["bench", "--help"], ["bench", "rollout", "--help"], ["drafter", "--help"]]
)
def test_help_needs_no_torch(arguments):
    program = (
        f"import sys; from lit_specrl.cli import main; sys.argv = ['lit-specrl', *{arguments}]\n"
        "try: main.main()\nexcept SystemExit as end: assert not end.code\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: lit-specrl") and done.stdout.endswith("\nFalse\n")


def test_without_a_network_a_missing_model_is_told_at_once(tmp_path):
    nowhere = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "lit_specrl.cli", "fit", "--config", str(ROOT / "recipes/quickstart.yaml")]
    options = [f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu"]
    done = subprocess.run(
        [*command, *options], env={**os.environ, **nowhere}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    printed = (done.stdout + done.stderr).splitlines()
    assert done.returncode == 2
    assert "is neither a folder in the transformers format" in done.stderr
    assert "Retrying" not in done.stderr  # the client of the hub tries five times, file by file
    assert len(printed) <= SCREEN
