"""Training that is compiled trains for the weights that are stored, and like training that is not."""

import shutil

import pytest
import torch

from gqsac.compress import compiled
from gqsac.compress.fake_quant import GroupLinear


def some_linear(*bits: int) -> GroupLinear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 64, generator=generator)
    scales = 0.1 + 0.2 * torch.rand(24, 4, generator=generator)  # not float16 numbers
    row_bits = torch.tensor(bits, dtype=torch.uint8).repeat(24)[:24]
    zeros = torch.full((24, 4), 8.0) if len(bits) == 1 else 8 + torch.randn(24, 4, generator=generator)
    keep = torch.rand(24, 4, generator=generator) > 0.3
    return GroupLinear(row_bits, weight, scales, zeros, keep, None, len(bits) > 1)


def gradients(linear: GroupLinear, block, x: torch.Tensor) -> list[torch.Tensor]:
    block(x).square().sum().backward()
    found = [parameter.grad for parameter in (linear.weight, linear.gains, linear.zeros)]
    linear.zero_grad()
    return found


def check(linear: GroupLinear, device: str) -> None:
    linear.to(device)
    block = torch.compile(linear, dynamic=False)
    stored = linear.export().dequantize()
    assert torch.equal(block(torch.eye(64, device=device)).detach().T, stored)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).to(device)
    for ours, theirs in zip(gradients(linear, block, x), gradients(linear, linear, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_fused_kernels_round_scales_as_they_are_stored():
    check(some_linear(4), "cpu")
    check(some_linear(1, 2, 4, 3), "cpu")


@pytest.mark.gpu
def test_fused_kernels_on_a_gpu_round_scales_as_they_are_stored():
    if not (torch.cuda.is_available() and compiled.compiles(torch.device("cuda"))):
        pytest.skip("no NVIDIA GPU, or no Triton")
    check(some_linear(2), "cuda")
    check(some_linear(1, 2, 4, 3), "cuda")


def test_a_cpu_does_not_compile(monkeypatch):
    assert not compiled.compiles(torch.device("cpu"))
    monkeypatch.setenv("GQSAC_COMPILE", "0")
    assert not compiled.compiles(torch.device("cuda"))
