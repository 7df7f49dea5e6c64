"""Finds where a computation stopped being finite."""

from __future__ import annotations

import torch
from torch import nn

from gqsac.compress.trainable import autocast


@torch.no_grad()
def first_not_finite(model: nn.Module, tokens: torch.Tensor) -> str | None:
    """Path of the first module, in the order of the computation, whose output holds a NaN or an infinity; None if all
    outputs are finite.

    tokens: int64 [samples, seq_len], on the model's device.
    """
    found = []

    def look(path: str):
        def hook(module, args, output) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            numbers = [part for part in outputs if isinstance(part, torch.Tensor) and part.is_floating_point()]
            if not found and not all(torch.isfinite(part).all() for part in numbers):
                found.append(path)

        return hook

    modules = {path: module for path, module in model.named_modules() if path}
    compiled = {path: module._compiled_call_impl for path, module in modules.items()}
    handles = [module.register_forward_hook(look(path)) for path, module in modules.items()]
    try:
        for module in modules.values():
            module._compiled_call_impl = None  # compiled code would call no hooks
        with autocast(tokens.device):
            model(tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for path, module in modules.items():
            module._compiled_call_impl = compiled[path]
    return found[0] if found else None
