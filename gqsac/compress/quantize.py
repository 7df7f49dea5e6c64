"""Quantise, step 5: levels, scale and zero of every kept group, errors made up for by later groups.

Groups are taken in order of how much their inputs matter. In a group the columns are rounded one after
another, and each rounding error, like each removed group, is handed on to the columns still to come
(GPTQ, arXiv 2210.17323; with removed groups SparseGPT, arXiv 2301.00774). Of several clipped ranges a
group takes the one with the least such error, with its scale already rounded to float16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gqsa_runtime.layouts.group_words import ZERO_OF_8_BIT

# Share of the group's full range that the grid spans. Clipping an outlier can pay for the others.
RANGE_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
SMALLEST_SCALE = 2.0**-24  # float16's smallest positive number


@dataclass
class QuantizedLinear:
    """levels: uint8 [rows, q_groups, Gq]. scales: f16 [rows, q_groups]. zeros: uint8 [rows, q_groups].

    keep: bool [rows, units]: a unit is a pruning group, or one weight for 2:4; what stands in levels at removed
    units has no meaning. A quantisation group of Gq columns may span several units. adjusted: f32 [rows, columns],
    each weight as it was, other weights' errors taken on, when it was rounded or removed.
    """

    levels: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    keep: torch.Tensor
    adjusted: torch.Tensor

    def split(self, rows: list[int]) -> list[QuantizedLinear]:
        """The parts of a stack of linears with so many rows each."""
        tensors = (self.levels, self.scales, self.zeros, self.keep, self.adjusted)
        return [QuantizedLinear(*part) for part in zip(*(tensor.split(rows) for tensor in tensors), strict=True)]

    def dequantize(self) -> torch.Tensor:
        """f32 [rows, columns]."""
        weight = (self.levels.float() - self.zeros[..., None].float()) * self.scales[..., None].float()
        return (weight.view(*self.keep.shape, -1) * self.keep[..., None]).flatten(1)


def quantize(
    weight: torch.Tensor,
    keep: torch.Tensor,
    hessian_inverse: torch.Tensor,
    importance: torch.Tensor,
    bits: int,
    quant_group_size: int | None = None,
) -> QuantizedLinear:
    """Rounds a linear's kept weights to `bits`.

    weight: f32 [rows, columns], not changed. keep: bool [rows, units]. hessian_inverse: f32
    [columns, columns], damped. importance: f32 [columns], the Hessian's diagonal, which sets the order.
    quant_group_size: columns that share a scale and a zero; by default those of a unit.
    """
    rows, columns = weight.shape
    unit = columns // keep.shape[1]
    group_size = quant_group_size or unit
    n_groups = columns // group_size
    kept = keep[..., None].expand(-1, -1, unit).reshape(rows, columns)
    order = torch.argsort(importance.view(n_groups, group_size).sum(1), descending=True, stable=True)
    offsets = torch.arange(group_size, device=weight.device)
    permutation = (order[:, None] * group_size + offsets).flatten()
    # Row j of the factor holds how an error in column j is best spread over the columns after it.
    factor = torch.linalg.cholesky(hessian_inverse[permutation][:, permutation], upper=True)
    rest = weight[:, permutation].clone()
    levels = torch.empty(rows, n_groups, group_size, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(rows, n_groups, dtype=torch.float16, device=weight.device)
    zeros = torch.empty(rows, n_groups, dtype=torch.uint8, device=weight.device)
    adjusted = torch.empty(rows, n_groups, group_size, device=weight.device)
    for i, group in enumerate(order.tolist()):
        start, stop = i * group_size, (i + 1) * group_size
        inside = slice(group * group_size, (group + 1) * group_size)
        errors, *best = _fit_group(rest[:, start:stop], kept[:, inside], factor[start:stop, start:stop], bits)
        levels[:, group], scales[:, group], zeros[:, group], adjusted[:, group] = best
        if stop < columns:
            rest[:, stop:] -= errors @ factor[start:stop, stop:]
    return QuantizedLinear(levels, scales, zeros, keep, adjusted.flatten(1))


def candidate_grids(group: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros, f32 [candidates, rows], whose grids span shares of each row's range of `group`.

    Scales are float16 numbers. Zero is always on the grid; 8 bits are symmetric around level 128.
    """
    shares = torch.tensor(RANGE_SHARES, device=group.device)[:, None]
    if bits == 8:
        top = group.abs().amax(1) * shares / (ZERO_OF_8_BIT - 1)
        scales = _as_float16(top)
        return scales, torch.full_like(scales, ZERO_OF_8_BIT)
    low, high = group.amin(1).clamp(max=0) * shares, group.amax(1).clamp(min=0) * shares
    top_level = (1 << bits) - 1
    scales = _as_float16((high - low) / top_level)
    return scales, torch.round(-low / scales).clamp(0, top_level)


def _as_float16(scales: torch.Tensor) -> torch.Tensor:
    return scales.clamp(SMALLEST_SCALE, 65504).to(torch.float16).to(torch.float32)


def _fit_group(group: torch.Tensor, keep: torch.Tensor, factor: torch.Tensor, bits: int):
    """Errors to hand on, f32 [rows, G] (already divided by the factor's diagonal), levels, scales, zeros, and
    the weights as they were when they were rounded, f32 [rows, G].

    group: f32 [rows, G]. keep: bool [rows, G]. factor: f32 [G, G], upper triangular.
    """
    rows, group_size = group.shape
    # The grid is made for the weights that stay, and in an empty group for those that may come back.
    seen = keep | ~keep.any(1, keepdim=True)
    scales, zeros = candidate_grids(group * seen, bits)
    kept = keep.T[:, None].to(group.dtype)  # [G, 1, rows]
    # Column-first, so that each step reads and writes contiguous memory.
    work = group.T[:, None].repeat(1, len(scales), 1)  # [G, candidates, rows]
    levels, errors = torch.empty_like(work), torch.empty_like(work)
    for j in range(group_size):
        levels[j] = torch.round(work[j] / scales + zeros).clamp_(0, (1 << bits) - 1)
        errors[j] = (work[j] - (levels[j] - zeros) * scales * kept[j]) / factor[j, j]
        if j + 1 < group_size:
            work[j + 1 :] -= factor[j, j + 1 :, None, None] * errors[j]
    best = errors.square().sum(0).argmin(0)  # [rows]
    pick = best[None, None].expand(group_size, 1, rows)
    chosen = best[None]
    return (
        errors.gather(1, pick)[:, 0].T,
        levels.gather(1, pick)[:, 0].T.to(torch.uint8),
        scales.gather(0, chosen)[0].to(torch.float16),
        zeros.gather(0, chosen)[0].to(torch.uint8),
        work.gather(1, pick)[:, 0].T,
    )
