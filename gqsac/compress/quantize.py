"""Quantise, step 5: levels, scale and zero of every kept group, errors made up for by later groups.

Groups are taken in order of how much their inputs matter. In a group the columns are rounded one after
another, and each rounding error, like each removed group, is handed on to the columns still to come
(GPTQ, arXiv 2210.17323; with removed groups SparseGPT, arXiv 2301.00774). Of several clipped ranges a
group takes the one with the least such error, with its scale already rounded to float16.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from gqsa_runtime.layouts.group_words import ZERO_OF_8_BIT

from gqsac.compress.grid import SYMMETRIC_BITS, levels_of_step, stored_zeros, top_levels
from gqsac.quantized_matrix import ZERO_STEPS

# Share of the group's full range that the grid spans. Clipping an outlier can pay for the others.
RANGE_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
# The same where zeros may lie between levels, by width: a few levels serve a group best if they span its bulk alone.
WIDTH_SHARES = {
    1: (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6),
    2: (0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9),
    3: (0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0),
    4: (0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0),
    8: (0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0),
}
SMALLEST_SCALE = 2.0**-24  # float16's smallest positive number


@dataclass
class QuantizedLinear:
    """row_bits: uint8 [rows]. levels: uint8 [rows, q_groups, Gq]. scales: f16 [rows, q_groups].

    zeros: uint8 [rows, q_groups], in sixteenths of the range of the row's width.
    keep: bool [rows, units]: a unit is a pruning group, or one weight for 2:4; what stands in levels at removed
    units has no meaning. A quantisation group of Gq columns may span several units. adjusted: f32 [rows, columns],
    each weight as it was, other weights' errors taken on, when it was rounded or removed.
    """

    row_bits: torch.Tensor
    levels: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    keep: torch.Tensor
    adjusted: torch.Tensor

    def split(self, rows: list[int]) -> list[QuantizedLinear]:
        """The parts of a stack of linears with so many rows each."""
        tensors = (self.row_bits, self.levels, self.scales, self.zeros, self.keep, self.adjusted)
        return [QuantizedLinear(*part) for part in zip(*(tensor.split(rows) for tensor in tensors), strict=True)]

    def dequantize(self) -> torch.Tensor:
        """f32 [rows, columns]."""
        zeros = self.zeros.float() * levels_of_step(self.row_bits)[:, None]
        weight = (self.levels.float() - zeros[..., None]) * self.scales[..., None].float()
        return (weight.view(*self.keep.shape, -1) * self.keep[..., None]).flatten(1)


def quantize(
    weight: torch.Tensor,
    keep: torch.Tensor,
    hessian_inverse: torch.Tensor,
    importance: torch.Tensor,
    row_bits: torch.Tensor,
    quant_group_size: int | None = None,
    between_levels: bool = False,
) -> QuantizedLinear:
    """Rounds a linear's kept weights to the widths of its rows.

    weight: f32 [rows, columns], not changed. keep: bool [rows, units]. hessian_inverse: f32
    [columns, columns], damped. importance: f32 [columns], the Hessian's diagonal, which sets the order.
    row_bits: uint8 [rows]. quant_group_size: columns that share a scale and a zero; by default those of a unit.
    between_levels: whether zeros may lie between two levels, see grid.py.
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
        grids = candidate_grids(_seen(rest[:, start:stop], kept[:, inside]), row_bits, between_levels)
        errors, *best = _fit_group(
            rest[:, start:stop], kept[:, inside], factor[start:stop, start:stop], row_bits, *grids
        )
        levels[:, group], scales[:, group], zeros[:, group], adjusted[:, group] = best
        if stop < columns:
            rest[:, stop:] -= errors @ factor[start:stop, stop:]
    return QuantizedLinear(row_bits, levels, scales, zeros, keep, adjusted.flatten(1))


def candidate_grids(
    group: torch.Tensor, row_bits: torch.Tensor, between_levels: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales, and zeros in sixteenths, f32 [candidates, rows], whose grids span shares of each row's range of `group`.

    Scales are float16 numbers. Where zeros are levels, 0 is on the grid and shares are taken towards it; where they
    may lie between, towards the row's mean. 8 bits are symmetric around level 128.
    """
    low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
    if between_levels:
        shares, mean = _width_shares(group.device)[:, row_bits.long()], group.mean(1)
        low, high = mean + (low - mean) * shares, mean + (high - mean) * shares
    else:
        shares = torch.tensor(RANGE_SHARES, device=group.device)[:, None]
        low, high = low * shares, high * shares
    scales = _as_float16((high - low) / top_levels(row_bits))
    zeros = stored_zeros(-low / scales / levels_of_step(row_bits), row_bits, between_levels)
    symmetric = row_bits == SYMMETRIC_BITS
    if not symmetric.any():
        return scales, zeros
    around = _as_float16(group.abs().amax(1) * shares / (ZERO_OF_8_BIT - 1))
    return torch.where(symmetric, around, scales), zeros.masked_fill(symmetric, ZERO_STEPS // 2)


@functools.cache
def _width_shares(device: torch.device) -> torch.Tensor:
    """WIDTH_SHARES as f32 [candidates, width], copied to a device once: each copy waits for all that runs there."""
    table = torch.zeros(len(WIDTH_SHARES[1]), max(WIDTH_SHARES) + 1)
    for bits, of_width in WIDTH_SHARES.items():
        table[:, bits] = torch.tensor(of_width)
    return table.to(device)


def _as_float16(scales: torch.Tensor) -> torch.Tensor:
    return scales.clamp(SMALLEST_SCALE, 65504).to(torch.float16).to(torch.float32)


def _seen(group: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """What a grid is made for: the weights that stay, and in an empty group those that may come back."""
    return group * (keep | ~keep.any(1, keepdim=True))


def _fit_group(group, keep, factor, row_bits, scales, zeros):
    """Errors to hand on, f32 [rows, G] (already divided by the factor's diagonal), levels, scales, zeros, and
    the weights as they were when they were rounded, f32 [rows, G], with the best of the candidate grids.

    group: f32 [rows, G]. keep: bool [rows, G]. factor: f32 [G, G], upper triangular. scales, zeros: see
    candidate_grids.
    """
    rows, group_size = group.shape
    kept = keep.T[:, None].to(group.dtype)  # [G, 1, rows]
    levels_of_zeros, lowest, top = zeros * levels_of_step(row_bits), torch.zeros_like(zeros), top_levels(row_bits)
    highest = top.expand_as(zeros).contiguous()
    # Column-first, so that each step reads and writes contiguous memory.
    work = group.T[:, None].repeat(1, len(scales), 1)  # [G, candidates, rows]
    levels, errors = torch.empty_like(work), torch.empty_like(work)
    for j in range(group_size):
        levels[j] = torch.round(work[j] / scales + levels_of_zeros).clamp_(lowest, highest)
        errors[j] = (work[j] - (levels[j] - levels_of_zeros) * scales * kept[j]) / factor[j, j]
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
