"""The losses of training: a block's relative error, and language-model and distillation losses in bounded memory."""

from __future__ import annotations

import torch

from gqsac.compress.compiled import compiled, compiles

LOGITS_AT_ONCE = 1 << 26  # f32 elements of logits that are held at a time


def relative_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of |output - target|^2 / |target|^2, a scalar. Both: [..., width].

    Each token counts by its own norm. In plain mean squares the few tokens that serve as attention sinks, with
    norms of hundreds of times the median, would be all that is fitted; and the norm that follows in the next
    block makes relative errors the ones that matter.
    """
    target = target.float()
    error = (output.float() - target).square().sum(-1)
    return (error / target.square().sum(-1).clamp_min(1e-12)).mean()


@torch.no_grad()
def token_loss(logits, tokens, teacher=None, share: float = 0.0, factor: float = 1.0):
    """factor * ((1 - share) * next-token cross-entropy + share * KL(teacher || student)), mean over tokens.

    Returns (loss, a scalar; its gradient, like `logits`): the gradient is computed on the way, some rows at a time, so
    no f32 copy of all logits is ever held; hand it to `logits.backward`. logits, teacher: [batch, seq_len, vocab], any
    float type. tokens: int64 [batch, seq_len]. The last position, whose next token is not known, counts in neither.
    """
    batch, length, vocabulary = logits.shape
    weights = torch.full((batch, length), factor / (batch * (length - 1)), device=logits.device)
    weights[:, -1] = 0
    weights = weights.flatten()
    targets = torch.roll(tokens, -1, 1).flatten()
    rows_of_logits, gradient = logits.reshape(-1, vocabulary), torch.empty_like(logits).view(-1, vocabulary)
    rows_of_teacher = teacher.reshape(-1, vocabulary) if share > 0 else None
    part = compiled(_loss_and_gradient) if compiles(logits.device) else _loss_and_gradient
    total = torch.zeros((), device=logits.device)
    rows_at_once = max(1, LOGITS_AT_ONCE // vocabulary)
    for start in range(0, len(gradient), rows_at_once):
        rows = slice(start, start + rows_at_once)
        taught = rows_of_teacher[rows] if share > 0 else None
        loss, gradient[rows] = part(rows_of_logits[rows], targets[rows], weights[rows], taught, share)
        total += loss
    return total, gradient.view_as(logits)


def _loss_and_gradient(logits, targets, weights, teacher, share):
    """Of some rows, each with its weight: loss, a scalar, and gradient, f32 [rows, vocab]."""
    log_q = torch.log_softmax(logits.float(), 1)
    total = torch.zeros((), device=logits.device)
    gradient = log_q.exp()
    if share > 0:
        log_p = torch.log_softmax(teacher.float(), 1)
        p = log_p.exp()
        total = total + share * ((p * (log_p - log_q)).sum(1) * weights).sum()
        gradient = gradient - share * p
    if share < 1:
        picked = targets[:, None]
        total = total - (1 - share) * (log_q.gather(1, picked)[:, 0] * weights).sum()
        gradient = gradient.scatter_add(1, picked, torch.full_like(log_q[:, :1], share - 1))
    return total, gradient * weights[:, None]
