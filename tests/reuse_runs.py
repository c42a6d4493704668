"""Short training runs whose prompts come back, and a plain account of what each step asked for and was given."""

from functools import partial

import torch
from training import QUESTIONS, make_trainer, small_tokens, without_clock, write_questions

from lit_specrl import GRPO, PromptDataModule
from lit_specrl.callbacks import RolloutCallback

GROUP, MAX_LENGTH = 4, 12
STEPS = len(QUESTIONS) // 2  # an epoch, of two prompts each
SGD = partial(torch.optim.SGD, lr=0.1)
FROZEN = partial(torch.optim.SGD, lr=0.0)


def spread_but_why(prompts, completion_ids, **columns):
    """`small_tokens`, and a half for all answers to "Why?"."""
    shares = small_tokens(completion_ids)
    return [0.5 if "Why?" in prompt else share for prompt, share in zip(prompts, shares, strict=True)]


def grpo(model, rewards=(small_tokens,), **options):
    defaults = {"num_generations": GROUP, "max_completion_length": MAX_LENGTH, "optimizer": SGD}
    return GRPO(model, list(rewards), **defaults | options)


def questions(folder, texts=QUESTIONS, **options):
    """The texts as data, with 5 for all answers."""
    path = write_questions(folder / f"{len(list(folder.glob('*.jsonl')))}.jsonl", texts)
    return PromptDataModule(
        {"questions": path}, **{"batch_size": 2, "max_prompt_length": 64, "shuffle": False} | options
    )


class Trace(RolloutCallback):
    """By step of training: the rounds of generation, the experience, what was reported; and the rollouts of
    evaluation."""

    def __init__(self):
        self.rounds, self.experiences, self.metrics, self.evaluation = [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rounds.append([])

    def on_rollout_end(self, trainer, pl_module, rollouts):
        (self.rounds[-1] if trainer.training else self.evaluation).append(rollouts)

    def on_experience_end(self, trainer, pl_module, rollouts, experience):
        self.experiences.append(experience)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.metrics.append(dict(pl_module.step_metrics))

    @property
    def tokens(self):
        return [[rollouts.response_ids for rollouts in rounds] for rounds in self.rounds]

    @property
    def learned(self):
        """The metrics without what the clock says."""
        return [without_clock(metrics) for metrics in self.metrics]

    def of_cache(self, name):
        """A metric of the cache in every step."""
        return [metrics[f"prefix_cache/{name}"] for metrics in self.metrics]


def rows_of(rollouts):
    """(uid, sample) of each row."""
    size = rollouts.request.sampling.num_generations
    return [(uid, sample) for uid in rollouts.prompts.uids for sample in range(size)]


def last_responses(trace, num_steps=None):
    """The newest response of every (uid, sample), as a cache of the first `num_steps` steps should hold it."""
    return {
        row: ids
        for rounds in trace.rounds[:num_steps]
        for rollouts in rounds
        for row, ids in zip(rows_of(rollouts), rollouts.response_ids, strict=True)
    }


def fit(module, data, *callbacks, ckpt_path=None, **options):
    """Train; returns what happened."""
    trace = Trace()
    torch.manual_seed(0)  # of adapters
    make_trainer(*callbacks, trace, **options).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trace
