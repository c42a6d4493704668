"""Record what TRL and verl compute on a small ragged batch, for `test_parity.py` and its neighbours.

The functions called are the installed libraries' own. TRL's live inside trainers, so they are called unbound, on an
object that holds the attributes they read. Run it in an environment of its own, from the repository root::

    pip install torch==2.13.0 trl==1.16.0 tensordict omegaconf hydra-core codetiming ray peft torchdata dill orjson
    pip install --no-deps verl==0.9.1
    python tests/losses/record_oracles.py
"""

import json
import math
import re
from collections import defaultdict, deque
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import PartialState
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.metric_utils import compute_data_metrics
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
from verl.utils.torch_functional import masked_whiten
from verl.workers.config import ActorConfig, PolicyLossConfig

PATH = Path(__file__).parent / "oracles.json"
LENGTHS = [6, 3, 0, 1, 5, 6, 2, 4]
NUM_GENERATIONS = 4
MAX_COMPLETION_LENGTH = 7
PAD, EOS = 0, 1


def make_inputs() -> dict:
    """Two groups of four ragged rows, garbage on the padding, ratios on both sides of every bound."""
    generator = torch.Generator().manual_seed(20)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(shape, generator=generator)

    policy = -normal(8, 6).abs() - 0.05
    old = policy + normal(8, 6, scale=0.3)
    old[0, 2] -= 1.2  # ratios that reach the bounds for negative advantages
    old[4, 1] -= 1.6
    old[1, 2] = policy[1, 2] - 0.22  # between 1.2 and 1.28, the bounds of GRPO and DAPO
    old[6] -= 0.5  # whole rows that GSPO clips
    old[3] += 0.4
    sampling = old + normal(8, 6, scale=0.2)
    sampling[6] -= 1.0  # a row over the cap of 3
    reference = policy + normal(8, 6, scale=0.6)
    old, sampling, reference = (logprobs.clamp(max=-0.001) for logprobs in (old, sampling, reference))
    values, old_values = normal(8, 6), normal(8, 6)
    inputs = {
        "policy_logprobs": policy,
        "old_logprobs": old,
        "sampling_logprobs": sampling,
        "reference_logprobs": reference,
        "row_advantages": torch.tensor([-1.1, 0.4, 0.9, -0.2, -0.8, -0.6, 1.3, 0.7]),
        "token_advantages": normal(8, 6),
        "values": values,
        "old_values": old_values,
        "returns": values + normal(8, 6, scale=0.8),
        "token_rewards": normal(8, 6),
        "rewards": torch.tensor([0.0, 1.0, 1.0, 0.25, 1.0, 1.0, 1.0, 1.0]),
        "ragged_rewards": torch.tensor([0.0, torch.nan, 1.0, 0.25, torch.nan, torch.nan, torch.nan, 1.0]),
    }
    second = torch.tensor([0.1, 0.3, torch.nan, 0.2, 0.2, 0.2, torch.nan, 0.3])
    third = torch.tensor([1.0, torch.nan, torch.nan, 0.0, 1.0, 1.0, torch.nan, 0.0])
    inputs["scores"] = torch.stack([inputs["ragged_rewards"], second, third], -1)
    inputs["score_weights"] = torch.tensor([1.0, 0.5, 2.0])
    return {name: tensor.mul(1e4).round().div(1e4) for name, tensor in inputs.items()}


def mask_of_lengths() -> torch.Tensor:
    return torch.arange(6) < torch.tensor(LENGTHS)[:, None]  # [N, R]


def accelerator() -> SimpleNamespace:
    return SimpleNamespace(
        num_processes=1,
        process_index=0,
        device=torch.device("cpu"),
        sync_gradients=True,
        gather=lambda tensor: tensor,
        pad_across_processes=lambda tensor, **kwargs: tensor,
        reduce=lambda tensor, reduction: tensor,
        gather_for_metrics=lambda tensor: tensor,
    )


# --- TRL -------------------------------------------------------------------------------------------------------------


