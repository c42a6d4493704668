"""PrefixCache over the end of a process: checkpoints, what lies beside them, and what may have changed in between."""

import dataclasses
import json
import shutil
import warnings
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from reuse_runs import FROZEN, GROUP, MAX_LENGTH, STEPS, fit, grpo, last_responses, questions, rows_of, spread_but_why
from training import QUESTIONS, assert_identical, small_tokens, weights_of

from lit_specrl import DAPO, PPO, PromptDataModule, SeparateCritic
from lit_specrl.callbacks import PrefixCache, RolloutCallback
from lit_specrl.callbacks.cache_owner import identity_of
from lit_specrl.data import FileSource
from lit_specrl.models.policy import Policy
from lit_specrl.prefix_cache import BoundedShare, BySignal, KeepSuccesses, RenewInTurns
from lit_specrl.prefix_cache.lenience import AdaptiveLenience
from lit_specrl.prefix_cache.store import RolloutStore
from lit_specrl.rewards import MathReward, RewardFunction

EVERYTHING = float("inf")  # a lenience
ADAM = partial(torch.optim.AdamW, lr=3e-3)
COMMON = {"num_generations": GROUP, "max_completion_length": MAX_LENGTH, "optimizer": ADAM}


@pytest.fixture
def run(model_folder, tmp_path):
    """Train on the questions for three epochs; returns the module, what happened, and the cache."""

    def run(*callbacks, cache=None, module=None, data=None, ckpt_path=None, **options):
        cache, module = cache or PrefixCache(), module or grpo(model_folder, optimizer=ADAM)
        options = {"max_epochs": 3, "default_root_dir": tmp_path / "root"} | options
        trace = fit(module, data or questions(tmp_path), cache, *callbacks, ckpt_path=ckpt_path, **options)
        return module, trace, cache

    return run


@pytest.fixture
def saved(run, tmp_path):
    """The folder of a run of one epoch with a checkpoint after each step, the run itself, and its last checkpoint."""
    _, trace, _ = run(every_step(tmp_path / "saved"), max_epochs=1)
    return tmp_path / "saved", trace, tmp_path / "saved" / f"step={STEPS}.ckpt"


def every_step(folder, **options):
    return ModelCheckpoint(folder, filename="{step}", **{"every_n_train_steps": 1, "save_top_k": -1} | options)


def contents(cache):
    """All that a cache holds, as plain values."""
    return [
        {
            name: getattr(row, name).tolist() if isinstance(getattr(row, name), np.ndarray) else getattr(row, name)
            for name in type(row).__slots__
        }
        for row in cache.store
    ]


# --------------------------------------------------------------------------------------------------------- exact resume

RUNS = {
    "GRPO": (partial(grpo, optimizer=ADAM), PrefixCache),
    "GRPO, KL": (partial(grpo, optimizer=ADAM, beta=0.1), partial(PrefixCache, 1.5, control_fraction=0.25)),
    "adaptive lenience": (
        partial(grpo, optimizer=ADAM),
        lambda: PrefixCache(adaptive_lenience=AdaptiveLenience(target=10.0, high=1e6, min_fraction=1)),
    ),
    "fewer groups": (
        partial(grpo, optimizer=ADAM),
        lambda: PrefixCache(adaptive_lenience=AdaptiveLenience(target=1e-9, min_fraction=0.4)),
    ),
    "by sequence": (partial(grpo, optimizer=ADAM), partial(PrefixCache, acceptance="sequence")),
    "renewed": (partial(grpo, optimizer=ADAM), partial(PrefixCache, max_reuses=1)),
    "DAPO": (lambda model: DAPO(model, [spread_but_why], overlong_buffer=0, **COMMON), PrefixCache),
    "PPO": (lambda model: PPO(model, [small_tokens], SeparateCritic(optimizer=ADAM), beta=0.1, **COMMON), PrefixCache),
    "evicting": (partial(grpo, optimizer=ADAM), partial(PrefixCache, max_bytes=12_000)),
    "random": (partial(grpo, optimizer=ADAM), partial(PrefixCache, acceptance="random")),
    "by signal": (
        partial(grpo, optimizer=ADAM, rewards=[spread_but_why]),
        lambda: PrefixCache(EVERYTHING, reuse_policy=BySignal(BoundedShare(0.7, drawn=True))),
    ),
    "a drawn share": (
        partial(grpo, optimizer=ADAM),
        lambda: PrefixCache(EVERYTHING, max_reuses=2, reuse_policy=BoundedShare(drawn=True)),
    ),
    "successes": (partial(grpo, optimizer=ADAM), lambda: PrefixCache(EVERYTHING, reuse_policy=KeepSuccesses())),
    "in turns": (partial(grpo, optimizer=ADAM), lambda: PrefixCache(EVERYTHING, reuse_policy=RenewInTurns())),
}


