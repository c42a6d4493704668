"""The module in a real Trainer, on a CPU with a tiny model."""

import copy
import json
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from training import GROUP, History, arithmetic, assert_identical, grpo, make_trainer, variety, weights_of

from lit_specrl import GRPO, FSDP2Strategy, KLPenalty
from lit_specrl.algorithms.constant_rewards import ConstantRewards
from lit_specrl.callbacks import RolloutCallback, SpeculativeRollout
from lit_specrl.data import ArithmeticSource
from lit_specrl.engines import TransformersEngine, VLLMEngine
from lit_specrl.losses import DRO
from lit_specrl.models.policy import Policy
from lit_specrl.types import SamplingConfig

SGD = partial(torch.optim.SGD, lr=0.1)


def constant(completions, **columns):
    return [1.0] * len(completions)


def initial_weights(model):
    return Policy.build(model).state_dict()


@pytest.fixture
def fit(tmp_path, tiny_model):
    """Train; returns the module and what happened."""

    def fit(module=None, data=None, callbacks=(), ckpt_path=None, **trainer_options):
        module, history = module or grpo(tiny_model), History()
        trainer = make_trainer(*callbacks, history, default_root_dir=tmp_path, **trainer_options)
        trainer.fit(module, datamodule=data or arithmetic(), ckpt_path=ckpt_path)
        return module, history

    return fit


# ------------------------------------------------------------------------------------------------------------- resume


def every_step(folder):
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def test_a_checkpoint_is_loaded_without_a_trainer(fit, tiny_model, tmp_path):
    """As Lightning's users do: arguments anew, weights from the file."""
    module, _ = fit(callbacks=[every_step(tmp_path)])
    arguments = {"model": tiny_model, "rewards": [constant], "max_completion_length": 12}
    loaded = GRPO.load_from_checkpoint(tmp_path / "step=4.ckpt", **arguments)
    assert loaded.step == module.step == 4
    assert_identical(weights_of(loaded), weights_of(module))
    make_trainer(max_epochs=1).fit(loaded, arithmetic())  # a run of its own
    assert loaded.step == 8


def test_whole_weights_are_not_taken_for_sharded_ones(fit, tiny_model):
    module, _ = fit()
    trainer = make_trainer(SpeculativeRollout(engine=VLLMEngine()), strategy=FSDP2Strategy())
    with pytest.raises(MisconfigurationException, match=r"whole weights of an earlier run .* needs sharded ones"):
        trainer.fit(module, datamodule=arithmetic())


def test_a_penalty_that_adapts_begins_where_the_checkpoint_had_none(fit, tiny_model, tmp_path):
    fit(callbacks=[every_step(tmp_path)], limit_train_batches=1)
    module = grpo(tiny_model, beta=0.1, kl=KLPenalty("k1", in_reward=True, target=0.1))
    _, history = fit(module, ckpt_path=tmp_path / "step=1.ckpt", max_epochs=2, limit_train_batches=1)
    assert history.steps[2]["kl"] > 0 and module.kl_coefficient.value > 0


def resumable(model):
    """Everything that has to survive: momentum, a schedule, several updates a step, a reference."""
    schedule = partial(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.1, total_iters=8)
    return grpo(model, num_minibatches=2, beta=0.05, lr_scheduler=schedule)


def test_resumed_run_equals_the_uninterrupted_one(fit, tiny_model, tmp_path):
    """Eight steps in two epochs, resumed inside an epoch, at its last step, and from a checkpoint of its end."""

    def run(*callbacks, ckpt_path=None):
        data = arithmetic(validation=ArithmeticSource(4, split="validation"))
        return fit(resumable(tiny_model), data, callbacks, ckpt_path, max_epochs=2, num_sanity_val_steps=-1)

    epoch_end = ModelCheckpoint(tmp_path, filename="epoch{epoch}", auto_insert_metric_name=False, save_top_k=-1)
    full, history = run(every_step(tmp_path), epoch_end)
    assert list(history.steps) == list(range(1, 9))
    # two updates a step, and Lightning counts updates
    for checkpoint, step in [("step=6", 3), ("step=8", 4), ("epoch0", 4), ("step=14", 7)]:
        resumed, rest = run(ckpt_path=tmp_path / f"{checkpoint}.ckpt")
        assert rest.steps == {number: history.steps[number] for number in range(step + 1, 9)}
        assert rest.evaluations == history.evaluations[-len(rest.evaluations) :]
        assert_identical(weights_of(resumed), weights_of(full))
        assert_identical(resumed.optimizers().state_dict(), full.optimizers().state_dict())
        assert resumed.policy_version == full.policy_version == 16


