"""Hessian, step 2: second moments of each linear's inputs, one block at a time.

For a linear y = W x the error of a changed weight row w + d is d H d^T with H = E[x x^T], the same H
for all rows (Optimal Brain Surgeon, Hassibi and Stork 1993; GPTQ, arXiv 2210.17323). The inputs come
from the blocks that were already compressed, so later blocks see, and make up for, earlier errors.
"""

from __future__ import annotations

import contextlib

import torch
from gqsa_runtime.errors import ModelError
from torch import nn


def collect_hessians(linears: dict[str, nn.Linear], run, tf32: bool = False) -> dict[str, torch.Tensor]:
    """f32 [columns, columns] of each linear, scaled to a mean diagonal of 1; siblings share one tensor.

    linears: path -> module. run: a function that passes the calibration samples through the block.
    tf32: multiply in TF32 on a GPU, which loses nothing of inputs that are bf16. Raises ModelError naming the linear
    if its inputs are not finite, or if it is never called.
    """
    sums: dict[str, torch.Tensor] = {}  # leader -> sum of x x^T
    leaders: dict[str, str] = {}  # linear -> the first one with the same input
    last_input: dict[str, torch.Tensor] = {}  # leader -> its input in this sample

    def observe(name):
        def hook(module, args):
            x = args[0]
            if name not in leaders:
                leaders[name] = next((other for other, seen in last_input.items() if seen is x), name)
            if leaders[name] != name:
                return
            last_input[name] = x
            flat = x.reshape(-1, x.shape[-1]).to(torch.float32)
            if name not in sums:
                sums[name] = torch.zeros(flat.shape[1], flat.shape[1], device=flat.device)
            sums[name].addmm_(flat.T, flat)

        return hook

    handles = [module.register_forward_pre_hook(observe(name)) for name, module in linears.items()]
    try:
        with _tf32() if tf32 else contextlib.nullcontext():
            run()
    finally:
        for handle in handles:
            handle.remove()
    for name in linears:
        if name not in leaders:
            raise ModelError(f"{name} got no input while the block ran; add it to the skipped linears")
        if leaders[name] == name:
            mean = sums[name].diagonal().mean()
            if not torch.isfinite(sums[name]).all():
                raise ModelError(f"the inputs of {name} hold a NaN or an infinity")
            if mean > 0:
                sums[name] /= mean
    return {name: sums[leaders[name]] for name in linears}


@contextlib.contextmanager
def _tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def inverse(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """(H + damping I)^-1, f32 [columns, columns], for H of mean diagonal 1.

    Damping keeps it positive definite where inputs are few or dead; ten times more is tried where
    rounding still spoils the factorisation. Raises ModelError if nothing helps.
    """
    identity = torch.eye(len(hessian), device=hessian.device)
    for factor in (1, 10, 100):
        lower, failed = torch.linalg.cholesky_ex(hessian + damping * factor * identity)
        if not failed:
            return torch.cholesky_inverse(lower)
    raise ModelError("the input statistics of a linear cannot be inverted; use more calibration samples")