@pytest.mark.parametrize("name", RUNS)
def test_resumed_run_equals_the_uninterrupted_one(run, model_folder, tmp_path, recwarn, name):
    """Six steps in three epochs, resumed inside an epoch and at the ends of two; a fresh cache is filled from the
    file."""
    make, make_cache = RUNS[name]
    full, trace, cache = run(every_step(tmp_path), cache=make_cache(), module=make(model_folder))
    assert sum(trace.of_cache("saved_tokens")) > 0
    for step in (1, 2, 3, 4):
        resumed, rest, loaded = run(
            cache=make_cache(), module=make(model_folder), ckpt_path=tmp_path / f"step={step}.ckpt"
        )
        assert rest.tokens == trace.tokens[step:]
        assert rest.learned == trace.learned[step:]
        if name != "random":  # which scores nothing
            assert rest.of_cache("block_length") == trace.of_cache("block_length")[step:]
        assert_identical(weights_of(resumed), weights_of(full))
        assert contents(loaded) == contents(cache)
    assert not [warning for warning in recwarn if "prefix cache" in str(warning.message)]
    if name == "adaptive lenience":
        assert len(set(trace.of_cache("lenience")[2:])) == 4  # another one in each step that is resumed


@pytest.mark.parametrize("way", ["folder moved", "folder copied", "checkpoint alone copied"])
def test_the_cache_is_found_when_the_checkpoint_has_moved(run, saved, tmp_path, recwarn, way):
    folder, _, checkpoint = saved
    _, expected, _ = run(ckpt_path=checkpoint)
    elsewhere = tmp_path / "elsewhere"
    if way == "checkpoint alone copied":
        elsewhere.mkdir()
        shutil.copy(checkpoint, elsewhere)
    else:
        shutil.copytree(folder, elsewhere)
        if way == "folder moved":
            shutil.rmtree(folder)
    _, trace, _ = run(ckpt_path=elsewhere / checkpoint.name)
    assert trace.of_cache("hit_fraction") == [1.0] * 2 * STEPS
    assert trace.tokens == expected.tokens
    assert not [warning for warning in recwarn if "prefix cache" in str(warning.message)]


def test_runs_that_are_resumed_at_the_end_of_epochs_end_when_they_should(run, tmp_path):
    """Lightning lost an epoch, or made one twice, when a run that had gone on from the last step of an epoch was
    resumed at the end of the next."""
    _, expected, _ = run(max_epochs=4)
    checkpoint, steps = None, []
    for epoch in range(1, 5):
        for place in (epoch * STEPS - 1, epoch * STEPS):  # in the middle, and at the end
            folder = tmp_path / f"resumed-{place}"
            _, trace, _ = run(every_step(folder), ckpt_path=checkpoint, max_epochs=4)
            checkpoint = folder / f"step={place}.ckpt"
            steps.append(len(trace.metrics))
            assert_identical(trace.learned, expected.learned[-len(trace.metrics) :])
    assert steps == [4 * STEPS - done for done in range(4 * STEPS)]


# ---------------------------------------------------------------------------------------- caches beside the checkpoints


def cache_files(folder):
    return sorted(path.name for path in (folder / "prefix_cache").iterdir())


def resume_all(run, folder):
    """Resume each checkpoint of the folder; returns the warnings about caches, by checkpoint."""
    found = {}
    for checkpoint in sorted(folder.glob("*.ckpt")):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(ckpt_path=checkpoint, max_epochs=4)
        found[checkpoint.name] = [str(entry.message) for entry in caught if "prefix cache" in str(entry.message)]
    return found