def test_run_stopped_in_an_epoch_and_resumed_equals_the_uninterrupted_one(fit, tmp_path):
    full, history = fit()
    fit(callbacks=[every_step(tmp_path)], max_steps=2)
    resumed, rest = fit(ckpt_path=tmp_path / "step=2.ckpt")
    assert rest.steps == {number: history.steps[number] for number in (3, 4)}
    assert_identical(weights_of(resumed), weights_of(full))


def test_resume_with_a_colocated_vllm_is_exact_in_float32(fit, tmp_path):
    def engine():
        return SpeculativeRollout(VLLMEngine(dtype="float32", max_num_seqs=16, cpu_kv_cache_gib=0.25))

    full, history = fit(callbacks=[engine(), every_step(tmp_path)])
    assert history.steps[4]["sampling/sampling_logp_difference/max"] < 1e-3  # the engine follows every update
    resumed, rest = fit(callbacks=[engine()], ckpt_path=tmp_path / "step=2.ckpt")
    assert rest.steps == {number: history.steps[number] for number in (3, 4)}
    assert_identical(weights_of(resumed), weights_of(full))


# --------------------------------------------------------------------------------------------------------- validation


class Requests(RolloutCallback):
    """Sampling settings of all rollouts, training and evaluation apart."""

    def __init__(self):
        self.training, self.evaluation = [], []

    def on_rollout_start(self, trainer, pl_module, request):
        (self.training if trainer.training else self.evaluation).append(request)


def test_validation_has_its_own_sampling_and_names(fit, tiny_model, tmp_path):
    requests, logger = Requests(), CSVLogger(tmp_path, name="", version="run")
    data = arithmetic(
        validation={
            "easy": ArithmeticSource(3, split="validation"),
            "hard": ArithmeticSource(2, num_terms=4, split="validation"),
        },
        validation_sampling=SamplingConfig(num_generations=2, max_completion_length=5, temperature=0.5),
    )
    module, _ = fit(grpo(tiny_model), data, [requests], logger=logger)
    assert {request.sampling for request in requests.evaluation} == {SamplingConfig(2, 5, 0.5)}
    assert {request.sampling for request in requests.training} == {SamplingConfig(GROUP, 12)}
    assert set(module.evaluation) == {"val_accuracy"} | {
        f"val-core/{source}/acc/{statistic}@2" for source in ("easy", "hard") for statistic in ("mean", "maj", "pass")
    }
    assert set(module.evaluation) <= set(logged_rows(tmp_path)[0])


def logged_rows(folder):
    """Rows of the CSV logger, as dictionaries of what is not empty and the header."""
    header, *lines = [line.split(",") for line in (folder / "run" / "metrics.csv").read_text().splitlines()]
    return [dict.fromkeys(header)] + [
        {name: float(value) for name, value in zip(header, line, strict=True) if value} for line in lines
    ]


def test_validation_uses_the_modules_evaluation_sampling_by_default(fit, tiny_model):
    requests = Requests()
    sampling = SamplingConfig(num_generations=3, max_completion_length=4, temperature=0.0)
    data = arithmetic(validation=ArithmeticSource(2, split="validation"))
    fit(grpo(tiny_model, eval_sampling=sampling), data, [requests])
    assert {request.sampling for request in requests.evaluation} == {sampling}


def test_validation_before_training_is_logged_at_step_0(fit, tiny_model, tmp_path):
    logger = CSVLogger(tmp_path, name="", version="run")
    data = arithmetic(validation=ArithmeticSource(2, split="validation"))
    fit(grpo(tiny_model), data, logger=logger, num_sanity_val_steps=-1)
    steps = [row["step"] for row in logged_rows(tmp_path) if row.get("val_accuracy") is not None]
    assert steps == [0, 3]


def test_validation_does_not_change_what_is_learned(fit, tiny_model):
    without, _ = fit()
    data = arithmetic(validation=ArithmeticSource(4, split="validation"))
    validated, history = fit(grpo(tiny_model), data, val_check_interval=1, num_sanity_val_steps=-1)
    assert [step for step, _ in history.evaluations] == [0, 1, 2, 3, 4]
    assert_identical(weights_of(validated), weights_of(without))