def trl_loss(
    inputs: dict, num_micro_batches: int = 1, importance_ratio: torch.Tensor | None = None, **settings
) -> dict:
    """`GRPOTrainer._compute_loss` in training mode, micro-batch by micro-batch."""
    mask = mask_of_lengths().long()
    policy = inputs["policy_logprobs"].clone().requires_grad_()
    settings = {"loss_type": "grpo", "epsilon": 0.2, "epsilon_high": None, "delta": None, "beta": 0.0, **settings}
    rows = torch.arange(len(mask)).chunk(num_micro_batches)
    current: list[torch.Tensor] = []
    trainer = SimpleNamespace(
        loss_type=settings["loss_type"],
        epsilon_low=settings["epsilon"],
        epsilon_high=settings["epsilon"] if settings["epsilon_high"] is None else settings["epsilon_high"],
        beta=settings["beta"],
        importance_sampling_level=settings.get("importance_sampling_level", "token"),
        max_completion_length=MAX_COMPLETION_LENGTH,
        use_vllm=importance_ratio is not None,
        vllm_importance_sampling_correction=importance_ratio is not None,
        current_gradient_accumulation_steps=num_micro_batches,
        args=SimpleNamespace(
            delta=settings["delta"],
            use_bias_correction_kl=settings.get("use_bias_correction_kl", False),
            steps_per_generation=num_micro_batches,
            **{name: value for name, value in settings.items() if name.startswith(("sapo", "vespo"))},
        ),
        top_entropy_quantile=settings.get("top_entropy_quantile", 1.0),
        off_policy_mask_threshold=settings.get("off_policy_mask_threshold"),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        model=SimpleNamespace(training=True),
        accelerator=accelerator(),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (current[-1], -current[-1].detach(), None),
    )
    trainer.get_high_entropy_mask = partial(GRPOTrainer.get_high_entropy_mask, trainer)
    loss = torch.zeros(())
    for chunk in rows:
        current.append(policy[chunk])
        batch = {
            "prompt_ids": torch.ones(len(chunk), 1, dtype=torch.long),
            "prompt_mask": torch.ones(len(chunk), 1, dtype=torch.long),
            "completion_ids": torch.ones_like(mask[chunk]),
            "completion_mask": mask[chunk],
            "advantages": inputs["row_advantages"][chunk],
            "ref_per_token_logps": inputs["reference_logprobs"][chunk],
            "num_items_in_batch": mask.sum(),
        }
        if settings.get("with_old_logprobs", True):
            batch["old_per_token_logps"] = inputs["old_logprobs"][chunk]
        if settings.get("off_policy_mask_threshold") is not None:
            batch["sampling_per_token_logps"] = inputs["sampling_logprobs"][chunk]
        if importance_ratio is not None:
            batch["importance_sampling_ratio"] = importance_ratio[chunk]
        loss = loss + GRPOTrainer._compute_loss(trainer, None, batch)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items() if len(values) == 1}
    names = ("kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "cispo_clip_ratio")
    return {"loss": loss, "gradient": policy.grad, **{name: metrics[name] for name in names if name in metrics}}


def trl_scored(trainer_class, inputs: dict, rewards: torch.Tensor, **settings) -> tuple[dict, dict]:
    """`_generate_and_score_completions` with everything around the arithmetic replaced by the recorded inputs.

    The empty row enters as a full-length truncated one that `mask_truncated_completions` masks.
    """
    lengths = [length or 6 for length in LENGTHS]
    completion_ids = [[5] * (length - 1) + [5 if LENGTHS[n] == 0 else EOS] for n, length in enumerate(lengths)]
    sampling = [inputs["sampling_logprobs"][n, :length].tolist() for n, length in enumerate(lengths)]
    sampling[1][0] = None  # a log-prob that the engine did not give
    is_grpo = trainer_class is GRPOTrainer
    generated: tuple = ([[3]] * 8, completion_ids, None, ["text"] * 8, sampling, {}, None, None)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        ref_model=None,
        accelerator=accelerator(),
        args=SimpleNamespace(
            per_device_train_batch_size=8,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
        ),
        environments=None,
        environment_factories=None,
        tools=[],
        pad_to_multiple_of=None,
        _tokenizer=SimpleNamespace(pad_token_id=PAD, batch_decode=lambda *args, **kwargs: ["text"] * 8),
        processing_class=SimpleNamespace(batch_decode=lambda *args, **kwargs: ["text"] * 8),
        pad_token_id=PAD,
        eos_token_ids=[EOS],
        mask_truncated_completions=True,
        num_iterations=1,
        num_generations=NUM_GENERATIONS,
        beta=0.0,
        use_vllm=is_grpo,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=settings.get("mode", "sequence_mask"),
        vllm_importance_sampling_clip_max=settings.get("clip_max", 3.0),
        vllm_importance_sampling_clip_min=settings.get("clip_min"),
        scale_rewards=settings.get("scale_rewards", "group"),
        normalize_advantages=settings.get("normalize_advantages", False),
        multi_objective_aggregation="sum_then_normalize" if rewards.dim() == 1 else "normalize_then_sum",
        reward_weights=torch.ones(1) if rewards.dim() == 1 else inputs["score_weights"],
        reward_funcs=[None] * (1 if rewards.dim() == 1 else 3),
        reward_func_names=["reward", "second", "third"][: 1 if rewards.dim() == 1 else 3],
        reward_clip_range=None,
        log_multimodal=False,
        _metrics={"train": defaultdict(list)},
        _logs=defaultdict(deque, rewards=defaultdict(deque), extra=defaultdict(deque)),
        _pending_extra_logs=defaultdict(list),
        _pending_metrics=defaultdict(list),
        _is_vlm=False,
        _generate=lambda prompts: generated if is_grpo else (*generated[:2], ["text"] * 8),
        _calculate_rewards=lambda *args: rewards.view(8, -1),
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (inputs["old_logprobs"], None, None),
    )
    output = trainer_class._generate_and_score_completions(trainer, [{"prompt": "?"}] * 8)
    return output, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def trl_oracles(inputs: dict) -> dict:
    token_ratio = trl_scored(GRPOTrainer, inputs, inputs["rewards"], mode="token_truncate", clip_max=1.2)[0]
    token_ratio = token_ratio["importance_sampling_ratio"]
    losses = {
        "grpo": trl_loss(inputs),
        "grpo on policy": trl_loss(inputs, with_old_logprobs=False),
        "grpo with kl": trl_loss(inputs, beta=0.1),
        "grpo with corrected kl": trl_loss(inputs, beta=0.1, use_bias_correction_kl=True),
        "grpo on policy with corrected kl": trl_loss(
            inputs, beta=0.1, use_bias_correction_kl=True, with_old_logprobs=False
        ),
        "grpo with importance and kl": trl_loss(inputs, beta=0.1, importance_ratio=token_ratio),
        "grpo two-sided": trl_loss(inputs, epsilon_high=0.28, delta=1.5),
        "dapo": trl_loss(inputs, loss_type="dapo", epsilon_high=0.28),
        "bnpo": trl_loss(inputs, loss_type="bnpo"),
        "dr_grpo": trl_loss(inputs, loss_type="dr_grpo"),
        "cispo": trl_loss(inputs, loss_type="cispo", epsilon_high=1.3),
        "gspo": trl_loss(inputs, importance_sampling_level="sequence", epsilon=0.1),
        "luspo": trl_loss(inputs, loss_type="luspo", importance_sampling_level="sequence", epsilon=0.1),
        "sapo": trl_loss(inputs, loss_type="sapo", sapo_temperature_pos=1.0, sapo_temperature_neg=1.05),
        "vespo": trl_loss(
            inputs, loss_type="vespo", vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0
        ),
        "top entropy": trl_loss(inputs, loss_type="dapo", top_entropy_quantile=0.3),
        "off-policy mask": trl_loss(inputs, off_policy_mask_threshold=0.1),
    }
    split = {
        name: trl_loss(inputs, num_micro_batches=2, loss_type=name, epsilon_high=1.3 if name == "cispo" else None)
        for name in ("grpo", "dapo", "dr_grpo", "cispo")
    }
    advantages, zero_std = {}, {}
    for scale in ("group", "batch", "none"):
        for name in ("rewards", "ragged_rewards"):
            output, metrics = trl_scored(GRPOTrainer, inputs, inputs[name], scale_rewards=scale)
            advantages[f"{scale} {name}"] = output["advantages"]
            zero_std[f"{scale} {name}"] = metrics["frac_reward_zero_std"]
    leave_one_out = {
        f"{normalize} {name}": trl_scored(RLOOTrainer, inputs, inputs[name], normalize_advantages=normalize)[0][
            "advantages"
        ]
        for normalize in (False, True)
        for name in ("rewards", "ragged_rewards")
    }
    importance = {}
    for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        for clip_min, clip_max in ((None, 3.0), (0.9, 1.2)):
            output, metrics = trl_scored(
                GRPOTrainer, inputs, inputs["rewards"], mode=mode, clip_min=clip_min, clip_max=clip_max
            )
            statistics = {
                name.removeprefix("sampling/"): value for name, value in metrics.items() if "sampling/" in name
            }
            ratio = output["importance_sampling_ratio"].expand(8, 6)
            importance[f"{mode} {clip_min} {clip_max}"] = {"weights": ratio, **statistics}
    return {
        "losses": losses,
        "losses in two micro-batches": split,
        "advantages": advantages,
        "frac_reward_zero_std": zero_std,
        "leave_one_out": leave_one_out,
        "decoupled": trl_scored(GRPOTrainer, inputs, inputs["scores"])[0]["advantages"],
        "importance": importance,
    }


