"""Arguments that are known here by another name: those of earlier versions, and those of TRL and verl."""

OTHER_NAMES = {
    # of version 0.1
    "kl_estimator": "kl: {estimator: ...}",
    "kl_in_reward": "kl: {in_reward: ...}",
    "kl_target": "kl: {target: ...}",
    "kl_horizon": "kl: {horizon: ...}",
    "max_generation_rounds": "dynamic_sampling: {max_rounds: ...}",
    "gae_lambda": "lam of PPO, or advantage_estimator: {class_path: GAE, init_args: {lam: ...}}",
    "whiten_advantages": "advantage_estimator: {class_path: GAE, init_args: {whiten: ...}}",
    # of TRL
    "reward_funcs": "rewards",
    "peft_config": "lora",
    "learning_rate": "optimizer: {class_path: torch.optim.AdamW, init_args: {lr: ...}}",
    "lr": "optimizer: {class_path: torch.optim.AdamW, init_args: {lr: ...}}",
    "gradient_accumulation_steps": "micro_batch_tokens, the most tokens of one pass",
    "per_device_train_batch_size": "data.init_args.batch_size, in prompts of all ranks",
    "torch_compile": "compile_layers",
    "vllm_importance_sampling_correction": "importance_sampling",
    "max_prompt_length": "data.init_args.max_prompt_length",
    "steps_per_generation": "num_minibatches, the updates of one pass over the rollouts",
    "vf_coef": "critic: {class_path: SharedTrunkCritic, init_args: {coefficient: ...}}",
    "multi_objective_aggregation": "advantage_estimator: gdpo",
    "use_bias_correction_kl": "kl: {bias_correction: ...}",
    "use_adaptive_entropy": "entropy_coef: {target: ...}",
    "entropy_target": "entropy_coef: {target: ...}",
    # of verl
    "norm_adv_by_std_in_grpo": "scale_rewards",
    "kl_coef": "beta",
    "kl_loss_coef": "beta",
    "clip_ratio": "epsilon",
    "clip_ratio_low": "epsilon",
    "clip_ratio_high": "epsilon_high",
    "adv_estimator": "advantage_estimator",
    "ppo_epochs": "num_iterations",
    "ppo_mini_batch_size": "num_minibatches, the updates of one pass over the rollouts",
    "loss_agg_mode": "loss_type",
    "rollout_n": "num_generations",
}
"""Name -> what says the same to a module of this version."""