# ------------------------------------------------------------------------------------------------------------ updates


class FreshForward(L.Callback):
    """Repeats every training forward with a copy of the weights."""

    def __init__(self):
        self.logprobs = []

    def on_train_start(self, trainer, pl_module):
        pl_module.policy.register_forward_hook(self.compare, with_kwargs=True)

    def compare(self, policy, arguments, options, output):
        if torch.is_grad_enabled():
            fresh = Policy(copy.deepcopy(policy.model))(*arguments, **options)
            assert_identical(output.logprobs, fresh.logprobs)
            self.logprobs.append(output.logprobs.detach().clone())


class CachingPrecision(MixedPrecision):
    """Autocast as PyTorch has it by default, with a cache of bf16 weights; Lightning 2.6 switches the cache off."""

    def autocast_context_manager(self):
        return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("precision", [MixedPrecision, CachingPrecision])
def test_second_update_of_a_step_sees_the_new_weights_under_autocast(fit, tiny_model, precision):
    """Autocast spans the step, and its cache went on with bf16 copies of the weights from before the first update."""
    forwards, module = FreshForward(), grpo(tiny_model, num_iterations=2, optimizer=SGD)
    plugin = precision("bf16-mixed", "cpu")
    _, history = fit(module, callbacks=[forwards], plugins=[plugin], limit_train_batches=1)
    first, second = forwards.logprobs
    assert not torch.equal(first, second)
    assert history.steps[1]["policy_version"] == 2


def test_minibatches_and_iterations_make_their_product_of_updates(fit, tiny_model):
    module, history = fit(
        grpo(tiny_model, num_iterations=2, num_minibatches=2), precision="bf16-mixed", limit_train_batches=2
    )
    assert module.policy_version == module.trainer.global_step == 8
    assert [metrics["policy_version"] for metrics in history.steps.values()] == [4, 8]


@pytest.mark.parametrize(("num_iterations", "some_clipped"), [(1, False), (2, True)])
def test_later_updates_are_clipped_against_the_policy_that_sampled(fit, tiny_model, num_iterations, some_clipped):
    _, history = fit(grpo(tiny_model, num_iterations=num_iterations, epsilon=1e-4), limit_train_batches=1)
    assert (history.steps[1]["clip_ratio/region_mean"] > 0) is some_clipped


def test_training_takes_log_probs_at_the_temperature_of_the_rollouts(fit, tiny_model):
    _, history = fit(grpo(tiny_model, temperature=0.7))
    assert all(metrics["sampling/sampling_logp_difference/max"] < 1e-4 for metrics in history.steps.values())


def test_nucleus_sampling_works_without_importance_sampling(fit, tiny_model):
    requests = Requests()
    _, history = fit(grpo(tiny_model, top_p=0.9, importance_sampling=None), callbacks=[requests])
    assert {request.sampling.top_p for request in requests.training} == {0.9}
    assert len(history.steps) == 4


def test_learning_rate_changes_once_a_step_however_many_updates_it_has(fit, tiny_model):
    halving = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    _, history = fit(grpo(tiny_model, num_minibatches=2, lr_scheduler=halving))
    assert [metrics["actor/lr"] for metrics in history.steps.values()] == [1e-3, 5e-4, 2.5e-4, 1.25e-4]


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_autocast_passes_gradients_to_all_weights(fit, tiny_model, num_iterations):
    """Rollouts and old log-probs run without gradient inside the same autocast, whose copies of weights must not be
    used again."""
    module, _ = fit(
        grpo(tiny_model, num_iterations=num_iterations, optimizer=SGD), precision="bf16-mixed", limit_train_batches=1
    )
    before = initial_weights(tiny_model)
    unchanged = [name for name, weight in weights_of(module).items() if torch.equal(weight, before[name])]
    assert unchanged == []


def test_gradient_does_not_depend_on_micro_batches(fit, tiny_model):
    whole, _ = fit(grpo(tiny_model, optimizer=SGD), limit_train_batches=1)
    cut, _ = fit(grpo(tiny_model, optimizer=SGD, micro_batch_tokens=64), limit_train_batches=1)
    torch.testing.assert_close(weights_of(cut), weights_of(whole))


