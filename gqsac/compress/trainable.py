"""Puts trainable linears into a model, groups their parameters for the optimiser, and holds them in autocast."""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from gqsac.compress.fake_quant import FrozenLinear, GroupLinear
from gqsac.quantized_matrix import ZERO_STEPS

_LARGE = 1 << 30  # parameters
_EMBEDDINGS_RATE = 0.1


def install(parent: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Replaces submodules of `parent`. modules: path within the parent -> new module."""
    for path, module in modules.items():
        owner, _, name = path.rpartition(".")
        setattr(parent.get_submodule(owner), name, module)


def parameter_groups(linears: dict[str, nn.Module], rates: tuple[float, float], others=(), embeddings=()) -> list[dict]:
    """Groups for AdamW with their peak learning rates under "peak".

    rates: of the weights (relative to their initial root mean square) and of the scales (relative to each).
    others: norm weights and biases, which learn at the weights' rate, relative to their own size. embeddings: at a
    tenth of it, since AdamW moves what a seldom word is given by as far as everything else.
    """
    weight_lr, scale_lr = rates
    by_rate: dict[float, list] = {}
    gains, zeros = [], []
    for linear in linears.values():
        gains.append(linear.gains)
        if isinstance(linear, GroupLinear):
            by_rate.setdefault(_rounded(weight_lr * linear.initial_rms), []).append(linear.weight)
            if linear.zeros.requires_grad:
                zeros.append(linear.zeros)
    for parameters, share in ((others, 1.0), (embeddings, _EMBEDDINGS_RATE)):
        for parameter in parameters:
            rms = float(parameter.detach().float().square().mean().sqrt())
            by_rate.setdefault(_rounded(share * weight_lr * max(rms, 1e-3)), []).append(parameter)
    groups = [{"params": parameters, "peak": rate} for rate, parameters in by_rate.items() if rate > 0]
    groups.append({"params": gains, "peak": scale_lr})
    if zeros:
        groups.append({"params": zeros, "peak": scale_lr * ZERO_STEPS})
    return groups


def grouped(rates) -> list[dict]:
    """Groups for AdamW from pairs of parameter and peak learning rate, one for each rate."""
    groups: dict[float, list] = {}
    for parameter, rate in rates:
        groups.setdefault(rate, []).append(parameter)
    return [{"params": parameters, "peak": rate} for rate, parameters in groups.items()]


def _rounded(rate: float) -> float:
    """Two significant digits: linears of like size share a group, and one launch, of the optimiser."""
    return float(f"{rate:.1e}")


def set_master_dtype(linears: dict[str, GroupLinear], dtype: str) -> None:
    """Holds the weights that learn in "float32" or "bfloat16", and with them their gradients and AdamW's moments."""
    for linear in linears.values():
        linear.weight.data = linear.weight.data.to(getattr(torch, dtype))


def adamw(groups: list[dict], device: torch.device) -> torch.optim.AdamW:
    """AdamW without weight decay, fused on GPUs."""
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda")


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group at `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def autocast(device: torch.device):
    """bf16 autocast on a GPU; on the CPU everything stays f32."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
    return contextlib.nullcontext()


def trainable_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> GroupLinear or FrozenLinear, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GroupLinear | FrozenLinear)}


def prepare_large(model: nn.Module, blocks: nn.ModuleList, device: torch.device) -> None:
    """Readies a model for a backward pass: in f32; on a GPU, large ones in bf16 and with recomputed blocks."""
    large = device.type == "cuda" and is_large(model)
    for parameter in model.parameters():  # not buffers: the angles of rotary embeddings stay exact
        parameter.data = parameter.data.to(torch.bfloat16 if large else torch.float32)
    if large:
        recompute_blocks(blocks)


def is_large(model: nn.Module) -> bool:
    """Whether a model has too many parameters to be generous with memory."""
    return sum(parameter.numel() for parameter in model.parameters()) >= _LARGE


def recompute_blocks(blocks: nn.ModuleList) -> None:
    """Makes each block run again in the backward pass in place of keeping its activations."""
    for block in blocks:
        plain = block.forward
        block.forward = lambda *args, _plain=plain, **kwargs: recompute(_plain, *args, use_reentrant=False, **kwargs)
