"""Linears that train as they will be stored: rounded in the forward pass, straight through in the backward.

`GroupLinear` learns weights, scales and zeros (BQPO and distillation); `FrozenLinear` has its levels
fixed and learns scales alone (E2E-OQP). The weights that their forward uses are bit for bit those of the
exported streams: scales rounded to float16, zeros to whole levels, levels clipped.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

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

    weight: f32 or bf16 [rows, columns]. gains, base, zeros: f32 [rows, q_groups], s = float16(base * gains).
    keep: bool [rows, units]. Removed weights get the gradient they would have if they were kept, so that
    they go on learning and may come back.
    """

    @staticmethod
    def forward(ctx, weight, gains, zeros, base, keep, bits):
        ctx.save_for_backward(weight, gains, zeros, base, keep)
        ctx.bits = bits
        scales, whole = float16_scales(base * gains)[..., None], _whole(zeros, bits)[..., None]
        levels = weight.float().view(*base.shape, -1) / scales
        levels.add_(whole).round_().clamp_(0, (1 << bits) - 1).sub_(whole).mul_(scales)
        return levels.view(*keep.shape, -1).mul_(keep[..., None]).view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        weight, gains, zeros, base, keep = ctx.saved_tensors
        top = (1 << ctx.bits) - 1
        scales, whole = float16_scales(base * gains)[..., None], _whole(zeros, ctx.bits)[..., None]
        ratio = weight.float().view(*base.shape, -1) / scales
        levels = (ratio + whole).round_()
        inside = (levels >= 0) & (levels <= top)
        kept_grad = (grad.view(*keep.shape, -1) * keep[..., None]).view_as(ratio)
        levels.clamp_(0, top).sub_(whole).sub_(ratio * inside)  # d weight / d scale
        grad_gains = levels.mul_(kept_grad).sum(2) * base
        grad_zeros = None
        if ctx.needs_input_grad[2]:
            grad_zeros = -(kept_grad * ~inside).sum(2) * scales[..., 0]
        passed = inside.view(*keep.shape, -1) | ~keep[..., None]
        return (grad * passed.view_as(grad)).to(weight.dtype), grad_gains, grad_zeros, None, None, None


def _whole(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    return zeros.round().clamp(0, (1 << bits) - 1)


class GroupLinear(nn.Module):
    """A linear whose weights, scales and zeros learn under a mask.

    weight: [rows, columns], the master weights: f32, or bf16 if they are made so. gains: f32 [rows, q_groups], what
    the initial scales are multiplied by, so that one learning rate fits all. zeros: f32 [rows, q_groups], in levels.
    keep: bool [rows, units]. bias: as in the nn.Linear it replaces.
    """

    def __init__(self, bits: int, weight, scales, zeros, keep, bias):
        super().__init__()
        self.bits = bits
        self.weight = nn.Parameter(weight.detach().float().clone())
        self.gains = nn.Parameter(torch.ones_like(scales, dtype=torch.float32))
        self.zeros = nn.Parameter(zeros.detach().float().clone(), requires_grad=bits != 8)  # 8 bits are symmetric
        self.register_buffer("base", scales.detach().float().clone())
        self.register_buffer("keep", keep.clone())
        self.bias = bias
        self.initial_rms = float(weight.detach().float().square().mean().sqrt())

    @classmethod
    def from_quantized(cls, quantized: QuantizedLinear, bits: int, bias) -> GroupLinear:
        """Starts where the one-shot step ended: the same levels, scales and zeros."""
        return cls(bits, quantized.adjusted, quantized.scales, quantized.zeros, quantized.keep, bias)

    def effective_weight(self) -> torch.Tensor:
        """f32 [rows, columns], what `export` stores, differentiable."""
        return _FakeQuantize.apply(self.weight, self.gains, self.zeros, self.base, self.keep, self.bits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.effective_weight(), self.bias)

    @torch.no_grad()
    def export(self) -> QuantizedLinear:
        """The levels, scales and zeros that the forward pass uses."""
        scales, whole = float16_scales(self.base * self.gains), _whole(self.zeros, self.bits)
        master = self.weight.detach().float()
        levels = master.view(*scales.shape, -1) / scales[..., None]
        levels = levels.add_(whole[..., None]).round_().clamp_(0, (1 << self.bits) - 1)
        return QuantizedLinear(
            levels.to(torch.uint8), scales.to(torch.float16), whole.to(torch.uint8), self.keep, master
        )


class _LevelsLinear(torch.autograd.Function):
    """x @ (offsets * s)^T, which keeps int8 offsets, not float weights, for the backward pass."""

    @staticmethod
    def forward(ctx, x, gains, base, offsets, dtype):
        ctx.save_for_backward(x, gains, base, offsets)
        ctx.dtype = dtype
        return x.to(dtype) @ _weights(gains, base, offsets).to(dtype).T

    @staticmethod
    def backward(ctx, grad):
        x, gains, base, offsets = ctx.saved_tensors
        weight = _weights(gains, base, offsets)
        grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        flat = grad.reshape(-1, grad.shape[-1])
        grad_weight = (flat.T @ x.reshape(-1, x.shape[-1]).to(grad.dtype)).float()
        grad_gains = (grad_weight.view_as(offsets) * offsets).sum(2) * base
        return grad_x, grad_gains, None, None, None


def _weights(gains, base, offsets) -> torch.Tensor:
    return (offsets * float16_scales(base * gains)[..., None]).flatten(1)


class FrozenLinear(nn.Module):
    """A linear of fixed levels whose scales learn. offsets: int8 [rows, q_groups, Gq], level - zero, 0 where removed.

    levels and zeros: uint8, of the QuantizedLinear it was made of. gains, base: see GroupLinear.
    """

    def __init__(self, bits: int, quantized: QuantizedLinear, bias):
        super().__init__()
        self.bits = bits
        self.gains = nn.Parameter(torch.ones_like(quantized.scales, dtype=torch.float32))
        self.register_buffer("base", quantized.scales.float())
        zeros = quantized.zeros[..., None]
        offsets = (quantized.levels.to(torch.int16) - zeros).to(torch.int8)
        kept = quantized.keep[..., None]
        offsets = (offsets.view(*quantized.keep.shape, -1) * kept).view_as(offsets)
        self.register_buffer("offsets", offsets)
        self.register_buffer("zeros", quantized.zeros.clone())
        self.register_buffer("keep", quantized.keep.clone())
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        y = _LevelsLinear.apply(x, self.gains, self.base, self.offsets, dtype)
        return y if self.bias is None else y + self.bias.to(dtype)

    @torch.no_grad()
    def effective_weight(self) -> torch.Tensor:
        """f32 [rows, columns], what `export` stores."""
        return _weights(self.gains, self.base, self.offsets)

    @torch.no_grad()
    def export(self) -> QuantizedLinear:
        """The same levels, zeros and mask, with the learnt scales."""
        levels = (self.offsets.to(torch.int16) + self.zeros[..., None]).to(torch.uint8)
        scales = float16_scales(self.base * self.gains).to(torch.float16)
        return QuantizedLinear(levels, scales, self.zeros, self.keep, self.effective_weight())
