"""Six responses to three prompts, padded for the policy, and what each row gives alone."""

import torch

from lit_specrl.masking import pad_left, pad_right

PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15]]
PROMPT_INDEX = [0, 0, 1, 2, 2, 2]
RESPONSES = [[21, 22, 23, 2], [24], [25, 26, 27], [31, 32, 33, 34, 35, 36], [41, 2], [51, 52, 53, 54, 55]]


def padded(prompts=PROMPTS, prompt_index=PROMPT_INDEX, responses=RESPONSES):
    """Arguments of the policy's forward pass."""
    return *pad_left(prompts), torch.tensor(prompt_index), *pad_right(responses)


def row_logprobs(model, prompt, response, temperature=1.0):
    """Log-probs and entropies of one response, from the logits of the row alone, without padding."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs[torch.arange(len(response)), response], -(logprobs.exp() * logprobs).sum(-1)


def gradients(policy, batch, share_prompts):
    """Gradients of a sum in which every token has its own weight."""
    policy.zero_grad()
    logprobs = policy(*batch, share_prompts=share_prompts).logprobs
    upstream = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(0))
    (logprobs * upstream).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}
