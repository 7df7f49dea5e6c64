"""The losses of training: a block's relative error, and language-model and distillation losses in bounded memory."""

from __future__ import annotations

import torch

_LOGITS_AT_ONCE = 1 << 26  # f32 elements of logits that are held at a time


def relative_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of |output - target|^2 / |target|^2, a scalar. Both: [..., width].

    Each token counts by its own norm. In plain mean squares the few tokens that serve as attention sinks, with
    norms of hundreds of times the median, would be all that is fitted; and the norm that follows in the next
    block makes relative errors the ones that matter.
    """
    target = target.float()
    error = (output.float() - target).square().sum(-1)
    return (error / target.square().sum(-1).clamp_min(1e-12)).mean()


class _TokenLoss(torch.autograd.Function):
    """Weighted mean over rows of (1 - share) * cross-entropy + share * KL(teacher || student), chunk by chunk.

    The gradient is computed on the way forward, so no f32 copy of all logits is ever held.
    """

    @staticmethod
    def forward(ctx, logits, targets, weights, teacher, share):
        grad = torch.empty_like(logits)
        total = torch.zeros((), device=logits.device)
        rows_at_once = max(1, _LOGITS_AT_ONCE // logits.shape[1])
        for start in range(0, len(logits), rows_at_once):
            rows = slice(start, start + rows_at_once)
            weight = weights[rows, None]
            log_q = torch.log_softmax(logits[rows].float(), 1)
            wanted = torch.zeros_like(log_q)  # the distribution that the gradient pulls towards
            if share > 0:
                log_p = torch.log_softmax(teacher[rows].float(), 1)
                wanted.add_(log_p.exp(), alpha=share)
                total += log_p.sub_(log_q).mul_(wanted).mul_(weight).sum()
            if share < 1:
                picked = targets[rows, None]
                total -= (1 - share) * (log_q.gather(1, picked) * weight).sum()
                wanted.scatter_add_(1, picked, torch.full_like(weight, 1 - share))
            grad[rows] = log_q.exp_().sub_(wanted).mul_(weight).to(grad.dtype)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx, upstream):
        (grad,) = ctx.saved_tensors
        return grad * upstream.to(grad.dtype), None, None, None, None


def token_loss(logits, tokens, teacher=None, share: float = 0.0) -> torch.Tensor:
    """(1 - share) * next-token cross-entropy + share * KL(teacher || student), mean over tokens, a scalar.

    logits, teacher: [batch, seq_len, vocab], any float type. tokens: int64 [batch, seq_len]. The last
    position, whose next token is not known, counts in neither.
    """
    batch, length, vocabulary = logits.shape
    weights = torch.full((batch, length), 1 / (batch * (length - 1)), device=logits.device)
    weights[:, -1] = 0
    flat_teacher = teacher.reshape(-1, vocabulary) if share > 0 else None
    targets = torch.roll(tokens, -1, 1).reshape(-1)
    return _TokenLoss.apply(logits.reshape(-1, vocabulary), targets, weights.reshape(-1), flat_teacher, share)