# --- verl ------------------------------------------------------------------------------------------------------------


def verl_loss(inputs: dict, name: str, loss_agg_mode: str, advantages: str = "token_advantages", **settings) -> dict:
    """A registered policy loss of verl, `weights` being its `rollout_is_weights`."""
    weights = settings.pop("weights", None)
    config = ActorConfig(strategy="fsdp", rollout_n=NUM_GENERATIONS, ppo_micro_batch_size_per_gpu=8, **settings)
    mask = mask_of_lengths().float()
    policy = inputs["policy_logprobs"].clone().requires_grad_()
    advantages = inputs[advantages].view(8, -1).expand(8, 6)
    loss, metrics = core_algos.get_policy_loss_fn(name)(
        old_log_prob=inputs["old_logprobs"],
        log_prob=policy,
        advantages=advantages,
        response_mask=mask,
        loss_agg_mode=loss_agg_mode,
        config=config,
        rollout_is_weights=weights,
    )
    loss.backward()
    return {"loss": loss, "gradient": policy.grad, **metrics}


def verl_kl(inputs: dict, estimator: str) -> dict:
    policy = inputs["policy_logprobs"].clone().requires_grad_()
    value = core_algos.kl_penalty(policy, inputs["reference_logprobs"], estimator)
    value.sum().backward()
    return {"value": value, "gradient": policy.grad}