class Scores(RolloutCallback):
    """Logs the given scores, one a step."""

    def __init__(self, scores):
        self.scores = iter(scores)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.log("score", next(self.scores))


def test_the_best_checkpoints_keep_their_caches(run, tmp_path):
    """Files were deleted by age: the best checkpoint, of the first step, lost its own to those of later steps."""
    best = every_step(tmp_path / "best", save_top_k=2, monitor="score", mode="max")
    run(Scores([0.9, 0.1, 0.2, 0.3, 0.4, 0.5]), best)
    assert resume_all(run, tmp_path / "best") == {"step=1.ckpt": [], "step=6.ckpt": []}


def test_checkpoints_saved_by_hand_keep_their_caches(run, tmp_path):
    """Where no ModelCheckpoint told of their number, the last two caches stayed."""

    class ByHand(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / "by hand" / f"{pl_module.step}.ckpt")

    run(ByHand())
    found = resume_all(run, tmp_path / "by hand")
    assert found == {f"{step}.ckpt": [] for step in range(1, 3 * STEPS + 1)}


def test_a_new_run_in_the_folder_of_a_longer_one_keeps_its_cache(run, tmp_path, recwarn):
    """Its first file had the lowest step, was taken for the oldest, and was deleted as soon as it was written."""
    run(every_step(tmp_path / "same", save_top_k=1))
    run(every_step(tmp_path / "same", save_top_k=1), max_steps=1)
    _, trace, _ = run(ckpt_path=tmp_path / "same" / "step=1.ckpt", max_epochs=2)
    assert trace.of_cache("hit_fraction") == [0.0, 1.0, 1.0]
    assert not [warning for warning in recwarn if "prefix cache" in str(warning.message)]


def test_caches_do_not_pile_up(run, tmp_path):
    run(every_step(tmp_path / "last", save_top_k=1), max_epochs=4)
    assert [path.name for path in (tmp_path / "last").glob("*.ckpt")] == ["step=8.ckpt"]
    files = cache_files(tmp_path / "last")
    assert "step-00000008-rank0-of-1.safetensors" in files and len(files) <= 3


def test_caches_do_not_pile_up_over_restarts(run, tmp_path):
    """Lightning keeps each checkpoint that a run was resumed from; caches of those it deletes are of no use to
    anybody."""
    folder, checkpoint = tmp_path / "restarted", None
    for step in (3, 6, 9, 12):
        run(every_step(folder, save_top_k=1), ckpt_path=checkpoint, max_epochs=-1, max_steps=step)
        checkpoint = folder / f"step={step}.ckpt"
    assert len(cache_files(folder)) <= len(list(folder.glob("*.ckpt"))) + 2


def test_the_responses_of_a_checkpoint_can_be_left_out(run, tmp_path):
    run(every_step(tmp_path))
    _, rest, _ = run(cache=PrefixCache(load_cache=False), ckpt_path=tmp_path / f"step={STEPS}.ckpt")
    assert rest.of_cache("hit_fraction") == [0.0] * STEPS + [1.0] * STEPS


def test_a_checkpoint_that_is_a_broken_link_disturbs_nobody(run, tmp_path):
    """With `save_last="link"` a kill between the removal of a checkpoint and the new link leaves one behind."""
    folder = tmp_path / "linked"
    folder.mkdir()
    (folder / "last.ckpt").symlink_to(folder / "step=0.ckpt")
    _, trace, _ = run(every_step(folder, save_top_k=1, save_last="link"))
    assert len(trace.metrics) == 3 * STEPS
    _, rest, _ = run(ckpt_path=folder / "last.ckpt", max_epochs=4)
    assert rest.of_cache("hit_fraction") == [1.0] * STEPS


# ------------------------------------------------------------------------------------------------------- unusable files


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (flip_a_bit, r"not used: damaged \(its checksum does not match"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "not used: damaged"),
        (Path.unlink, "No such file"),
    ],
    ids=["a bit flipped", "cut", "missing"],
)
def test_an_unusable_cache_is_set_aside_and_the_run_goes_on(run, saved, spoil, message):
    folder, _, checkpoint = saved
    path = folder / "prefix_cache" / f"step-{STEPS:08d}-rank0-of-1.safetensors"
    spoil(path)
    existed = path.exists()
    with pytest.warns(
        UserWarning, match=f"cache of rank 0 cannot be used, its prompts are generated afresh.*{message}"
    ):
        _, trace, _ = run(ckpt_path=checkpoint)
    assert trace.of_cache("hit_fraction") == [0.0] * STEPS + [1.0] * STEPS
    assert not path.exists()
    assert path.with_name(f"{path.name}.rejected").exists() is existed


