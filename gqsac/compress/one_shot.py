"""One-shot compression of a block, steps 2 to 5 of the method: Hessian, saliency, select, quantise."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gqsac.compress.hessian import inverse
from gqsac.compress.options import Options
from gqsac.compress.quantize import QuantizedLinear, quantize
from gqsac.compress.saliency import saliency_metrics, saliency_under
from gqsac.compress.select import protect_2_of_4, select_groups


@dataclass
class Siblings:
    """Linears with the same input, which share all that follows from it.

    hessian_inverse: f32 [columns, columns]. importance: f32 [columns]. metrics: f32 [units, U, U], see saliency.py.
    """

    paths: list[str]
    hessian_inverse: torch.Tensor
    importance: torch.Tensor
    metrics: torch.Tensor


def siblings_of(hessians: dict[str, torch.Tensor], options: Options) -> list[Siblings]:
    """The linears of a block by their inputs. hessians: path -> f32 [columns, columns], shared by siblings."""
    together: dict[int, list[str]] = {}
    for path, hessian in hessians.items():
        together.setdefault(id(hessian), []).append(path)
    found = []
    for paths in together.values():
        hessian = hessians[paths[0]]
        hessian_inverse = inverse(hessian, options.damping)
        metrics = saliency_metrics(hessian_inverse, options.unit)
        found.append(Siblings(paths, hessian_inverse, hessian.diagonal().clone(), metrics))
    return found


def choose_mask(weight: torch.Tensor, metrics: torch.Tensor, sparsity: float, options: Options) -> torch.Tensor:
    """bool [rows, units] of a linear at that sparsity, by saliency. weight: f32 [rows, columns]."""
    saliency = saliency_under(weight, metrics)
    if options.pattern == "2:4":
        saliency = protect_2_of_4(saliency)
    return select_groups(saliency, sparsity, "layer" if options.allocation == "layer" else "row")


def quantize_block(
    weights: dict[str, torch.Tensor],
    siblings: list[Siblings],
    rates: dict[str, float],
    row_bits: dict[str, torch.Tensor],
    options: Options,
) -> dict[str, QuantizedLinear]:
    """Path -> compressed linear. weights: f32 [rows, columns] each. rates: path -> share of units to remove. row_bits:
    path -> uint8 [rows], widths."""
    result = {}
    for group in siblings:
        mine = [weights[path] for path in group.paths]
        keeps = [
            choose_mask(weight, group.metrics, rates[path], options)
            for path, weight in zip(group.paths, mine, strict=True)
        ]
        quantized = quantize(
            torch.cat(mine),
            torch.cat(keeps),
            group.hessian_inverse,
            group.importance,
            torch.cat([row_bits[path] for path in group.paths]).to(mine[0].device),
            options.quant_group_size,
            options.zeros_between_levels,
        )
        parts = quantized.split([len(weight) for weight in mine])
        result.update(zip(group.paths, parts, strict=True))
    return result
