"""The training losses: next-token cross-entropy in chunks, and what keeps the routers balanced."""

from typing import Any

import torch
from torch import Tensor

CHUNK = 512  # rows of logits held at once: a whole batch of them costs more in page faults than in arithmetic


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `hidden @ weight.T`, whose logits are never held as a whole."""

    @staticmethod
    def forward(context: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the losses (tokens,) of hidden (tokens, width), weight (vocabulary, width), targets."""
        matrix = weight.to(hidden.dtype)
        hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.zeros_like(weight)
        losses = torch.empty(len(targets))
        for start in range(0, len(targets), CHUNK):
            block, wanted = hidden[start : start + CHUNK], targets[start : start + CHUNK, None]
            scores = (block @ matrix.t()).float()
            normalizer = scores.logsumexp(dim=1, keepdim=True)
            losses[start : start + CHUNK] = (normalizer - scores.gather(1, wanted))[:, 0]
            error = scores.sub_(normalizer).exp_()  # becomes softmax - one-hot, the gradient of the scores
            error.scatter_add_(1, wanted, torch.full(wanted.shape, -1.0))
            error = error.div_(len(targets)).to(hidden.dtype)
            hidden_gradient[start : start + CHUNK] = error @ matrix
            weight_gradient += error.t() @ block
        context.save_for_backward(hidden_gradient, weight_gradient)
        context.mark_non_differentiable(losses)
        return losses.mean(), losses

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients of hidden and weight."""
        hidden_gradient, weight_gradient = context.saved_tensors
        return hidden_gradient * gradients[0], weight_gradient * gradients[0], None


def next_token_loss(*, hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean loss in nats and the mean per sequence; hidden (sequences, tokens, width), ids alike."""
    flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    apply: Any = ChunkedCrossEntropy.apply  # torch gives it no types
    mean, losses = apply(flat, weight, ids[:, 1:].reshape(-1))
    return mean, losses.view(len(ids), -1).mean(dim=1)


def balance_loss(*, router_logits: tuple[Tensor, ...], top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the balance loss, the z-loss and the selection counts (layers, experts).

    The balance loss is the Switch Transformer's E * sum(share * probability), taken in each layer by itself and
    averaged (the library's own function pools the layers, so that one layer's surplus hides another's lack); 1 is
    perfect balance. Shares are over the whole batch, which holds every domain: experts may still specialise.
    The z-loss is the mean squared logsumexp of the logits (ST-MoE). router_logits: per layer (tokens, experts).
    """
    logits = torch.stack(router_logits).float()
    layers, tokens, experts = logits.shape
    chosen = logits.topk(top_k, dim=-1).indices.view(layers, -1)
    counts = torch.zeros(layers, experts).scatter_add_(1, chosen, torch.ones(chosen.shape))
    shares = counts / (tokens * top_k)
    balance = experts * (shares * logits.softmax(dim=-1).mean(dim=1)).sum(dim=1).mean()
    return balance, logits.logsumexp(dim=-1).square().mean(), counts
