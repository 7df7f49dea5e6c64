"""What rounding each row to each width costs the model, and the grids that rounding to nearest would take."""

from __future__ import annotations

import torch

from gqsac.compress.grid import levels_of_step, top_levels
from gqsac.compress.quantize import candidate_grids

_GROUPS_AT_ONCE = 1 << 17


@torch.no_grad()
def row_costs(weight: torch.Tensor, sensitivity: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
    """f32 [rows, widths]: sum over a row's scale groups of sensitivity * |rounding error|^2, by the best grid of each.

    weight: [rows, columns]. sensitivity: f32 [rows, q_groups], see sensitivity.fisher_scores.
    """
    groups = weight.float().reshape(sensitivity.numel(), -1)
    columns = []
    for width in widths:
        errors = torch.cat([best_grid(part, width)[2] for part in groups.split(_GROUPS_AT_ONCE)])
        columns.append((errors.view_as(sensitivity) * sensitivity).sum(1))
    return torch.stack(columns, 1)


@torch.no_grad()
def best_grid(groups: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(scales, zeros in sixteenths, squared errors), f32 [n] each, of the best candidate grid. groups: f32 [n, G]."""
    row_bits = torch.full((len(groups),), width, dtype=torch.uint8, device=groups.device)
    candidates = candidate_grids(groups, row_bits, between_levels=True)
    top, unit = float(top_levels(row_bits[:1])), float(levels_of_step(row_bits[:1]))
    best = None
    for scales, zeros in zip(*candidates, strict=True):
        whole, steps = zeros[:, None] * unit, scales[:, None]
        rounded = (groups / steps).add_(whole).round_().clamp_(0, top).sub_(whole).mul_(steps)
        found = scales, zeros, rounded.sub_(groups).square_().sum(1)
        if best is None:
            best = found
        else:
            better = found[2] < best[2]
            best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
    return best
