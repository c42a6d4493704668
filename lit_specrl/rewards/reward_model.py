"""Reward by a model: the logit of a sequence classifier."""

from __future__ import annotations

import inspect
import sys
import warnings
from typing import Any

# torch and transformers are imported where they are used: the processes of checkers come here, too
from lit_specrl.rewards.base import Reward

_DTYPES = ("auto", "float32", "bfloat16", "float16")


class RewardModel(Reward):
    """The logit that a sequence classifier of transformers gives conversation and completion.

    With a chat template, the classifier reads the conversation of the prompt and the completion as its own template
    writes them; without one, the last question and the completion as a pair of texts. The classifier is loaded at the
    first call, stays on its device, and is not trained. A text longer than `max_length` loses its beginning, which is
    warned of once and counted (`cut`).

    Args:
        model: hub name or folder of a sequence classifier.
        device: "cpu", "cuda", "cuda:1"; `None` is the current GPU, or the CPU where there is none.
        dtype: of its weights; "auto" is bfloat16 where the device has instructions for it, and float32 elsewhere.
        batch_size: rows in one pass.
        max_length: most tokens that it reads; `None` for as many as its tokenizer says, and as it has positions.
        label: which of its logits is the reward; may be left out where it has one.
        tokenizer: hub name or folder of its tokenizer, where that is another one.
        weight: factor of this reward in the total.
        name: name in the logs, "reward_model" by default.

    Raises:
        ValueError: there is no such model, an argument is out of range, or `label` is needed.

    Example::

        RewardModel("Skywork/Skywork-Reward-V2-Qwen3-0.6B", batch_size=16)
    """

    def __init__(
        self,
        model: str,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int = 8,
        max_length: int | None = None,
        label: int | None = None,
        tokenizer: str | None = None,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name or "reward_model")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
        for argument, value in {"batch_size": batch_size, "max_length": max_length}.items():
            if value is not None and value < 1:
                raise ValueError(f"{argument} must be at least 1, got {value}")
        self.model, self.device, self.dtype = model, device, dtype
        self.batch_size, self.max_length, self.label = batch_size, max_length, label
        self.tokenizer = tokenizer or model
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(model).get_text_config()
        except (OSError, ValueError) as error:
            raise ValueError(f"reward model {model!r} cannot be read: {str(error)[:300]}") from error
        if label is None and config.num_labels != 1:
            raise ValueError(
                f"reward model {model!r} has {config.num_labels} logits; say by label which one is the reward"
            )
        if label is not None and not 0 <= label < config.num_labels:
            raise ValueError(f"label must lie between 0 and {config.num_labels - 1}, got {label}")
        self._positions = getattr(config, "max_position_embeddings", None)
        self._classifier: Any = None
        self._reader: Any = None

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        if self._classifier is None:
            self._load()
        messages = columns.get("prompt_messages") or [[]] * len(prompts)
        texts = self._cut([self._read(*row) for row in zip(prompts, messages, completions, strict=True)])
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]["input_ids"]))
        scores: list[float | None] = [None] * len(texts)
        size = self.batch_size if self._reader.pad_token_id is not None else 1
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            for row, score in zip(rows, self._scores([texts[row] for row in rows]), strict=True):
                scores[row] = score
        return scores

    def close(self) -> None:
        """Give the memory of the classifier back; the next call loads it again."""
        self._classifier = self._reader = None

    def _made_by(self) -> dict[str, Any]:
        """Return what the scores depend on: not where and in which portions they are computed."""
        return {name: value for name, value in super()._made_by().items() if name not in ("device", "batch_size")}

    def _load(self) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from lit_specrl.precision import fast_dtype

        device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = fast_dtype(device).name if self.dtype == "auto" else self.dtype
        self._reader = AutoTokenizer.from_pretrained(self.tokenizer)
        classifier, report = AutoModelForSequenceClassification.from_pretrained(
            self.model, dtype=getattr(torch, dtype), output_loading_info=True
        )
        if missing := sorted(report["missing_keys"]):
            raise ValueError(
                f"reward model {self.model!r} has no weights for {', '.join(missing[:3])}: it is no sequence classifier, "
                "and its scores would be random. Name one that was trained as a reward model"
            )
        if self._reader.pad_token_id is not None:  # by it transformers finds the end of a row
            for config in (classifier.config, classifier.config.get_text_config()):
                config.pad_token_id = self._reader.pad_token_id
        self._arguments = inspect.signature(classifier.forward).parameters
        self._num_positions = _num_positions(classifier, self._positions)
        self._classifier = classifier.to(device).eval().requires_grad_(False)

    def _read(self, prompt: str, turns: list[dict[str, str]], completion: str) -> dict[str, list[int]]:
        """What the classifier is given of a row: lists of numbers, one per token."""
        turns = turns or [{"role": "user", "content": prompt}]
        opening = turns[-1]["content"] if turns[-1]["role"] == "assistant" else ""
        asked = turns[:-1] if opening else turns
        if self._reader.chat_template is None:
            return self._inputs(self._reader(asked[-1]["content"], opening + completion))
        answered = [*asked, {"role": "assistant", "content": opening + completion}]
        text = self._reader.apply_chat_template(answered, tokenize=False)
        return self._inputs(self._reader(text, add_special_tokens=False))

    def _inputs(self, encoding: Any) -> dict[str, list[int]]:
        read = {"attention_mask": [1] * len(encoding["input_ids"]), **encoding}
        return {name: list(values) for name, values in read.items() if name in self._arguments}

    def _cut(self, texts: list[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
        limit = min(self.max_length or self._reader.model_max_length, self._num_positions)
        num_cut = sum(len(text["input_ids"]) > limit for text in texts)
        if num_cut and not self.counters.get("cut"):
            warnings.warn(
                f"reward {self.name!r}: {num_cut} of {len(texts)} texts are longer than {limit} tokens and lose "
                "their beginning; raise max_length as far as the model has positions, or shorten prompts and responses",
                stacklevel=3,
            )
        self.counters = {"cut": num_cut}
        return [self._shortened(text, len(text["input_ids"]) - limit) for text in texts] if num_cut else texts

    def _shortened(self, text: dict[str, list[int]], num_cut: int) -> dict[str, list[int]]:
        """A text without its first tokens; a special one before them, which an encoder reads its score from, stays."""
        if num_cut <= 0:
            return text
        start = int(self._reader.chat_template is None and text["input_ids"][0] in self._reader.all_special_ids)
        return {name: values[:start] + values[start + num_cut :] for name, values in text.items()}

    def _scores(self, texts: list[dict[str, list[int]]]) -> list[float]:
        """[n] logits of n texts, padded on the right."""
        import torch

        device, width = self._classifier.device, max(len(text["input_ids"]) for text in texts)
        padding = {"input_ids": self._reader.pad_token_id or 0, "token_type_ids": self._reader.pad_token_type_id}
        inputs = {
            name: torch.tensor(
                [text[name] + [padding.get(name, 0)] * (width - len(text[name])) for text in texts], device=device
            )  # [n, L]
            for name in texts[0]
        }
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):  # the trainer's
            logits = self._classifier(**inputs).logits  # [n, labels]
        return logits[:, self.label or 0].float().cpu().tolist()


def _num_positions(classifier: Any, told: int | None) -> int:
    """Tokens that a model has positions for; as many as one likes where neither it nor its configuration tells."""
    for module in classifier.modules():
        table: Any = getattr(module, "position_embeddings", None)
        if getattr(table, "padding_idx", None) is not None:  # RoBERTa and its kin count from behind the padding token
            return int(table.num_embeddings - table.padding_idx - 1)
    return sys.maxsize if told is None else told
