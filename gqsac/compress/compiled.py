"""torch.compile for the training steps on a GPU, where a step of a small model is thousands of short kernels.

What it is worth is in docs/performance.md. Blocks of one model share their compiled code, so it costs seconds.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable

import torch

_SWITCH = "GQSAC_COMPILE"
_VARIANTS = 32  # of a block: with and without gradients, dense and compressed, for each shape of a batch


def compiles(device: torch.device) -> bool:
    """Whether training steps on the device are compiled. GQSAC_COMPILE=0 in the environment says no."""
    return device.type == "cuda" and os.environ.get(_SWITCH, "1") != "0" and _available()


@functools.cache
def _available() -> bool:
    """Whether torch.compile can make GPU kernels here: it needs Triton, and Triton a C compiler."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return importlib.util.find_spec("triton") is not None and bool(compiler)


@functools.cache
def compiled(function: Callable) -> Callable:
    """The function, compiled once for each set of shapes."""
    return torch.compile(function, dynamic=False)


def compile_blocks(blocks, device: torch.device) -> None:
    """Makes blocks, which must be in their final form, run compiled if the device is one that compiles."""
    if compiles(device):
        _allow_variants()
        for block in blocks:
            block.compile(dynamic=False)


def compiled_block(block, device: torch.device) -> Callable:
    """A block to call, compiled if the device is one that compiles, and otherwise itself."""
    if not compiles(device):
        return block
    _allow_variants()
    return torch.compile(block, dynamic=False)


def _allow_variants() -> None:
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _VARIANTS)
