"""Select, step 4: which groups of a linear stay, and how many at which point of a training.

Rows: every row keeps the same number of groups (give or take one, so that the layer's total is exact).
Layer: the groups of all rows compete; one-shot, with a layer's own Hessian, this was measured to be much
worse (SmolLM2-135M, 10 % of the groups removed: perplexity 182 against 71), because it empties rows.
Global: the groups of all layers compete by what they cost the model's loss, see sensitivity.py.
"""

from __future__ import annotations

import torch

ALLOCATIONS = ("row", "layer", "global")
PATTERNS = ("1xG", "2:4")
RAMP = 0.5  # share of a training over which groups are removed
CHOOSE_UNTIL = 0.75  # after this share the masks stay
LEAST_ROW_SHARE = 0.1  # of its groups a row keeps under a global budget, so that no linear is emptied


def select_groups(saliency: torch.Tensor, sparsity: float, allocation: str = "row") -> torch.Tensor:
    """bool [rows, n_groups], True where a group stays; round(sparsity * rows * n_groups) are False.

    saliency: f32 [rows, n_groups]. allocation: "row" or "layer". Ties fall to the lower index.
    """
    rows, n_groups = saliency.shape
    removed = round(sparsity * rows * n_groups)
    keep = torch.ones(rows, n_groups, dtype=torch.bool, device=saliency.device)
    if allocation == "layer":
        order = torch.argsort(saliency.flatten(), stable=True)
        keep.view(-1)[order[:removed]] = False
        return keep
    each, extra = divmod(removed, rows)
    values, order = torch.sort(saliency, dim=1, stable=True)
    keep.scatter_(1, order[:, :each], False)
    if extra:  # the rows that lose least by giving up one more
        cheapest = torch.argsort(values[:, each], stable=True)[:extra]
        keep[cheapest, order[cheapest, each]] = False
    return keep


def protect_2_of_4(saliency: torch.Tensor) -> torch.Tensor:
    """Saliency with the better two of every four columns made infinite, so that a 2:4 mask can grow.

    saliency: f32 [rows, columns]. At sparsity 0.5, `select_groups` of the result is a full 2:4 mask.
    """
    quads = saliency.view(len(saliency), -1, 4)
    rank = torch.argsort(torch.argsort(quads, dim=2, stable=True), dim=2, stable=True)
    return torch.where(rank >= 2, torch.inf, quads).view_as(saliency)


def protect_rows(saliency: torch.Tensor, share: float) -> torch.Tensor:
    """Saliency with the best `share` of each row made infinite, so that no row is emptied."""
    count = max(1, round(share * saliency.shape[1]))
    best = torch.topk(saliency, count, dim=1).indices
    return saliency.scatter(1, best, torch.inf)


def select_globally(saliencies: dict[str, torch.Tensor], sparsity: float) -> dict[str, torch.Tensor]:
    """Masks, bool [rows, n_groups] each, under one budget: round(sparsity * all groups) are False.

    saliencies: f32 [rows, n_groups] of each linear, comparable between linears, on one device.
    """
    flat = torch.cat([saliency.flatten() for saliency in saliencies.values()])
    keep = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
    keep[torch.argsort(flat, stable=True)[: round(sparsity * len(flat))]] = False
    parts = keep.split([saliency.numel() for saliency in saliencies.values()])
    return {name: part.view_as(saliencies[name]) for name, part in zip(saliencies, parts, strict=True)}


def scheduled_sparsity(target: float, fraction: float, ramp: float) -> float:
    """Sparsity at `fraction` of the training: a cubic rise over the first `ramp`, then `target`.

    target * (1 - (1 - t)^3), after Zhu and Gupta (arXiv 1710.01878): fast while the groups that go are
    cheap, slow where each one hurts.
    """
    return target if fraction >= ramp else target * (1 - (1 - fraction / ramp) ** 3)
