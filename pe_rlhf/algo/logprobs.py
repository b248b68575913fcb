"""Log-probs of given tokens without ever holding the logits of more than one chunk.

Where the language-model head is frozen, the log-prob of token n depends on hidden state n only. So the gradient
of each log-prob with respect to its hidden state can be taken while the chunk's logits are at hand, and only that _NH
tensor is kept: no logits are stored for the backward pass and none are computed twice. Where the head is trained,
which full tuning does, the backward pass computes each chunk's logits again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]

CHUNK = 128  # tokens whose logits exist at once on a CPU, whose caches they leave soon
GPU_LOGITS = 2**29  # bytes of fp32 logits at once on a GPU, where each chunk reads the whole head from memory again


def token_logprobs(
    hidden_NH: Tensor,
    head: Head,
    tokens_N: Tensor,
    temperature: float = 1.0,
    pieces: int | None = None,
    *,
    train_head: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probs of `tokens_N` under `softmax(head(hidden) / temperature)`, and the entropies of those distributions.

    Args:
        hidden_NH: hidden states that predict the tokens; gradients flow to them.
        head: maps _NH to logits _NV; its own parameters get a gradient only with `train_head`.
        temperature: divides the logits.
        pieces: how many chunks the tokens are cut into, and so how often `head` is called; default: `pieces_of(N)`.

    Returns:
        `(logprobs_N, entropies_N)` in nats, fp32; the entropies carry no gradient.
    """
    pieces = pieces or pieces_of(len(tokens_N))
    if not train_head:
        return _TokenLogprobs.apply(hidden_NH, head, tokens_N, temperature, pieces)
    chunks = zip(hidden_NH.tensor_split(pieces), tokens_N.tensor_split(pieces), strict=True)
    parts = [checkpoint(_chunk, head, hidden, tokens, temperature, use_reentrant=False) for hidden, tokens in chunks]
    logprobs, entropies = zip(*parts, strict=True)  # type: ignore[arg-type]  # what `_chunk` gives
    return torch.cat(logprobs), torch.cat(entropies).detach()


def pieces_of(tokens: int, vocabulary: int = 0, device: str = "cpu") -> int:
    """The fewest chunks of at most `CHUNK` tokens, or on a GPU of at most `GPU_LOGITS` bytes; at least one."""
    chunk = CHUNK if device == "cpu" or not vocabulary else max(CHUNK, GPU_LOGITS // (4 * vocabulary))
    return max(1, -(-tokens // chunk))


def _chunk(head: Head, hidden_NH: Tensor, tokens_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs of the tokens, and entropies, of one chunk."""
    logprobs_NV = _log_softmax(head(hidden_NH), temperature)
    with torch.no_grad():
        entropies_N = _entropies(logprobs_NV.exp(), logprobs_NV)
    return logprobs_NV.gather(-1, tokens_N[:, None])[:, 0], entropies_N


def _log_softmax(logits_NV: Tensor, temperature: float) -> Tensor:
    logits_NV = logits_NV.float()
    return torch.log_softmax(logits_NV if temperature == 1 else logits_NV / temperature, dim=-1)


def _entropies(probabilities_NV: Tensor, logprobs_NV: Tensor) -> Tensor:
    return -torch.linalg.vecdot(probabilities_NV, logprobs_NV)  # their product is never held


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, head: Head, tokens_N: Tensor, temperature: float, pieces: int
    ) -> tuple[Tensor, Tensor]:
        wants_gradient = hidden_NH.requires_grad
        logprobs: list[Tensor] = []
        entropies: list[Tensor] = []
        jacobians: list[Tensor] = []
        for hidden, tokens in zip(hidden_NH.tensor_split(pieces), tokens_N.tensor_split(pieces), strict=True):
            with torch.set_grad_enabled(wants_gradient):
                hidden = hidden.detach().requires_grad_(wants_gradient)
                logits_NV = head(hidden)
            logprobs_NV = _log_softmax(logits_NV.detach(), temperature)
            probabilities_NV = logprobs_NV.exp()
            logprobs.append(logprobs_NV.gather(-1, tokens[:, None])[:, 0])
            entropies.append(_entropies(probabilities_NV, logprobs_NV))
            if wants_gradient:
                # ∂ log p(token) / ∂ logits = (one-hot − p) / T, with sign and T left to the smaller tensor.
                one = torch.ones_like(probabilities_NV[:, :1])
                away_NV = probabilities_NV.scatter_add_(1, tokens[:, None], -one).to(logits_NV.dtype)
                jacobians.append(torch.autograd.grad(logits_NV, hidden, away_NV)[0] / -temperature)
        if wants_gradient:
            ctx.save_for_backward(torch.cat(jacobians))
        entropies_N = torch.cat(entropies)
        ctx.mark_non_differentiable(entropies_N)
        return torch.cat(logprobs), entropies_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        (jacobian_NH,) = ctx.saved_tensors
        return (gradients[0][:, None] * jacobian_NH).to(jacobian_NH.dtype), None, None, None, None
