"""What rounding each row to each width costs the model, and the grids that rounding to nearest would take.

The groups of all linears go through together, many at a time: a linear by itself is hundreds of short kernels a width,
and a choice of all widths would take a GPU as long as a hundred steps of training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from gqsac.compress.grid import levels_of_step, top_levels
from gqsac.compress.quantize import candidate_grids

# Weights, of which some copies in f32 are held. On a CPU they stay in its cache, which is three times as fast.
_WEIGHTS_AT_ONCE = {"cuda": 1 << 24, "cpu": 1 << 19}


@torch.no_grad()
def row_costs(
    weights: dict[str, torch.Tensor], sensitivities: dict[str, torch.Tensor], widths: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    """Path -> f32 [rows, widths]: sum over a row's scale groups of sensitivity * |rounding error|^2, by the best grid
    of each.

    weights: path -> [rows, columns]. sensitivities: path -> f32 [rows, q_groups], see sensitivity.fisher_scores, on the
    same device. A scale group has equally many columns in all of them.
    """
    groups = (weight.reshape(sensitivities[path].numel(), -1) for path, weight in weights.items())
    errors = []
    for part in _batches(groups):
        row_bits = torch.empty(len(part), dtype=torch.uint8, device=part.device)
        errors.append(torch.stack([best_grid(part, row_bits.fill_(width))[2] for width in widths], 1))
    of_linears = torch.cat(errors).split([sensitivities[path].numel() for path in weights])
    costs = {}
    for path, of_linear in zip(weights, of_linears, strict=True):
        sensitivity = sensitivities[path][..., None]
        costs[path] = (of_linear.view(*sensitivity.shape[:2], -1) * sensitivity).sum(1)
    return costs


@torch.no_grad()
def nearest_grids(
    weights: Iterable[torch.Tensor], row_bits: list[torch.Tensor], q_groups: list[int]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(scales, zeros in sixteenths), f32 [rows, q_groups] of each linear, that rounding to nearest takes.

    weights: [rows, columns] of each, which are taken one after another. row_bits: uint8 [rows] of each, on the same
    device. q_groups: scales of a row of each.
    """
    sizes = [len(bits) * n for bits, n in zip(row_bits, q_groups, strict=True)]
    widths = torch.cat([bits.repeat_interleave(n) for bits, n in zip(row_bits, q_groups, strict=True)])
    groups = (weight.reshape(size, -1) for weight, size in zip(weights, sizes, strict=True))
    found, start = [], 0
    for part in _batches(groups):
        found.append(best_grid(part, widths[start : start + len(part)])[:2])
        start += len(part)
    scales, zeros = (torch.cat(parts).split(sizes) for parts in zip(*found, strict=True))
    shapes = [(len(bits), n) for bits, n in zip(row_bits, q_groups, strict=True)]
    return tuple([part.view(shape) for part, shape in zip(parts, shapes, strict=True)] for parts in (scales, zeros))


def _batches(groups: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Groups [n, G] of many linears, one after another, as f32 [m, G] of as many as are to be held at once."""
    held, space = [], None
    for rows in groups:
        at_once = max(1, _WEIGHTS_AT_ONCE[rows.device.type] // rows.shape[1])
        while len(rows):
            space = at_once if space is None else space
            held.append(rows[:space].float())
            rows, space = rows[space:], space - len(held[-1])
            if not space:
                yield torch.cat(held)
                held, space = [], None
    if held:
        yield torch.cat(held)


@torch.no_grad()
def best_grid(groups: torch.Tensor, row_bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(scales, zeros in sixteenths, squared errors), f32 [n] each, of the best candidate grid.

    groups: f32 [n, G]. row_bits: uint8 [n].
    """
    candidates = candidate_grids(groups, row_bits, between_levels=True)
    top, unit = top_levels(row_bits)[:, None], levels_of_step(row_bits)[:, None]
    best = None
    for scales, zeros in zip(*candidates, strict=True):
        whole, steps = zeros[:, None] * unit, scales[:, None]
        rounded = (groups / steps).add_(whole).round_().clamp_(min=0).clamp_(max=top).sub_(whole).mul_(steps)
        found = scales, zeros, rounded.sub_(groups).square_().sum(1)
        if best is None:
            best = found
        else:
            better = found[2] < best[2]
            best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
    return best
