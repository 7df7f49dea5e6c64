"""The grids that rows are rounded to: how many levels a width has, and where a zero may lie between them.

A checkpoint counts zeros in sixteenths of the range of a row's width (gqsac.quantized_matrix). Where groups are
removed, and in BSR streams, a zero must be a level; otherwise it may lie between two, which is worth a lot at 1 and
2 bits: a group of weights seldom has its middle on a level.
"""

from __future__ import annotations

import torch

from gqsac.quantized_matrix import ZERO_STEPS

SYMMETRIC_BITS = 8  # a width whose zeros stay in the middle


def top_levels(row_bits: torch.Tensor) -> torch.Tensor:
    """The highest level of each row, f32. row_bits: any shape and type."""
    return torch.exp2(row_bits.float()) - 1


def levels_of_step(row_bits: torch.Tensor) -> torch.Tensor:
    """Levels in a sixteenth of each row's range, f32: what a zero as it is stored is to be multiplied with."""
    return torch.exp2(row_bits.float()) / ZERO_STEPS


def stored_zeros(zeros: torch.Tensor, row_bits: torch.Tensor, between_levels: bool) -> torch.Tensor:
    """Zeros, f32 in sixteenths, rounded to what may be stored. row_bits broadcasts to them.

    between_levels: whether any sixteenth will do, or only those that are levels.
    """
    if between_levels:
        return zeros.round().clamp(0, ZERO_STEPS - 1)
    steps = (1 / levels_of_step(row_bits)).clamp(min=1)  # sixteenths from one level to the next
    return torch.minimum((zeros / steps).round().clamp(min=0) * steps, ZERO_STEPS - steps)
