"""Runs that are killed in the middle of a rollout, and what of it is generated again."""

import os
import shutil
import signal
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from reuse_runs import fit, grpo, questions
from training import EveryStep, assert_identical, weights_of

from lit_specrl.callbacks import PrefixCache, RolloutJournal, SpeculativeRollout
from lit_specrl.callbacks.rollout_journal import FOLDER, fingerprint
from lit_specrl.engines import TransformersEngine, VLLMEngine

ROWS, STEPS = 8, 4  # rows of a step; steps of two epochs
KILLED_IN, SAVED = 3, 2  # steps, the first is 0: an unsaved step lies between the checkpoint and the kill
# rows that are generated beside fewer others have log-probs of another rounding, which the correction would learn from
plain = partial(grpo, importance_sampling=None)
ALGORITHMS = {
    "plain": (plain, list),
    "prefixes": (plain, lambda: [PrefixCache(acceptance="random")]),
    "rounds": (partial(plain, dynamic_sampling=True), list),
}


class Ended(RuntimeError):
    pass


class EndsInRollout(RolloutJournal):
    """Ends the process, or raises, when three rows of a step are finished."""

    def __init__(self, step, end):
        super().__init__()
        self.step, self.end, self.num_kept = step, end, 0

    def on_rollout_start(self, trainer, pl_module, request):
        super().on_rollout_start(trainer, pl_module, request)
        self.ends = pl_module.step == self.step

    def keep(self, finished):
        super().keep(finished)
        self.num_kept += len(finished) if self.ends else 0
        if self.num_kept >= 3:
            self.end()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def give_up():
    raise Ended


def in_a_fork(work):
    """Returns the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(pid, 0)[1])


@pytest.fixture(scope="module", params=ALGORITHMS)
def killed(request, model_folder, tmp_path_factory):
    """(uninterrupted module and trace, a folder with checkpoints and journals of a killed run, and how to resume)."""
    make, callbacks = ALGORITHMS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    data = partial(questions, tmp_path_factory.mktemp("data"))

    def run(folder, journal, *others, ckpt=None, **options):
        module = make(model_folder, **options)
        module.engine = TransformersEngine(max_rows=4)
        checkpoint = None if ckpt is None else folder / f"{ckpt}.ckpt"
        cache = callbacks()
        trace = fit(
            module, data(), *cache, *others, journal, max_epochs=2, default_root_dir=folder, ckpt_path=checkpoint
        )
        return module, trace

    def run_and_die():
        run(folder, EndsInRollout(KILLED_IN, die), EveryStep(folder))

    assert in_a_fork(run_and_die) == signal.SIGKILL
    (folder / f"{KILLED_IN}.ckpt").unlink()
    return run(tmp_path_factory.mktemp("whole"), RolloutJournal()), folder, run


@pytest.fixture
def resume(killed, tmp_path):
    """Goes on in a copy of the killed run's folder, which a function may change before."""
    _, folder, run = killed

    def resume(change=None, journal=None, ckpt=SAVED, **options):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        journals = sorted((copy / FOLDER).glob("*.rows"))
        if change:
            change(journals[-1])
        module, trace = run(copy, journal or RolloutJournal(), ckpt=ckpt, **options)
        assert not list((copy / FOLDER).glob("*.rows"))  # the run has come to its end
        return module, trace, [metrics["rollout_journal/taken_rows"] for metrics in trace.metrics]

    return resume


def assert_resumed(killed, resumed, trace, ckpt=SAVED):
    (module, whole), *_ = killed
    assert trace.tokens == whole.tokens[ckpt:]
    assert_identical(weights_of(resumed), weights_of(module))


def logprobs(rounds):
    return [row for rollouts in rounds for row in rollouts.sampling_logprobs]


def test_finished_rows_of_a_killed_run_are_not_generated_again(killed, resume):
    module, trace, taken = resume()
    assert_resumed(killed, module, trace)
    expected = logprobs(killed[0][1].rounds[SAVED])  # of a step that was finished, but not saved
    assert_identical(logprobs(trace.rounds[0]), expected)
    num_complete = sum(not ids or all(value != value for value in ids) for ids in expected)
    assert taken[0] == len(expected) - num_complete > 0
    assert 3 <= taken[1] < ROWS


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def spoil(path):
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)


def test_a_torn_record_is_dropped_and_the_others_are_taken(killed, resume):
    module, trace, taken = resume(cut)
    assert_resumed(killed, module, trace)
    assert 2 <= taken[1] < ROWS