def test_rows_without_gradient_are_skipped_and_counted(fit, tiny_model, monkeypatch):
    def module():
        return grpo(tiny_model, [half_constant], optimizer=SGD)

    skipping, history = fit(module(), limit_train_batches=1)
    assert history.steps[1]["perf/rows_without_gradient"] == GROUP
    assert history.steps[1]["frac_reward_zero_std"] == 0.5
    monkeypatch.setattr(
        "lit_specrl.algorithms.updater.rows_with_gradient",
        lambda experience, every_row_matters: list(range(experience.num_rows)),
    )
    computing_all, history = fit(module(), limit_train_batches=1)
    assert history.steps[1]["perf/rows_without_gradient"] == 0
    torch.testing.assert_close(weights_of(skipping), weights_of(computing_all))


def test_a_loss_that_holds_all_rows_back_computes_rows_without_advantage(fit, tiny_model, monkeypatch):
    """The square of the log-ratio has a gradient from the second update on."""

    def module():
        return grpo(tiny_model, [half_constant], optimizer=SGD, num_iterations=2, loss_type=DRO(beta=5.0))

    found, history = fit(module(), limit_train_batches=1)
    assert history.steps[1]["frac_reward_zero_std"] == 0.5
    assert history.steps[1]["perf/rows_without_gradient"] == 0
    monkeypatch.setattr(DRO, "needs_every_row", False)
    skipping, history = fit(module(), limit_train_batches=1)
    assert history.steps[1]["perf/rows_without_gradient"] == 2 * GROUP
    difference = max((weights_of(skipping)[name] - weight).abs().max() for name, weight in weights_of(found).items())
    assert difference > 1e-5


def half_constant(prompts, completions, **columns):
    return [value if prompt == prompts[0] else 0.0 for prompt, value in zip(prompts, variety(completions), strict=True)]


def test_equal_rewards_leave_the_policy_as_it_is(fit, tiny_model):
    module, history = fit(grpo(tiny_model, [constant], optimizer=SGD))
    assert [metrics["actor/grad_norm"] for metrics in history.steps.values()] == [0.0] * 4
    assert_identical(weights_of(module), initial_weights(tiny_model))


# ----------------------------------------------------------------------------------------------------------- KL term


def test_kl_starts_at_zero_and_the_reference_stays(fit, tiny_model, tmp_path):
    _, history = fit(grpo(tiny_model, beta=0.1), callbacks=[every_step(tmp_path)])
    kl = [metrics["kl"] for metrics in history.steps.values()]
    assert abs(kl[0]) < 1e-6
    assert all(value > 1e-4 for value in kl[1:])
    checkpoint = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    names = {f"policy.{name}" for name in initial_weights(tiny_model)}
    assert set(checkpoint["state_dict"]) == names


def test_a_strong_kl_term_holds_the_policy(fit, tiny_model):
    _, free = fit(grpo(tiny_model, beta=1e-6, optimizer=SGD))
    _, held = fit(grpo(tiny_model, beta=1.0, optimizer=SGD))
    assert held.steps[4]["kl"] < free.steps[4]["kl"]


def test_without_a_kl_term_there_is_no_reference(fit, monkeypatch):
    built = []
    build = Policy.build
    monkeypatch.setattr(
        Policy, "build", lambda *arguments, **options: built.append(arguments) or build(*arguments, **options)
    )
    _, history = fit(limit_train_batches=1)
    assert len(built) == 1
    assert "kl" not in history.steps[1]


# ------------------------------------------------------------------------------------------------ non-finite gradients


