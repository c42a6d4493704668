"""What an environment or a reward is given is its own: it may change it."""

from training import make_trainer

from lit_specrl import GRPO, Environment, Observation, PromptDataModule
from lit_specrl.callbacks import RolloutCallback


class Board(Environment):
    """Notes what it finds on the board of its row, and writes on it."""

    found: list = []  # noqa: RUF012  # of all copies

    def reset(self, row):
        self.board = row["state"]["board"]
        Board.found.append(list(self.board))

    def step(self, text):
        self.board.append("x")
        return None if len(self.board) > 2 else Observation("again")


class Lengths(RolloutCallback):
    def __init__(self):
        self.steps = []

    def on_experience_end(self, trainer, pl_module, rollouts, experience):
        self.steps.append([len(ids) for ids in rollouts.response_ids] == [len(p) for p in rollouts.sampling_logprobs])


def test_rows_do_not_share_what_they_change(model_folder, tmp_path):
    seen = []

    def greedy(completion_ids, prompt_messages, state, **columns):
        for ids, messages, entry in zip(completion_ids, prompt_messages, state, strict=True):
            seen.append((len(messages), list(entry["board"])))
            ids.clear()
            messages.append({"role": "assistant", "content": "?"})
            entry["board"].append("reward")
        return [0.0, 1.0] * (len(completion_ids) // 2)

    def counting(completion_ids, **columns):
        return [float(len(ids) > 0) for ids in completion_ids]

    path = tmp_path / "train.jsonl"
    row = '{"question": "q%d", "answer": "5", "state": {"board": ["o"]}}\n'
    path.write_text("".join(row % n for n in range(2)))
    Board.found, lengths = [], Lengths()
    module = GRPO(
        model_folder, [greedy, counting], num_generations=2, max_completion_length=24, environment=Board(), max_turns=3
    )
    data = PromptDataModule(str(path), batch_size=2, max_prompt_length=64)
    make_trainer(lengths, max_epochs=3).fit(module, data)
    assert Board.found == [["o"]] * 12
    assert seen == [(1, ["o"])] * 12
    assert lengths.steps == [True] * 3
    assert module.step_metrics["rewards/counting/mean"] == 1.0
