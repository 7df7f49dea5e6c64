"""Trainable linears: what they compute is what is stored, and their gradients are the straight-through ones."""

import pytest
import torch

from gqsac import codec
from gqsac.compress.fake_quant import FrozenLinear, GroupLinear, float16_scales
from gqsac.compress.options import MASTER_DTYPES
from gqsac.compress.quantize import quantize
from gqsac.compress.select import protect_2_of_4, select_groups
from gqsac.compress.store import from_matrix, to_matrix
from gqsac.compress.trainable import set_master_dtype

# bits (several: of rows in turn, with zeros between levels), group size, columns that share a scale, pattern
CASES = [
    ((2, 1, 4, 3, 8), 16, 64, "1xG"),
    ((4, 2), 64, 64, "1xG"),
    (2, 16, 16, "1xG"),
    (3, 8, 32, "1xG"),
    (4, 16, 16, "1xG"),
    (4, 16, 64, "1xG"),
    (8, 32, 32, "1xG"),
    (4, 128, 128, "1xG"),
    (2, 64, 64, "2:4"),
    (4, 64, 128, "2:4"),
    (8, 16, 16, "2:4"),
]


def make(bits, group_size, quant_group_size, pattern, rows=12, columns=256):
    """A GroupLinear that has moved away from its one-shot start, as in the midst of a training."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    saliency = torch.rand(rows, columns if pattern == "2:4" else columns // group_size, generator=generator)
    keep = select_groups(protect_2_of_4(saliency) if pattern == "2:4" else saliency, 0.5)
    several = isinstance(bits, tuple)
    row_bits = torch.tensor(bits, dtype=torch.uint8).repeat(rows)[:rows]
    quantized = quantize(weight, keep, torch.eye(columns), torch.ones(columns), row_bits, quant_group_size, several)
    bias = torch.nn.Parameter(torch.randn(rows, generator=generator))
    linear = GroupLinear.from_quantized(quantized, bias, several)
    assert torch.equal(linear.effective_weight(), quantized.dequantize())  # it starts where one-shot ended
    with torch.no_grad():
        linear.weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.3)
        linear.gains.mul_(1 + 0.2 * torch.randn(linear.gains.shape, generator=generator))
        if bits != 8:
            moved = torch.randn(linear.zeros.shape, generator=generator) * 4
            linear.zeros.add_(moved * (row_bits != 8)[:, None])
    return linear


def test_scales_are_rounded_as_float16_rounds_them():
    generator = torch.Generator().manual_seed(0)
    scales = torch.cat(
        [
            torch.exp2(torch.empty(100_000).uniform_(-26, 17, generator=generator)),
            torch.arange(1, 4096) * 2.0**-26,  # subnormal numbers, and the middles between them
            torch.arange(2048, 4097) * 2.0**-24,  # the least normal numbers, and their middles
            torch.tensor([0.0, 65504.0, 1e6]),
        ]
    )
    expected = scales.clamp(2.0**-24, 65504.0).to(torch.float16).float()
    assert torch.equal(float16_scales(scales), expected)


def stored_weight(linear, group_size):
    return torch.from_numpy(to_matrix(linear.export(), group_size).dequantize())


@pytest.mark.parametrize("dtype", MASTER_DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_forward_is_bit_for_bit_what_export_stores(case, dtype):
    _, group_size, quant_group_size, pattern = case
    linear = make(*case)
    set_master_dtype({"it": linear}, dtype)
    stored = stored_weight(linear, group_size)
    assert torch.equal(linear.effective_weight(), stored)
    assert 0.4 < (stored == 0).float().mean() < 0.9
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    assert torch.equal(linear(x), torch.nn.functional.linear(x, stored, linear.bias))
    if pattern == "2:4":
        assert ((stored.view(-1, 4) == 0).sum(1) >= 2).all()

    matrix = to_matrix(linear.export(), group_size)
    assert matrix.quant_group_size == quant_group_size
    frozen = FrozenLinear(from_matrix(matrix), linear.bias)
    assert torch.equal(frozen.effective_weight(), stored)
    with torch.no_grad():
        frozen.gains.mul_(1 + 0.2 * torch.rand(frozen.gains.shape, generator=torch.Generator().manual_seed(2)))
    again = to_matrix(frozen.export(), group_size)
    assert torch.equal(frozen.effective_weight(), torch.from_numpy(again.dequantize()))
    stored, stored_again = codec.pack(matrix), codec.pack(again)
    for name in stored:
        assert (name == "scales") == (stored[name] != stored_again[name]).any(), name


def reference_weight(linear):
    """The same in plain autograd: rounding passes gradients, removed weights pass them, and clipping stops them unless
    zeros may lie between levels."""

    def through(exact, rounded):
        return exact + (rounded - exact).detach()

    bits = linear.row_bits[:, None].float()
    top, unit = (2**bits - 1)[..., None], 2**bits / 16
    # Sixteenths from one zero to the next that may be stored.
    grain = torch.ones_like(unit) if linear.between_levels else (1 / unit).clamp(min=1)
    scales = linear.base * linear.gains
    scales = through(scales, float16_scales(scales))[..., None]
    rounded = ((linear.zeros / grain).round() * grain).clamp(torch.zeros_like(grain), 16 - grain)
    zeros = through(linear.zeros, rounded)  # it may come back into its range
    zeros = torch.where(bits == 8, rounded.detach(), zeros)[..., None] * unit[..., None]
    ratio = linear.weight.view(*linear.base.shape, -1) / scales
    unclipped = through(ratio + zeros, torch.round(ratio + zeros))
    levels = unclipped.clamp(torch.zeros_like(top), top)
    kept = ((levels - zeros) * scales).view(*linear.keep.shape, -1) * linear.keep[..., None]
    passing = (~linear.keep[..., None]).expand_as(kept)
    if linear.between_levels:
        passing = passing | (levels != unclipped).view_as(kept)
    passed = linear.weight.view_as(kept) * passing
    return (kept + passed - passed.detach()).flatten(1)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_straight_through_rounding(case):
    linear = make(*case)
    upstream = torch.randn(12, 256, generator=torch.Generator().manual_seed(3))
    parameters = [linear.weight, linear.gains] + ([linear.zeros] if linear.zeros.requires_grad else [])
    assert linear.zeros.requires_grad == (case[0] != 8)
    ours = torch.autograd.grad(linear.effective_weight(), parameters, upstream)
    expected = torch.autograd.grad(reference_weight(linear), parameters, upstream)
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.abs().max() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_gradients_of_frozen_levels_are_those_of_autograd():
    linear = make(4, 16, 64, "1xG")
    frozen = FrozenLinear(from_matrix(to_matrix(linear.export(), 16)), linear.bias)
    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(4), requires_grad=True)
    upstream = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(5))
    ours = torch.autograd.grad(frozen(x), (x, frozen.gains), upstream)
    scales = (frozen.base * frozen.gains)[..., None]
    y = torch.nn.functional.linear(x, (frozen.offsets * scales).flatten(1), linear.bias)
    for mine, theirs in zip(ours, torch.autograd.grad(y, (x, frozen.gains), upstream), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=1e-3)  # scales here are not rounded to float16


def test_bf16_autocast_rounds_only_the_product():
    linear = make(4, 16, 16, "1xG")
    frozen = FrozenLinear(from_matrix(to_matrix(linear.export(), 16)), linear.bias)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(6))
    with torch.autocast("cpu", torch.bfloat16):
        trained, levels = linear(x), frozen(x)
    assert trained.dtype == levels.dtype == torch.bfloat16
    torch.testing.assert_close(trained.float(), linear(x), rtol=0.02, atol=0.2)
    torch.testing.assert_close(levels.float(), trained.float(), rtol=0.02, atol=0.2)
