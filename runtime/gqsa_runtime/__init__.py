"""Runs .gqsa files: language models compressed with GQSA and compiled ahead of time.

from gqsa_runtime import Model
with Model.open("model.gqsa") as model:
    for piece in model.generate("Once upon a time", max_new_tokens=64):
        print(piece, end="", flush=True)
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# Loaded when first used: the compiler imports this package for its format alone.
_EXPORTS = {
    "Check": "check",
    "ContextCost": "memory",
    "DeviceCheck": "check",
    "GenerationStats": "model",
    "Model": "model",
    "PerplexityResult": "perplexity",
    "SamplingOptions": "sampling",
    "ScoreResult": "engine",
    "BusyError": "errors",
    "ClosedError": "errors",
    "DeviceError": "errors",
    "FormatError": "errors",
    "GqsaError": "errors",
    "InputError": "errors",
    "ModelError": "errors",
    "UnsupportedError": "errors",
    "freeze_support": "chat",
    "set_python": "chat",
}

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
