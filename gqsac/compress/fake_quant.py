"""Linears that train as they will be stored: rounded in the forward pass, straight through in the backward.

`GroupLinear` learns weights, scales and zeros (BQPO and distillation); `FrozenLinear` has its levels
fixed and learns scales alone (E2E-OQP). The weights that their forward uses are bit for bit those of the
exported matrix: scales rounded to float16, zeros to sixteenths of the range or to levels, levels clipped.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from gqsac.compress.grid import SYMMETRIC_BITS, levels_of_step, stored_zeros, top_levels
from gqsac.compress.quantize import SMALLEST_SCALE, QuantizedLinear

_LARGEST_SCALE = 65504.0


def float16_scales(scales: torch.Tensor) -> torch.Tensor:
    """f32 scales as they are stored: positive float16 numbers.

    In f32 arithmetic, for compilers leave out a conversion that another one reverts: what is added brings the step
    between neighbouring f32 numbers to that of float16, which is 2^-10 of the power of two below, or of 2^-14.
    """
    scales = scales.clamp(SMALLEST_SCALE, _LARGEST_SCALE)
    power = (scales.view(torch.int32) & 0x7F800000).view(torch.float32).clamp(min=2.0**-14)
    coarse = power * (1.5 * 2**13)
    return (scales + coarse) - coarse


class _FakeQuantize(torch.autograd.Function):
    """(clip(round(w / s + z)) - z) * s where kept, else 0; gradients as in LSQ+ (arXiv 2004.09576).

    weight: f32 or bf16 [rows, columns]. gains, base, zeros: f32 [rows, q_groups], s = float16(base * gains), z in
    sixteenths of the row's range. keep: bool [rows, units]. row_bits: uint8 [rows]. Removed weights get the gradient
    they would have if they were kept, so that they go on learning and may come back. So do, where zeros may lie between
    levels, weights beyond the ends of their grid: the best grids of few levels leave out many (docs/method.md).
    """

    @staticmethod
    def forward(ctx, weight, gains, zeros, base, keep, row_bits, between_levels):
        ctx.save_for_backward(weight, gains, zeros, base, keep, row_bits)
        ctx.between_levels = between_levels
        scales, whole, top = _grid(gains, zeros, base, row_bits, between_levels)
        levels = weight.float().view(*base.shape, -1) / scales
        levels = torch.minimum(levels.add_(whole).round_().clamp_(min=0), top).sub_(whole).mul_(scales)
        return levels.view(*keep.shape, -1).mul_(keep[..., None]).view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        weight, gains, zeros, base, keep, row_bits = ctx.saved_tensors
        scales, whole, top = _grid(gains, zeros, base, row_bits, ctx.between_levels)
        ratio = weight.float().view(*base.shape, -1) / scales
        levels = (ratio + whole).round_()
        inside = (levels >= 0) & (levels <= top)
        kept_grad = (grad.view(*keep.shape, -1) * keep[..., None]).view_as(ratio)
        levels = torch.minimum(levels.clamp_(min=0), top).sub_(whole).sub_(ratio * inside)  # d weight / d scale
        grad_gains = levels.mul_(kept_grad).sum(2) * base
        grad_zeros = None
        if ctx.needs_input_grad[2]:
            # Zeros of symmetric rows stay in the middle.
            moved = levels_of_step(row_bits)[:, None] * (row_bits != SYMMETRIC_BITS)[:, None]
            grad_zeros = -(kept_grad * ~inside).sum(2) * scales[..., 0] * moved
        if not ctx.between_levels:
            passed = inside.view(*keep.shape, -1) | ~keep[..., None]
            grad = grad * passed.view_as(grad)
        return grad.to(weight.dtype), grad_gains, grad_zeros, None, None, None, None


def _grid(gains, zeros, base, row_bits, between_levels):
    """Scales and zeros, f32 [rows, q_groups, 1], zeros in levels, and the highest level, f32 [rows, 1, 1]."""
    row_bits = row_bits[:, None]
    whole = stored_zeros(zeros, row_bits, between_levels) * levels_of_step(row_bits)
    return float16_scales(base * gains)[..., None], whole[..., None], top_levels(row_bits)[..., None]


class GroupLinear(nn.Module):
    """A linear whose weights, scales and zeros learn under a mask.

    weight: [rows, columns], the master weights: f32, or bf16 if they are made so. gains: f32 [rows, q_groups], what
    the initial scales are multiplied by, so that one learning rate fits all. zeros: f32 [rows, q_groups], in sixteenths
    of the row's range. keep: bool [rows, units]. row_bits: uint8 [rows]. bias: as in the nn.Linear it replaces.
    between_levels: whether zeros may lie between two levels, see grid.py.
    """

    def __init__(self, row_bits, weight, scales, zeros, keep, bias, between_levels: bool = False):
        super().__init__()
        self.between_levels = between_levels
        self.weight = nn.Parameter(weight.detach().float().clone())
        self.gains = nn.Parameter(torch.ones_like(scales, dtype=torch.float32))
        learns = bool((row_bits != SYMMETRIC_BITS).any())
        self.zeros = nn.Parameter(zeros.detach().float().clone(), requires_grad=learns)
        self.register_buffer("base", scales.detach().float().clone())
        self.register_buffer("keep", keep.clone())
        self.register_buffer("row_bits", row_bits.clone())
        self.bias = bias
        self.initial_rms = float(weight.detach().float().square().mean().sqrt())

    @classmethod
    def from_quantized(cls, quantized: QuantizedLinear, bias, between_levels: bool = False) -> GroupLinear:
        """Starts where the one-shot step ended: the same levels, scales and zeros."""
        q = quantized
        return cls(q.row_bits, q.adjusted, q.scales, q.zeros, q.keep, bias, between_levels)

    def effective_weight(self) -> torch.Tensor:
        """f32 [rows, columns], what `export` stores, differentiable."""
        return _FakeQuantize.apply(
            self.weight, self.gains, self.zeros, self.base, self.keep, self.row_bits, self.between_levels
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.effective_weight(), self.bias)

    @torch.no_grad()
    def export(self) -> QuantizedLinear:
        """The levels, scales and zeros that the forward pass uses."""
        scales, whole, top = _grid(self.gains, self.zeros, self.base, self.row_bits, self.between_levels)
        master = self.weight.detach().float()
        levels = master.view(*self.base.shape, -1) / scales
        levels = torch.minimum(levels.add_(whole).round_().clamp_(min=0), top)
        zeros = stored_zeros(self.zeros, self.row_bits[:, None], self.between_levels)
        return QuantizedLinear(
            self.row_bits,
            levels.to(torch.uint8),
            scales[..., 0].to(torch.float16),
            zeros.to(torch.uint8),
            self.keep,
            master,
        )


class _LevelsLinear(torch.autograd.Function):
    """x @ (offsets * units * s)^T, which keeps int8 offsets, not float weights, for the backward pass."""

    @staticmethod
    def forward(ctx, x, gains, base, offsets, units, dtype):
        ctx.save_for_backward(x, gains, base, offsets, units)
        ctx.dtype = dtype
        return x.to(dtype) @ _weights(gains, base, offsets, units).to(dtype).T

    @staticmethod
    def backward(ctx, grad):
        x, gains, base, offsets, units = ctx.saved_tensors
        weight = _weights(gains, base, offsets, units)
        grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        flat = grad.reshape(-1, grad.shape[-1])
        grad_weight = (flat.T @ x.reshape(-1, x.shape[-1]).to(grad.dtype)).float()
        grad_gains = (grad_weight.view_as(offsets) * offsets).sum(2) * base * units
        return grad_x, grad_gains, None, None, None, None


def _weights(gains, base, offsets, units) -> torch.Tensor:
    return (offsets * (float16_scales(base * gains) * units)[..., None]).flatten(1)


class FrozenLinear(nn.Module):
    """A linear of fixed levels whose scales learn.

    offsets: int8 [rows, q_groups, Gq], level - zero in units of what lies between two possible zeros, 0 where removed.
    units: f32 [rows, 1], levels. zeros: uint8, of the QuantizedLinear it was made of. gains, base: see GroupLinear.
    """

    def __init__(self, quantized: QuantizedLinear, bias):
        super().__init__()
        self.gains = nn.Parameter(torch.ones_like(quantized.scales, dtype=torch.float32))
        self.register_buffer("base", quantized.scales.float())
        self.register_buffer("units", levels_of_step(quantized.row_bits).clamp(max=1)[:, None])
        whole = (quantized.zeros * levels_of_step(quantized.row_bits)[:, None])[..., None]
        offsets = ((quantized.levels - whole) / self.units[..., None]).to(torch.int8)
        kept = quantized.keep[..., None]
        offsets = (offsets.view(*quantized.keep.shape, -1) * kept).view_as(offsets)
        self.register_buffer("offsets", offsets)
        self.register_buffer("zeros", quantized.zeros.clone())
        self.register_buffer("keep", quantized.keep.clone())
        self.register_buffer("row_bits", quantized.row_bits.clone())
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        y = _LevelsLinear.apply(x, self.gains, self.base, self.offsets, self.units, dtype)
        return y if self.bias is None else y + self.bias.to(dtype)

    @torch.no_grad()
    def effective_weight(self) -> torch.Tensor:
        """f32 [rows, columns], what `export` stores."""
        return _weights(self.gains, self.base, self.offsets, self.units)

    @torch.no_grad()
    def export(self) -> QuantizedLinear:
        """The same levels, zeros and mask, with the learnt scales."""
        whole = (self.zeros * levels_of_step(self.row_bits)[:, None])[..., None]
        levels = (self.offsets * self.units[..., None] + whole).to(torch.uint8)
        scales = float16_scales(self.base * self.gains).to(torch.float16)
        return QuantizedLinear(self.row_bits, levels, scales, self.zeros, self.keep, self.effective_weight())
