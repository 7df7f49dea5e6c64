"""The device layout of weights."""

import numpy as np

from gqsac.compiler.passes.pack import stack_streams
from tests.unit.random_streams import random_stream


def test_stacked_rows_stand_one_below_another():
    parts = [random_stream(rows, 96, 16, 4, seed=seed) for seed, rows in enumerate((5, 1, 7))]
    stacked = stack_streams(parts)
    assert stacked.rows == 13 and stacked.crow_indices.dtype == np.int32
    np.testing.assert_array_equal(stacked.dequantize(), np.concatenate([part.dequantize() for part in parts]))