def verl_value_loss(inputs: dict, cliprange_value: float) -> dict:
    values = inputs["values"].clone().requires_grad_()
    loss, clipped = core_algos.compute_value_loss(
        values, inputs["returns"], inputs["old_values"], mask_of_lengths().float(), cliprange_value
    )
    loss.backward()
    return {"loss": loss, "gradient": values.grad, "clipped": clipped}


def verl_explained_variance(inputs: dict) -> float:
    mask = mask_of_lengths().float()
    tensors = {
        "token_level_scores": inputs["token_rewards"],
        "token_level_rewards": inputs["token_rewards"],
        "advantages": inputs["token_advantages"],
        "returns": inputs["returns"],
        "values": inputs["values"],
        "prompts": torch.ones(8, 1),
        "responses": torch.ones(8, 6),
        "response_mask": mask,
        "attention_mask": torch.cat([torch.ones(8, 1), mask], -1),
    }
    metrics = compute_data_metrics(SimpleNamespace(batch=tensors, non_tensor_batch={}), use_critic=True)
    return metrics["critic/vf_explained_var"]


def verl_oracles(inputs: dict) -> dict:
    mask = mask_of_lengths().float()
    index = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    row_rewards = torch.zeros(8, 6)
    row_rewards[:, 0] = inputs["rewards"]
    ones = torch.ones(8, 6)
    log_difference = inputs["old_logprobs"] - inputs["sampling_logprobs"]
    importance = {
        f"{level} {threshold}": compute_rollout_correction_weights(log_difference, mask, level, threshold)[0]
        for level in ("token", "sequence")
        for threshold in (1.2, "0.9_1.2")
    }
    by_row = "row_advantages"
    losses = {
        "ppo": verl_loss(inputs, "vanilla", "token-mean", clip_ratio_c=10.0),
        "dual clip": verl_loss(inputs, "vanilla", "token-mean", clip_ratio_c=1.5),
        "dual clip inside the range": verl_loss(inputs, "vanilla", "token-mean", clip_ratio_c=1.1),
        "dapo": verl_loss(inputs, "vanilla", "token-mean", clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=10.0),
        "sequence": verl_loss(inputs, "vanilla", "seq-mean-token-mean", clip_ratio_c=10.0),
        "sequence_sum": verl_loss(inputs, "vanilla", "seq-mean-token-sum", clip_ratio_c=10.0),
        "fixed": verl_loss(inputs, "vanilla", "seq-mean-token-sum-norm", clip_ratio_c=10.0),
        "with importance": verl_loss(
            inputs, "vanilla", "token-mean", clip_ratio_c=10.0, weights=importance["token 1.2"]
        ),
        "gspo": verl_loss(inputs, "gspo", "seq-mean-token-mean", by_row, clip_ratio_low=0.1, clip_ratio_high=0.1),
        "gspo by token": verl_loss(inputs, "gspo", "token-mean", clip_ratio_low=0.1, clip_ratio_high=0.1),
        "cispo": verl_loss(inputs, "cispo", "token-mean", clip_ratio_low=1.0, clip_ratio_high=0.3),
        "gpg": verl_loss(inputs, "gpg", "token-mean"),
        "geo_mean": verl_loss(inputs, "geo_mean", "token-mean", by_row, clip_ratio_low=0.2, clip_ratio_high=0.3),
        "dppo_tv": verl_loss(
            inputs, "dppo_tv", "token-mean", clip_ratio_low=0.05, clip_ratio_high=0.02, clip_ratio_c=1.5
        ),
        "dppo_kl": verl_loss(
            inputs, "dppo_kl", "token-mean", clip_ratio_low=0.02, clip_ratio_high=0.01, clip_ratio_c=1.5
        ),
        "dro": verl_loss(inputs, "dro", "token-mean", policy_loss=PolicyLossConfig(dro_beta=0.5)),
    }
    estimators = ("kl", "abs", "mse", "low_var_kl", "k1", "k2", "k3", "k1+", "abs+", "k2+", "k3+", "low_var_kl+")
    gae = {
        f"{gamma} {lam}": core_algos.compute_gae_advantage_return(
            inputs["token_rewards"], inputs["values"], mask, gamma, lam
        )
        for gamma, lam in ((1.0, 1.0), (0.9, 0.8))
    }
    at_the_end = torch.zeros(8, 6)
    for row, length in enumerate(LENGTHS):
        at_the_end[row, max(0, length - 1)] = inputs["rewards"][row]
    estimated = {
        "gpg": core_algos.compute_gpg_outcome_advantage(row_rewards, mask, index)[0],
        "opo": core_algos.compute_opo_outcome_advantage(row_rewards, mask, index)[0],
        "passk": core_algos.compute_grpo_passk_outcome_advantage(
            row_rewards, ones, index, config={"norm_adv_by_std_in_grpo": True}
        )[0],
        "passk without scale": core_algos.compute_grpo_passk_outcome_advantage(
            row_rewards, ones, index, config={"norm_adv_by_std_in_grpo": False}
        )[0],
        "reinforce_plus_plus": core_algos.compute_reinforce_plus_plus_outcome_advantage(
            at_the_end + inputs["token_rewards"], mask, SimpleNamespace(gamma=0.9)
        )[0],
        "reinforce_plus_plus_baseline": core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage(
            row_rewards, mask, index
        )[0],
    }
    return {
        "losses": losses,
        "estimators": estimated,
        "kl": {estimator: verl_kl(inputs, estimator) for estimator in estimators},
        "value_loss": {str(c): verl_value_loss(inputs, c) for c in (0.5, 0.1)},
        "explained_variance": verl_explained_variance(inputs),
        "gae": {name: {"whitened advantages": pair[0], "returns": pair[1]} for name, pair in gae.items()},
        "whiten": {str(shift): masked_whiten(inputs["values"], mask, shift) for shift in (True, False)},
        "group_advantages": {
            str(scale): core_algos.compute_grpo_outcome_advantage(
                row_rewards, ones, index, norm_adv_by_std_in_grpo=scale
            )[0][:, 0]
            for scale in (True, False)
        },
        "leave_one_out": core_algos.compute_rloo_outcome_advantage(row_rewards, ones, index)[0][:, 0],
        "importance": importance,
    }


def plain(value):
    """Tensors become lists, NaN null; seven digits are what float32 holds."""
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    return None if math.isnan(value) else float(f"{value:.7g}")


def main() -> None:
    PartialState(cpu=True)
    inputs = make_inputs()
    recorded = {
        "inputs": {**inputs, "lengths": LENGTHS},
        "trl": trl_oracles(inputs),
        "verl": verl_oracles(inputs),
    }
    text = json.dumps(plain(recorded), indent=1)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda row: re.sub(r"\s+", " ", row.group()), text)  # one line for each row
    PATH.write_text(text + "\n")


if __name__ == "__main__":
    main()
