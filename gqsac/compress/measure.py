"""Measures what a finished compression cost the model, on a little of the calibration text."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import torch
from gqsa_runtime.errors import ModelError
from gqsa_runtime.facts import MEASURES

from gqsac.compress.memory import free_memory
from gqsac.evaluate.divergence import divergence

_SAMPLES = 2  # of the calibration
_COPIES = 2  # of the model, in f32


def measured(
    compressed: Callable, original: Callable, parameters: int, tokens: np.ndarray, device: torch.device
) -> dict | None:
    """MEASURES of the compressed model beside the original, or None where memory does not hold both.

    compressed, original: make the models. parameters: of one. tokens: int64 [samples, seq_len]. Where outputs are not
    finite nothing is measured, and a line on stderr says so.
    """
    free, needed = free_memory(device), 4 * _COPIES * parameters
    if any(there is not None and needed > there for there in (free.ram, free.gpu)):
        return None
    part = tokens[:_SAMPLES]
    try:
        models = [make().float().to(device).eval() for make in (compressed, original)]
        found = vars(divergence(*models, part.reshape(-1).tolist(), part.shape[1]))
    except ModelError as error:
        print(f"warning: the compressed model was not measured: {error}", file=sys.stderr, flush=True)
        return None
    return {name: found[name] for name in MEASURES}
