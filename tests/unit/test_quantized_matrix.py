"""QuantizedMatrix against BSR streams and against its own formula."""

import numpy as np
import pytest

from gqsac.quantized_matrix import QuantizedMatrix
from tests.unit.random_streams import random_stream


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [8, 16, 64])
@pytest.mark.parametrize("kept", [1.0, 0.6, 0.0])
def test_streams_survive_both_ways(bits, group_size, kept):
    stream = random_stream(9, 384, group_size, bits, kept)
    matrix = QuantizedMatrix.from_stream(stream)
    np.testing.assert_array_equal(matrix.dequantize(), stream.dequantize())
    back = matrix.to_stream()
    for name in ("crow_indices", "col_indices", "values", "scales", "zeros"):
        np.testing.assert_array_equal(getattr(back, name), getattr(stream, name), err_msg=name)


@pytest.mark.parametrize("kept", [1.0, 0.5])
def test_a_scale_that_groups_share_is_found(kept):
    rng = np.random.default_rng(0)
    keep = rng.random((6, 16)) < kept
    matrix = QuantizedMatrix(
        16, 64, np.full(6, 4, np.uint8), rng.integers(0, 16, (6, 256), dtype=np.uint8) * np.repeat(keep, 16, 1),
        (rng.random((6, 4)) + 0.5).astype(np.float16), rng.integers(0, 16, (6, 4), dtype=np.uint8), keep,
    )  # fmt: skip
    found = QuantizedMatrix.from_stream(matrix.to_stream())
    assert found.quant_group_size == 64
    np.testing.assert_array_equal(found.dequantize(), matrix.dequantize())


def test_what_a_stream_cannot_hold_is_refused():
    arrays = np.zeros((2, 64), np.uint8), np.ones((2, 1), np.float16)
    widths, zeros = np.array([2, 4], np.uint8), np.zeros((2, 1), np.uint8)
    with pytest.raises(ValueError, match="one width"):
        QuantizedMatrix(16, 64, widths, *arrays, zeros).to_stream()
    with pytest.raises(ValueError, match="zeros are levels"):
        QuantizedMatrix(16, 64, np.full(2, 2, np.uint8), *arrays, zeros + 1).to_stream()