@pytest.mark.parametrize("killed", ["plain"], indirect=True)
class TestPlain:
    def test_a_spoiled_journal_is_generated_anew(self, killed, resume):
        module, trace, taken = resume(spoil)
        assert_resumed(killed, module, trace)
        assert taken == [ROWS, 0]

    def test_rows_are_left_out_on_request(self, killed, resume):
        module, trace, taken = resume(journal=RolloutJournal(load_rows=False))
        assert_resumed(killed, module, trace)
        assert taken == [0, 0]

    def test_a_run_without_checkpoint_takes_the_rows_of_its_first_steps(self, killed, resume):
        module, trace, taken = resume(ckpt=None)
        assert_resumed(killed, module, trace, ckpt=0)
        assert taken[SAVED] == ROWS

    @pytest.mark.parametrize(
        ("options", "ckpt", "name"),
        [
            ({"temperature": 0.9}, SAVED, "sampling settings"),
            ({"max_completion_length": 11}, SAVED, "sampling settings"),
            ({"max_grad_norm": 0.01}, 1, "weights"),
        ],
    )
    def test_a_journal_of_other_settings_is_told_of_and_left_out(self, resume, options, ckpt, name):
        with pytest.warns(UserWarning, match=f"was written with other {name}"):
            _, _, taken = resume(ckpt=ckpt, **options)
        assert sum(taken[SAVED - ckpt :]) == 0


class KeptEngine(VLLMEngine):
    """Outlives the runs that use it, for a start takes seconds."""

    def start(self, *arguments):
        if self.llm is None:
            super().start(*arguments)

    def shutdown(self):
        self.policy_version = None


def test_rows_of_vllm_are_taken_and_the_engine_goes_on(model_folder, tmp_path):
    """An exception in the middle of a rollout leaves the journal."""
    data = questions(tmp_path)
    engine = KeptEngine(dtype="float32", cpu_kv_cache_gib=0.25, max_num_seqs=4, max_model_len=128)

    def run(journal, folder):
        module = grpo(model_folder, importance_sampling=None)
        trace = fit(module, data, SpeculativeRollout(engine), journal, max_steps=2, default_root_dir=tmp_path / folder)
        return module, trace

    try:
        whole, expected = run(RolloutJournal(), "whole")
        with pytest.raises(Ended):
            run(EndsInRollout(1, give_up), "broken")
        module, trace = run(RolloutJournal(), "broken")
    finally:
        VLLMEngine.shutdown(engine)
    assert trace.tokens == expected.tokens
    assert_identical(weights_of(module), weights_of(whole))
    assert logprobs(trace.rounds[0]) == logprobs(expected.rounds[0])
    taken = [metrics["rollout_journal/taken_rows"] for metrics in trace.metrics]
    assert taken[0] == ROWS and 3 <= taken[1] < ROWS


def test_validation_is_not_kept_and_old_journals_make_room(model_folder, tmp_path):
    seen = []

    class Files(RolloutJournal):
        def on_train_batch_end(self, trainer, *arguments):
            seen.append([path.name[:13] for path in sorted((tmp_path / FOLDER).glob("*"))])

    fit(grpo(model_folder), questions(tmp_path), Files(max_bytes=0), max_epochs=2, default_root_dir=tmp_path)
    assert all(len(names) <= 2 for names in seen) and seen[-1][-1] == "step-00000003"


def test_files_that_are_gone_or_cannot_be_read_end_no_run(model_folder, tmp_path):
    """A file that another process deleted between two looks, and one that is no file, raised."""
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "step-00000000-rank0-gone.rows").symlink_to("nowhere")
    (tmp_path / FOLDER / "step-00000001-rank0-folder.rows").mkdir()
    with pytest.warns(UserWarning, match="keeps no rows of this step.*Is a directory"):
        trace = fit(grpo(model_folder), questions(tmp_path), RolloutJournal(), max_steps=2, default_root_dir=tmp_path)
    assert len(trace.metrics) == 2


def test_each_rank_deletes_its_own_journals_and_the_first_those_of_ranks_that_are_no_more(tmp_path):
    """Rank 0 deleted those of all ranks, while they looked at them."""
    (tmp_path / FOLDER).mkdir()
    for step, rank in [(3, 0), (3, 1), (3, 10), (5, 0)]:
        (tmp_path / FOLDER / f"step-{step:08d}-rank{rank}-ab.rows").touch()

    def left_by(rank):
        trainer = SimpleNamespace(
            checkpoint_callback=None, default_root_dir=tmp_path, ckpt_path=None, global_rank=rank, world_size=2
        )
        RolloutJournal()._sweep(trainer, before=5)
        return [path.name[12:].removesuffix("-ab.rows") for path in sorted((tmp_path / FOLDER).iterdir())]

    assert left_by(0) == ["3-rank1", "5-rank0"]
    assert left_by(1) == ["5-rank0"]


def test_the_fingerprint_tells_the_smallest_change(model_folder):
    model = torch.nn.Linear(3, 2).bfloat16()
    before = fingerprint(model)
    model.weight.data[1, 2] = torch.nextafter(model.weight.data[1, 2], torch.tensor(9.0, dtype=torch.bfloat16))
    assert fingerprint(model) != before


@pytest.mark.parametrize("arguments", [{"sync_interval_s": 0}, {"max_bytes": -1}])
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        RolloutJournal(**arguments)
