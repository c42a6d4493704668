"""An EAGLE-3 head: drafts from the policy's own hidden states."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from lit_specrl.checkpoints.atomic_files import atomic_folder
from lit_specrl.checkpoints.checksums import changed_files, write_checksums
from lit_specrl.models.model_files import is_out_of_reach

_VOCABULARY = 4096
"""Tokens that a head can draft, by default."""
_NOT_IN_THE_ENGINE = ("verifier_", "t2d", "embed_tokens", "lm_head", "d2t")


def feature_layers(num_layers: int) -> list[int]:
    """Decoder layers of the policy whose inputs a head reads: a low, a middle and a high one, or the last three.

    Raises:
        ValueError: fewer than three layers; vLLM's heads take three.

    Example:
        >>> feature_layers(30), feature_layers(4)
        ([2, 15, 27], [1, 2, 3])
    """
    if num_layers < 3:
        raise ValueError(f"an EAGLE-3 head reads three layers of the policy, this one has {num_layers}")
    spread = [2, num_layers // 2, num_layers - 3]
    return spread if num_layers > 6 else [num_layers - 3, num_layers - 2, num_layers - 1]


def draft_vocabulary(token_counts: Tensor, size: int | None = None) -> Tensor:
    """The tokens that a head shall be able to draft: the most frequent ones, in the order of their ids.

    Where counts are equal, lower ids come first: tokenizers learn frequent words first.

    Args:
        token_counts: [V] how often each token was seen in responses to the task.
        size: number of tokens; `None` for 4096, or all of a smaller vocabulary.

    Returns:
        [V'] long, token ids.
    """
    size = min(size or _VOCABULARY, len(token_counts))
    return token_counts.argsort(descending=True, stable=True)[:size].sort().values


def build_head(policy: PreTrainedModel, model: str, vocabulary: Tensor | None = None, num_drafted: int = 3) -> Any:
    """A head in the format of speculators (Li et al. 2025, arXiv 2503.01840), grown from the policy.

    Embeddings, final norm and the rows of the output head are the policy's, and stay as they are. The head's decoder
    layer begins as the policy's last one: it sees the high features as they are, and nothing yet of the others and of
    the embedding beside them. It has to be trained before it is of use: what it sees is one token older than what it
    shall predict.

    Args:
        policy: a Llama, Qwen or Mistral-like causal language model.
        model: its hub name or folder, which the head's configuration refers to.
        vocabulary: [V'] long, ascending token ids that it can draft; `None` for all.
        num_drafted: tokens that it drafts by default.

    Raises:
        ImportError: speculators is missing.
        ValueError: the policy is of a kind that no EAGLE-3 head is known for.
    """
    _require_speculators()
    from speculators import SpeculatorsConfig, VerifierConfig
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig

    target = policy.config.get_text_config()
    check_architecture(target)
    layer_config = _layer_config(target)
    head = Eagle3DraftModel(
        Eagle3SpeculatorConfig(
            transformer_layer_config=layer_config,
            draft_vocab_size=target.vocab_size if vocabulary is None else len(vocabulary),
            eagle_aux_hidden_state_layer_ids=feature_layers(target.num_hidden_layers),
            speculators_config=SpeculatorsConfig(
                algorithm="eagle3",
                proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=num_drafted)],
                default_proposal_method="greedy",
                verifier=VerifierConfig(name_or_path=str(model), architectures=list(policy.config.architectures or [])),
            ),
        )
    ).float()
    _grow(head, policy, vocabulary)
    return head


def load_head(folder: str, num_layers: int | None = None) -> Any:
    """A head from the hub or a folder in the format of speculators.

    Args:
        folder: hub name or folder.
        num_layers: of the policy, which tells what a head reads that does not say.

    Raises:
        ImportError: speculators is missing.
        ValueError: there is no such head.
    """
    config = _head_config(folder, num_layers)
    check_drafter_files(folder)
    from speculators.models.eagle3 import Eagle3DraftModel

    load: Any = PreTrainedModel.from_pretrained
    try:
        # the class's own `from_pretrained` reads the policy from where it was when the head was made
        head = load.__func__(Eagle3DraftModel, folder, config=config, dtype=torch.float32)
        if any(weight.isnan().any() for weight in (head.embed_tokens.weight, head.lm_head.weight)):
            head.load_verifier_weights()  # a head that was saved without them
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"the weights of the EAGLE-3 head {folder!r} cannot be read: {error}") from error
    _freeze(head)
    return head


def check_head(folder: str, policy: PreTrainedConfig) -> None:
    """Whether a head was made for a policy of this configuration; its weights are not read.

    Raises:
        ImportError: speculators is missing.
        ValueError: there is no such head, or it has another width, vocabulary or layers.
    """
    config = _head_config(folder, policy.num_hidden_layers)
    check_drafter_files(folder)
    own, layers = config.transformer_layer_config, config.eagle_aux_hidden_state_layer_ids
    same = (own.hidden_size, own.vocab_size) == (policy.hidden_size, policy.vocab_size)
    if not same or max(layers) >= policy.num_hidden_layers:
        raise ValueError(
            f"the head {folder!r} reads layers {layers} of width {own.hidden_size} with a vocabulary of "
            f"{own.vocab_size}, the policy has {policy.num_hidden_layers} layers of width {policy.hidden_size} and "
            f"{policy.vocab_size} tokens; make a head for this policy"
        )


def _head_config(folder: str, num_layers: int | None) -> Any:
    if is_out_of_reach(folder):  # before the import, which takes long
        raise ValueError(
            f"{folder!r} is no EAGLE-3 head: there is no such folder, and the hub does not deliver it. `lit-specrl "
            "drafter` makes one"
        )
    _require_speculators()
    from speculators.models.eagle3 import Eagle3SpeculatorConfig

    try:
        config = Eagle3SpeculatorConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"{folder!r} is no EAGLE-3 head in the format of speculators: {error}. `lit-specrl drafter` makes one"
        ) from error
    config.transformer_layer_config._attn_implementation = "sdpa"
    if config.eagle_aux_hidden_state_layer_ids is None and num_layers is not None:
        config.eagle_aux_hidden_state_layer_ids = feature_layers(num_layers)  # vLLM takes the same
    return config


def check_drafter_files(folder: str) -> None:
    """Refuse a drafter whose weights are not as it was saved; one of a hub, or of others, has no checksums.

    Raises:
        ValueError: a file of weights is missing or differs.
    """
    changed = changed_files(Path(folder))
    if changed:
        raise ValueError(
            f"the drafter {folder!r} is damaged: {', '.join(changed)} missing or not as written. Make it again by "
            "`lit-specrl drafter`, or `lit-specrl export --drafter` from a checkpoint; if you changed the weights on "
            "purpose, delete checksums.json"
        )


def save_head(head: Any, folder: str | Path) -> None:
    """Write a head on the calling rank; the folder appears when it is complete, in place of an older one.

    vLLM loads it as it is.
    """
    head.should_save_on_this_rank = lambda is_main_process: is_main_process  # transformers writes on rank 0 alone
    with atomic_folder(folder) as partial:
        head.save_pretrained(partial)
        write_checksums(partial, partial.glob("*.safetensors"))


def trained_weights(head: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of everything that training changes, which is what a running engine has to be told."""
    for name, weight in head.state_dict().items():
        if not name.startswith(_NOT_IN_THE_ENGINE):
            yield name, weight


def vocabulary_of(head: Any) -> Tensor | None:
    """[V'] long, the token ids that the head can draft; `None` for all."""
    return None if head.d2t is None else head.d2t + torch.arange(len(head.d2t), device=head.d2t.device)


def unrolled_states(head: Any, features: Tensor, token_ids: Tensor, mask: Tensor, num_steps: int) -> Iterator[Tensor]:
    """What the head computes when it drafts `num_steps` tokens behind every token of a text, if all drafts are right.

    EAGLE-3's training-time test: the first draft behind a token comes from the policy's features of the tokens before
    it, the next ones from what the head has computed itself. Position i of step s has seen features up to i and tokens
    up to i + s, and predicts the token behind those.

    Args:
        head: from `build_head` or `load_head`.
        features: [N, L, F] inputs of the policy's layers `feature_layers` at the first L tokens, joined.
        token_ids: [N, L] long, the tokens that come one later.
        mask: [N, L] bool, True where there is a token; right-padded.
        num_steps: drafted tokens.

    Yields:
        [N, L, H] per step; `head.lm_head` makes logits [.., V'] of it.
    """
    length = token_ids.shape[1]
    positions = torch.arange(length, device=token_ids.device)[None]  # [1, L]
    seen = (positions <= positions.T) & mask[:, None, :]  # [N, L, L]
    own = torch.eye(length, dtype=torch.bool, device=token_ids.device).expand_as(seen)
    attended = seen | own  # padding sees itself, so that nothing is divided by 0
    cache = DynamicCache()
    states, rest = head.fc(_normed_features(head, features)), token_ids
    for step in range(num_steps):
        inputs = torch.cat([head.embed_tokens(rest).to(states.dtype), states], dim=-1)  # [N, L, 2 H]
        for layer in head.layers:
            inputs = layer(
                inputs,
                attention_mask=attended[:, None],
                position_ids=positions + step,
                past_key_values=cache,
                use_cache=True,
                position_embeddings=head.rotary_emb(inputs, positions + step),
            )
        normed = head.norm(inputs)
        states = normed if head.config.norm_output else inputs
        yield normed
        rest = torch.cat([rest[:, 1:], rest.new_zeros(len(rest), 1)], dim=1)
        attended = torch.cat([attended, own], dim=-1)  # [N, L, (s + 2) L]


def check_architecture(policy: PreTrainedConfig) -> None:
    """Refuse policies that no head can be built for.

    Raises:
        ValueError: vLLM's EAGLE-3 does not know the architecture.
    """
    known = ("llama", "qwen2", "qwen3", "mistral")
    if policy.model_type not in known:
        raise ValueError(
            f"an EAGLE-3 head can be built for policies of the kinds {', '.join(known)}, this one is "
            f"{policy.model_type!r}; use NGramDrafter, HistoryDrafter or DraftModel"
        )
    feature_layers(policy.num_hidden_layers)


def _require_speculators() -> None:
    try:
        import speculators  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "an EAGLE-3 head needs speculators: pip install 'lit_specrl[eagle3]', then pip install --no-deps "
            f"'speculators==0.9.*' 'hs-connectors==0.9.*'. The import says: {error}"
        ) from error


def _layer_config(target: PreTrainedConfig) -> Any:
    """The policy's configuration with one layer, as a Llama's, without the additions of other families."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=target.num_attention_heads,
        num_key_value_heads=target.num_key_value_heads,
        head_dim=getattr(target, "head_dim", None) or target.hidden_size // target.num_attention_heads,
        hidden_act=target.hidden_act,
        max_position_embeddings=target.max_position_embeddings,
        rms_norm_eps=target.rms_norm_eps,
        rope_parameters=copy.deepcopy(target.rope_parameters),
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=target.bos_token_id,
        eos_token_id=target.eos_token_id,
    )
    config._attn_implementation = "sdpa"
    return config


@torch.no_grad()
def _grow(head: Any, policy: PreTrainedModel, vocabulary: Tensor | None) -> None:
    backbone: Any = policy.base_model
    config, width = head.config, head.hidden_size
    if vocabulary is not None and len(vocabulary) < len(backbone.embed_tokens.weight):
        mapped = torch.zeros(head.verifier_vocab_size, dtype=torch.bool)
        mapped[vocabulary] = True
        head.load_vocab_mappings(mapped, vocabulary.cpu() - torch.arange(len(vocabulary)))
    output: Tensor = policy.get_output_embeddings().weight
    rows = output if vocabulary is None else output[vocabulary.to(output.device)]
    for linear in (head.lm_head, head.verifier_lm_head):
        linear.weight.copy_(rows)
    head.embed_tokens.weight.copy_(backbone.embed_tokens.weight)
    for norm in (head.norm, head.verifier_norm):
        norm.weight.copy_(backbone.norm.weight)
    last, own = backbone.layers[-1], head.layers[0]
    own.input_layernorm.weight.copy_(backbone.layers[0].input_layernorm.weight)
    own.hidden_norm.weight.copy_(last.input_layernorm.weight)
    own.post_attention_layernorm.weight.copy_(last.post_attention_layernorm.weight)
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(own.self_attn, name).weight  # [.., 2 H]: for the embedding, then for the hidden state
        weight.zero_()
        weight[:, width:].copy_(getattr(last.self_attn, name).weight)
    own.self_attn.o_proj.weight.copy_(last.self_attn.o_proj.weight)
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(own.mlp, name).weight.copy_(getattr(last.mlp, name).weight)
    num_features = len(config.eagle_aux_hidden_state_layer_ids)
    head.fc.weight.zero_()
    head.fc.weight[:, (num_features - 1) * width :].copy_(torch.eye(width))
    _freeze(head)


def _freeze(head: Any) -> None:
    trained = {name for name, _ in trained_weights(head)}
    for name, parameter in head.named_parameters():
        parameter.requires_grad_(name in trained)


def _normed_features(head: Any, features: Tensor) -> Tensor:
    """Heads of others may norm the features before they combine them."""
    if head.input_norm is not None:
        return head.input_norm(features)
    if head.fc_norm is None:
        return features
    parts: Sequence[Tensor] = features.chunk(len(head.fc_norm), dim=-1)
    return torch.cat([norm(part) for norm, part in zip(head.fc_norm, parts, strict=True)], dim=-1)