def test_a_cache_of_another_temperature_is_left_to_its_checkpoint(run, saved, model_folder):
    """One resume with a changed setting took it away from the checkpoint, whose next resume found no file."""
    _, _, checkpoint = saved
    message = "cannot be used.*not used: foreign .*temperature: expected '0.7', found '1.0'.*left as it is"
    with pytest.warns(UserWarning, match=message):
        _, trace, _ = run(module=grpo(model_folder, optimizer=ADAM, temperature=0.7), ckpt_path=checkpoint)
    assert trace.of_cache("hit_fraction") == [0.0] * STEPS + [1.0] * STEPS
    _, trace, _ = run(ckpt_path=checkpoint)
    assert trace.of_cache("hit_fraction") == [1.0] * 2 * STEPS


def test_a_cache_of_another_architecture_is_not_used(run, saved, model_folder, tmp_path):
    _, _, checkpoint = saved
    other = shutil.copytree(model_folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.warns(UserWarning, match="not used: foreign .*architecture: expected '"):
        _, trace, _ = run(module=grpo(str(other), optimizer=ADAM), ckpt_path=checkpoint)
    assert trace.of_cache("hit_fraction") == [0.0] * STEPS + [1.0] * STEPS


@pytest.mark.parametrize("is_moved", [True, False])
def test_a_moved_model_keeps_its_cache_but_not_what_may_be_another_references(run, model_folder, tmp_path, is_moved):
    run(every_step(tmp_path / "saved"), module=grpo(model_folder, optimizer=ADAM, beta=0.1), max_epochs=1)
    folder = shutil.copytree(model_folder, tmp_path / "moved") if is_moved else model_folder
    module, loaded = grpo(str(folder), optimizer=ADAM, beta=0.1), []
    watched = PrefixCache()
    watched.on_train_start = lambda *_: loaded.extend(watched.store)
    _, trace, _ = run(module=module, cache=watched, ckpt_path=tmp_path / "saved" / f"step={STEPS}.ckpt")
    assert trace.of_cache("hit_fraction") == [1.0] * 2 * STEPS
    assert {row.reference_logprobs is None for row in loaded} == {is_moved}


def test_evaluating_a_checkpoint_leaves_its_cache_alone(saved, model_folder, tmp_path):
    """Testing at another temperature found a foreign cache and set the one of the training run aside."""
    folder, _, checkpoint = saved
    before = cache_files(folder)
    data = questions(tmp_path)
    data.sources["test"] = data.sources["train"]
    trainer = L.Trainer(accelerator="cpu", callbacks=[PrefixCache()], logger=False, enable_progress_bar=False)
    trainer.test(grpo(model_folder, temperature=0.7), datamodule=data, ckpt_path=checkpoint)
    assert cache_files(folder) == before


def test_a_checkpoint_of_a_run_without_a_cache_is_told_of(run, model_folder, tmp_path):
    fit(grpo(model_folder, optimizer=ADAM), questions(tmp_path), every_step(tmp_path / "plain"))
    with pytest.warns(UserWarning, match="comes from a run without PrefixCache; its first epoch generates everything"):
        _, trace, _ = run(ckpt_path=tmp_path / "plain" / f"step={STEPS}.ckpt")
    assert trace.of_cache("hit_fraction") == [0.0] * STEPS + [1.0] * STEPS


def test_a_run_goes_on_without_the_cache(run, saved, model_folder, tmp_path):
    """Leaving a callback out may make a run slower, never wrong."""
    _, _, checkpoint = saved
    trace = fit(grpo(model_folder, optimizer=ADAM), questions(tmp_path), ckpt_path=checkpoint, max_epochs=2)
    assert len(trace.metrics) == STEPS


# ---------------------------------------------------------------------------------------------------- changed settings


def counting(bonus):
    """A reward function called `count`, which says how often it was asked."""

    def count(completions, **columns):
        asked.append(len(completions))
        return [bonus + len(set(text)) for text in completions]

    asked = []
    return count, asked


@pytest.mark.parametrize("is_other", [False, True])
def test_rewards_of_another_function_are_not_taken(run, model_folder, tmp_path, is_other):
    """A function of the same name took over the numbers of the one before, and was never called."""
    first, _ = counting(0)
    frozen = {"optimizer": FROZEN}
    run(every_step(tmp_path / "saved"), module=grpo(model_folder, [first], **frozen), max_epochs=1)
    second, asked = counting(100 if is_other else 0)
    checkpoint = tmp_path / "saved" / f"step={STEPS}.ckpt"
    _, trace, _ = run(module=grpo(model_folder, [second], **frozen), ckpt_path=checkpoint, max_epochs=2)
    assert trace.of_cache("full_reuse_fraction") == [1.0] * STEPS
    assert sum(asked) == (STEPS * 2 * GROUP if is_other else 0)
    assert all((metrics["reward"] > 100) == is_other for metrics in trace.metrics)


@pytest.mark.parametrize("change", [None, "column", "source"])
def test_rewards_for_other_data_are_not_taken(run, model_folder, tmp_path, change):
    """A row with corrected tests in the data kept the rewards of the wrong ones for the rest of the run."""

    def passes(completions, tests, source, **columns):
        asked.extend(zip(source, tests, strict=True))
        return [float(test[0]) for test in tests]

    def data(name, **others):
        rows = [{"question": text, "answer": "5", "tests": others.get(text, [1, 2])} for text in QUESTIONS]
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return PromptDataModule(FileSource(str(path), name=source), batch_size=2, max_prompt_length=64, shuffle=False)

    asked, source, frozen = [], "code", {"optimizer": FROZEN}
    module = grpo(model_folder, [passes], **frozen)
    run(every_step(tmp_path / "saved"), module=module, data=data("old.jsonl"), max_epochs=1)
    asked.clear()
    changed = {"Why?": [7, 2]} if change == "column" else {}
    source = "other" if change == "source" else "code"
    _, trace, _ = run(
        module=grpo(model_folder, [passes], **frozen),
        data=data("new.jsonl", **changed),
        ckpt_path=tmp_path / "saved" / f"step={STEPS}.ckpt",
    )
    assert trace.of_cache("full_reuse_fraction") == [1.0] * 2 * STEPS
    again = {"column": [("code", [7, 2])], "source": [("other", [1, 2])] * len(QUESTIONS)}.get(change, [])
    assert asked == [row for row in again for _ in range(GROUP)]  # and are known again in the second epoch
    assert ({metrics["reward"] for metrics in trace.metrics} == {1.0, 4.0}) is (change == "column")


@pytest.mark.parametrize("is_other", [False, True])
def test_rewards_under_another_answer_format_are_not_taken(run, model_folder, tmp_path, is_other):
    first, second = MathReward(), MathReward(answer_format="boxed" if is_other else "auto")
    frozen = {"optimizer": FROZEN}
    run(every_step(tmp_path / "saved"), module=grpo(model_folder, [first], **frozen), max_epochs=1)
    cache = PrefixCache()
    found = []
    cache.on_train_start = lambda *_: found.extend(row.reward_values is None for row in cache.store)
    checkpoint = tmp_path / "saved" / f"step={STEPS}.ckpt"
    run(module=grpo(model_folder, [second], **frozen), cache=cache, ckpt_path=checkpoint, max_epochs=2)
    assert found == [is_other] * STEPS * 2 * GROUP


def test_another_weight_is_applied_to_kept_rewards(run, model_folder, tmp_path):
    first, _ = counting(0)
    frozen = {"optimizer": FROZEN}
    _, before, _ = run(every_step(tmp_path / "saved"), module=grpo(model_folder, [first], **frozen), max_epochs=1)
    second, asked = counting(0)
    module = grpo(model_folder, [RewardFunction(second, weight=10.0)], **frozen)
    _, trace, _ = run(module=module, ckpt_path=tmp_path / "saved" / f"step={STEPS}.ckpt", max_epochs=2)
    assert not sum(asked)
    expected = [pytest.approx(10 * metrics["reward"]) for metrics in before.metrics]
    assert [metrics["reward"] for metrics in trace.metrics] == expected


def resumed_rows(trace, before):
    """(prefix, response, finish reason, what the sample said before the resume) of all rows of the first epoch."""
    said = last_responses(before)
    return [
        (rollouts.request.prefix(row), rollouts.response_ids[row], rollouts.finish_reasons[row], said.get(key))
        for (rollouts,) in trace.rounds[:STEPS]
        for row, key in enumerate(rows_of(rollouts))
    ]


class Asked:
    """`small_tokens` that keeps how many rows it was asked about."""

    __name__ = "small_tokens"

    def __init__(self):
        self.num_rows = []

    def __call__(self, completion_ids, **columns):
        self.num_rows.append(len(completion_ids))
        return small_tokens(completion_ids)


@pytest.mark.parametrize("length", [MAX_LENGTH // 2, MAX_LENGTH, MAX_LENGTH + 6])
def test_another_length_limit_cuts_or_continues_what_is_cached(run, model_folder, tmp_path, length):
    """Rewards may depend on the limit and are asked for again; `finish_reason` and lengths are those of the new
    limit."""
    options = {"module": grpo(model_folder, [Asked()], optimizer=ADAM), "max_epochs": 1}
    _, before, _ = run(every_step(tmp_path / "saved"), **options)
    checkpoint, asked = tmp_path / "saved" / f"step={STEPS}.ckpt", Asked()
    module = grpo(model_folder, [asked], max_completion_length=length, optimizer=ADAM)
    _, trace, _ = run(cache=PrefixCache(EVERYTHING), module=module, ckpt_path=checkpoint)
    reasons = set()
    for prefix, response, reason, said in resumed_rows(trace, before):
        assert prefix == said[:length]
        was_stopped = len(said) < MAX_LENGTH or 2 <= said[-1] < 14
        assert (response == prefix) is (was_stopped or length <= MAX_LENGTH)
        assert len(response) <= length
        assert reason == ("stop" if 2 <= response[-1] < 14 else "length")
        reasons.add((was_stopped, reason))
    assert (False, "length") in reasons and (True, "stop") in reasons
    num_asked = [count for count in asked.num_rows if count]
    changed = length != MAX_LENGTH
    assert num_asked == [2 * GROUP] * STEPS * changed  # known again in the second epoch
    assert min(trace.of_cache("reuse_fraction")[STEPS:]) == 1.0


@pytest.mark.parametrize(("before_size", "size"), [(2, 4), (4, 2)])
def test_another_group_size_uses_the_rows_that_are_there(run, model_folder, tmp_path, before_size, size):
    def module(num_generations):
        return grpo(model_folder, num_generations=num_generations, optimizer=ADAM)

    _, before, _ = run(every_step(tmp_path), module=module(before_size), max_epochs=1)
    _, trace, _ = run(cache=PrefixCache(EVERYTHING), module=module(size), ckpt_path=tmp_path / f"step={STEPS}.ckpt")
    for prefix, response, _, said in resumed_rows(trace, before):
        assert prefix == (said or [])
        assert said is None or response == said
    assert trace.of_cache("hit_fraction") == [min(1.0, before_size / size)] * STEPS + [1.0] * STEPS


def test_a_grown_data_set_reuses_what_is_there(run, saved, tmp_path):
    _, before, checkpoint = saved
    data = questions(tmp_path, ["New?", *QUESTIONS, "Newer?"])
    cache = PrefixCache(EVERYTHING)
    with pytest.warns(UserWarning, match="order of prompts differs"):
        _, trace, _ = run(cache=cache, data=data, ckpt_path=checkpoint, max_epochs=4)
    said = last_responses(before)
    seen = set()
    for (rollouts,) in trace.rounds:
        for row, key in enumerate(rows_of(rollouts)):
            if key not in seen:
                assert rollouts.request.prefix(row) == said.get(key, [])
                seen.add(key)
    assert len(seen) == 6 * GROUP and len(seen & said.keys()) == 4 * GROUP
    assert {hits for hits in trace.of_cache("hit_fraction")} >= {0.5, 1.0}


def test_another_batch_size_finds_the_same_responses(run, saved, tmp_path):
    _, before, checkpoint = saved
    with pytest.warns(UserWarning, match="batch_size 2 -> 4"):
        _, trace, _ = run(cache=PrefixCache(EVERYTHING), data=questions(tmp_path, batch_size=4), ckpt_path=checkpoint)
    (rollouts,) = trace.rounds[0]
    assert rollouts.response_ids == [last_responses(before)[key] for key in rows_of(rollouts)]


def test_a_smaller_limit_of_bytes_evicts_while_loading(run, saved):
    _, _, checkpoint = saved
    _, trace, cache = run(cache=PrefixCache(EVERYTHING, max_bytes=8_000), ckpt_path=checkpoint)
    assert cache.store.num_bytes <= 8_000
    assert trace.metrics[0]["prefix_cache/bytes"] <= 8_000
    assert trace.of_cache("hit_fraction")[0] == 0.0  # the rows of the first step were the oldest


def test_caches_of_two_ranks_become_one_and_prompts_of_nobody_leave(run, saved):
    """The loader had no `uids`, so that every rank of a resumed run kept the caches of all.

    The rows of all ranks were evicted to the limit of one, the oldest first, before a rank chose its own.
    """
    folder, _, checkpoint = saved
    files = folder / "prefix_cache"
    path = files / f"step-{STEPS:08d}-rank0-of-1.safetensors"
    module = grpo(torch.load(checkpoint, weights_only=True)["rlvr"]["model"])
    module.policy = Policy.build(module.model_name)
    identity = identity_of(module)
    whole = RolloutStore.load(path, identity)
    first, second = whole.split(2, lambda uid: int(uid > sorted({row.uid for row in whole})[1]))
    stranger = dataclasses.replace(next(iter(whole)), uid="stranger", step=99)
    second.put([stranger])
    first.save(files / f"step-{STEPS:08d}-rank0-of-2.safetensors", identity)
    second.save(files / f"step-{STEPS:08d}-rank1-of-2.safetensors", identity)
    content = torch.load(checkpoint, weights_only=True)
    content["prefix_cache"]["world_size"] = 2
    torch.save(content, checkpoint)
    _, trace, cache = run(cache=PrefixCache(EVERYTHING, max_bytes=whole.num_bytes), ckpt_path=checkpoint)
    assert trace.of_cache("hit_fraction") == [1.0] * 2 * STEPS
    assert {row.uid for row in cache.store} == {row.uid for row in whole}
    assert cache.store.max_bytes == whole.num_bytes


# ------------------------------------------------------------------------------------------------------- a second fit


@pytest.mark.parametrize("is_other", [False, True])
def test_a_cache_of_an_earlier_fit_gives_no_rewards_of_others(run, model_folder, is_other):
    """Rows kept whole got the numbers of the first fit's reward of the same name."""
    cache, (first, _), (second, asked) = PrefixCache(EVERYTHING), counting(0), counting(100 if is_other else 0)
    run(cache=cache, module=grpo(model_folder, [first], optimizer=FROZEN), max_epochs=1)
    _, trace, _ = run(cache=cache, module=grpo(model_folder, [second], optimizer=FROZEN), max_epochs=1)
    assert trace.of_cache("full_reuse_fraction") == [1.0] * STEPS
    assert sum(asked) == (STEPS * 2 * GROUP if is_other else 0)
    assert all((metrics["reward"] > 100) == is_other for metrics in trace.metrics)


def test_a_cache_of_an_earlier_fit_at_another_temperature_is_emptied(run, model_folder):
    cache = PrefixCache(EVERYTHING)
    run(cache=cache, max_epochs=1)
    _, trace, _ = run(cache=cache, module=grpo(model_folder, optimizer=ADAM, temperature=0.7), max_epochs=2)
    assert trace.of_cache("hit_fraction") == [0.0] * STEPS + [1.0] * STEPS


def test_a_resumed_run_has_the_rows_of_its_checkpoint_alone(run, saved):
    """With `load_cache=False` none, but it found those that the callback had from an earlier fit."""
    _, _, checkpoint = saved
    cache = PrefixCache(EVERYTHING, load_cache=False)
    run(cache=cache, max_epochs=1)
    _, trace, _ = run(cache=cache, ckpt_path=checkpoint)
    assert trace.of_cache("hit_fraction") == [0.0] * STEPS + [1.0] * STEPS
