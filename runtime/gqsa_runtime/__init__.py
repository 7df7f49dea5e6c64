"""Runs .gqsa files: language models compressed with GQSA and compiled ahead of time.

from gqsa_runtime import Model
with Model.open("model.gqsa") as model:
    for piece in model.generate("Once upon a time", max_new_tokens=64):
        print(piece, end="", flush=True)
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers, which do not see what is loaded late
    from gqsa_runtime.chat import freeze_support as freeze_support
    from gqsa_runtime.chat import set_python as set_python
    from gqsa_runtime.check import Check as Check
    from gqsa_runtime.check import DeviceCheck as DeviceCheck
    from gqsa_runtime.engine import ScoreResult as ScoreResult
    from gqsa_runtime.errors import BusyError as BusyError
    from gqsa_runtime.errors import ClosedError as ClosedError
    from gqsa_runtime.errors import DeviceError as DeviceError
    from gqsa_runtime.errors import FormatError as FormatError
    from gqsa_runtime.errors import GqsaError as GqsaError
    from gqsa_runtime.errors import InputError as InputError
    from gqsa_runtime.errors import ModelError as ModelError
    from gqsa_runtime.errors import SignatureError as SignatureError
    from gqsa_runtime.errors import UnsupportedError as UnsupportedError
    from gqsa_runtime.generation import AsyncGeneration as AsyncGeneration
    from gqsa_runtime.generation import Generation as Generation
    from gqsa_runtime.generation import GenerationStats as GenerationStats
    from gqsa_runtime.memory import ContextCost as ContextCost
    from gqsa_runtime.model import Model as Model
    from gqsa_runtime.perplexity import PerplexityResult as PerplexityResult
    from gqsa_runtime.sampling import SamplingOptions as SamplingOptions

__version__ = "0.1.0"

# Silent unless the application asks for it: logging.getLogger("gqsa_runtime").
logging.getLogger(__name__).addHandler(logging.NullHandler())

# Loaded when first used: the compiler imports this package for its format alone.
_EXPORTS = {
    "AsyncGeneration": "generation",
    "Check": "check",
    "ContextCost": "memory",
    "DeviceCheck": "check",
    "Generation": "generation",
    "GenerationStats": "generation",
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
    "SignatureError": "errors",
    "UnsupportedError": "errors",
    "freeze_support": "chat",
    "set_python": "chat",
}

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