class NonFiniteGradient(L.Callback):
    """Spoils the gradient of the given steps."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_start(self, trainer, pl_module):
        parameter = next(pl_module.policy.parameters())
        parameter.register_hook(lambda gradient: gradient * (float("nan") if pl_module.step in self.steps else 1.0))


def test_updates_with_non_finite_gradient_are_skipped_and_counted(fit, tiny_model):
    spoiled, history = fit(grpo(tiny_model, optimizer=SGD), callbacks=[NonFiniteGradient({1, 2})])
    assert [metrics["actor/skipped_updates"] for metrics in history.steps.values()] == [0, 1, 2, 0]
    assert [metrics["policy_version"] for metrics in history.steps.values()] == [1, 1, 1, 2]
    assert all(weight.isfinite().all() for weight in weights_of(spoiled).values())
    unchanged, _ = fit(
        grpo(tiny_model, optimizer=SGD), callbacks=[NonFiniteGradient({0, 1, 2, 3})], max_steps=1, limit_train_batches=2
    )
    assert_identical(weights_of(unchanged), initial_weights(tiny_model))


def test_run_stops_after_successive_non_finite_gradients(fit, tiny_model):
    module = grpo(tiny_model, max_skipped_updates=2)
    with pytest.raises(RuntimeError, match="2 successive updates had a non-finite gradient; lower the learning rate"):
        fit(module, callbacks=[NonFiniteGradient({1, 2})])
    assert module.policy_version == 1


# ------------------------------------------------------------------------------------------------- SpeculativeRollout


@pytest.mark.parametrize(("installed", "engine"), [(None, TransformersEngine), (("vllm", "0.32.0"), VLLMEngine)])
def test_default_engine_is_vllm_where_it_is_installed(monkeypatch, installed, engine):
    monkeypatch.setattr("lit_specrl.callbacks.speculative_rollout.installed_version", lambda: installed)
    assert type(SpeculativeRollout().engine) is engine


class Failure(RolloutCallback):
    def on_experience_end(self, trainer, pl_module, rollouts, experience):
        raise KeyError("a bug in a callback")


@pytest.mark.parametrize("failure", [False, True])
def test_engine_is_shut_down_at_the_end_and_on_an_exception(fit, failure):
    engine = TransformersEngine()
    calls = []
    shutdown = engine.shutdown
    engine.shutdown = lambda: calls.append("shutdown") or shutdown()
    if failure:
        with pytest.raises(KeyError, match="a bug in a callback"):
            fit(callbacks=[SpeculativeRollout(engine), Failure()])
    else:
        module, _ = fit(callbacks=[SpeculativeRollout(engine)], limit_train_batches=1)
        assert module.engine is engine
    assert calls == ["shutdown"]


def test_speculative_rollout_refuses_other_modules(tmp_path):
    with pytest.raises(
        MisconfigurationException, match="SpeculativeRollout works with an RLVRModule such as GRPO, got BoringModel"
    ):
        make_trainer(SpeculativeRollout(TransformersEngine()), default_root_dir=tmp_path).fit(BoringModel())


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive in training, got 0; greedy rollouts"),
        ({"top_p": 0.9}, "importance_sampling is biased under top_p=0.9: the engine's"),
        ({"top_k": 20}, "importance_sampling is biased under top_k=20: the engine's"),
        ({"min_p": 0.1, "top_k": 5}, "importance_sampling is biased under top_k=5 and min_p=0.1: the engine's"),
        ({"repetition_penalty": 1.2}, r"is biased under repetition_penalty=1.2: .* or importance_sampling=None"),
        ({"loss_type": "reinforce"}, "loss_type must be one of grpo, .*, got 'reinforce'"),
        ({"num_minibatches": 0}, "num_minibatches must be at least 1, got 0"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens must be at least 1, got 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive, got 0.0"),
        ({"beta": -0.1}, "beta must not be negative, got -0.1"),
        ({"num_generations": 0}, "num_generations must be at least 1, got 0"),
        ({"max_completion_length": 0}, "max_completion_length must be at least 1 token, got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        grpo("no model is loaded", **options)


@pytest.fixture
def no_policy(monkeypatch):
    """Fails the test when weights are loaded."""

    def build(*arguments, **options):
        pytest.fail("a model was loaded before the input was checked")

    monkeypatch.setattr(Policy, "build", build)


@pytest.mark.usefixtures("no_policy")
def test_lengths_beyond_the_models_positions_are_refused(fit, tiny_model):
    message = "prompts and responses of up to 264 tokens do not fit the 256 positions of .*; lower max_prompt_length"
    with pytest.raises(MisconfigurationException, match=message):
        fit(grpo(tiny_model, max_completion_length=200))


@pytest.mark.usefixtures("no_policy")
def test_evaluation_lengths_beyond_the_models_positions_are_refused(fit, tiny_model):
    data = arithmetic(validation=ArithmeticSource(2, split="validation"), validation_sampling=SamplingConfig(1, 250))
    with pytest.raises(MisconfigurationException, match="up to 314 tokens do not fit the 256 positions"):
        fit(grpo(tiny_model), data)


@pytest.mark.usefixtures("no_policy")
def test_minibatches_that_do_not_divide_the_batch_are_refused(fit, tiny_model):
    message = r"2 prompts a step and rank \(batch_size=2\) cannot be divided into num_minibatches=3"
    with pytest.raises(MisconfigurationException, match=message):
        fit(grpo(tiny_model, num_minibatches=3))


@pytest.mark.usefixtures("no_policy")
@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_another_default_dtype_is_refused(tiny_model, tmp_path, precision):
    """It made new tensors in that type, and the first rollout ended with an error of torch."""
    trainer = make_trainer(default_root_dir=tmp_path, precision=precision)
    with pytest.raises(MisconfigurationException, match=rf"precision='{precision}' lets torch make .* 'bf16-mixed'"):
        trainer.fit(grpo(tiny_model), datamodule=arithmetic())


@pytest.mark.usefixtures("no_policy")
def test_float16_is_refused(tiny_model, tmp_path, monkeypatch):
    trainer = make_trainer(default_root_dir=tmp_path)
    monkeypatch.setattr(type(trainer), "precision", "16-mixed")  # Lightning itself refuses it on a CPU
    with pytest.raises(MisconfigurationException, match=r"precision='16-mixed' scales the loss.*'32-true'"):
        trainer.fit(grpo(tiny_model), datamodule=arithmetic())


@pytest.mark.usefixtures("no_policy")
def test_a_missing_model_is_told_with_what_to_do(fit, tmp_path):
    missing = str(tmp_path / "missing")
    with pytest.raises(ValueError, match=f"model '{missing}' is neither a folder in the transformers format"):
        fit(grpo(missing))


@pytest.mark.usefixtures("no_policy")
def test_a_missing_data_file_is_found_before_the_model_is_loaded(fit, tmp_path, tiny_model):
    with pytest.raises(ValueError, match=r"train\.jsonl: no such file"):
        fit(grpo(tiny_model), arithmetic(train=str(tmp_path / "train.jsonl")))


@pytest.mark.usefixtures("no_policy")
def test_an_empty_data_file_is_found_before_the_model_is_loaded(fit, tmp_path, tiny_model):
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"train\.jsonl is empty; expected at least one row"):
        fit(grpo(tiny_model), arithmetic(train=str(tmp_path / "train.jsonl")))


@pytest.mark.usefixtures("no_policy")
def test_a_vllm_outside_the_window_is_refused_before_the_model_is_loaded(fit, monkeypatch):
    monkeypatch.setattr("lit_specrl.engines.vllm.version.installed_version", lambda: ("vllm", "0.31.0"))
    with pytest.raises(ImportError, match=r"works with vllm==0\.32\.\*, found 0\.31\.0"):
        fit(callbacks=[SpeculativeRollout(VLLMEngine())])


# ------------------------------------------------------------------------------------------------------- data in files


def test_jsonl_columns_reach_the_reward(fit, tmp_path, tiny_model):
    seen = []

    def level(completions, answer, level, **columns):
        seen.extend(zip(answer, level, strict=True))
        return variety(completions)

    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1), "level": n} for n in range(2)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fit(grpo(tiny_model, [level]), arithmetic(train=str(tmp_path / "train.jsonl"), shuffle=False))
    assert seen == [("1", 0)] * GROUP + [("2", 1)] * GROUP


# ------------------------------------------------------------------------------------------------------------ warnings


@pytest.mark.parametrize("skipped", [True, False])
def test_rewards_see_special_tokens_on_request(fit, tiny_model, skipped):
    seen = []

    def record(completions, completion_ids, **columns):
        seen.extend(zip(completions, completion_ids, strict=True))
        return [float(len(set(ids))) for ids in completion_ids]

    fit(grpo(tiny_model, [record], temperature=2.0, skip_special_tokens=skipped), max_epochs=1)
    roles = {4: "<|user|>", 5: "<|assistant|>", 6: "<|system|>"}
    shown = [roles[role] in text for text, ids in seen for role in roles if role in ids]
    assert shown
    assert all(is_shown != skipped for is_shown in shown)


def test_a_reward_that_stays_constant_is_warned_of_by_name(fit, tiny_model):
    def flat(completions, **columns):
        return [0.0] * len(completions)

    module = grpo(tiny_model, [variety, flat])
    module.report._constant_rewards = ConstantRewards(num_steps=2)
    with pytest.warns(UserWarning, match="the same value") as caught:
        fit(module, max_steps=3)
    about = [str(warning.message) for warning in caught if "the same value" in str(warning.message)]
    assert len(about) == 1
    assert "reward 'flat' gave all rows the same value (now 0.0) in 2 steps in a row" in about[0]
