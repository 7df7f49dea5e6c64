"""The device layout of weights."""

import numpy as np
import pytest

from gqsac.bsr import BsrStream, pack_values
from gqsac.compiler.passes.pack import pack_groups, stack_streams
from gqsac.errors import ModelError


def random_stream(rows: int, columns: int, group_size: int, bits: int, seed: int = 0) -> BsrStream:
    rng = np.random.default_rng(seed)
    keep = rng.random((rows, columns // group_size)) < 0.6
    row, col = np.nonzero(keep)
    top = 2**bits
    return BsrStream(
        rows, columns, group_size, bits,
        crow_indices=np.concatenate([[0], np.cumsum(keep.sum(1))]).astype(np.int32),
        col_indices=col.astype(np.int32),
        values=pack_values(rng.integers(0, top, (len(row), group_size)).astype(np.uint8), bits),
        scales=rng.normal(size=len(row)).astype(np.float16),
        zeros=rng.integers(0, top, len(row)).astype(np.uint8) if bits < 8 else np.full(len(row), 128, np.uint8),
    )  # fmt: skip


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_group_words_hold_scale_column_and_zero(bits):
    stream = random_stream(9, 16 * 50, 16, bits)
    words = pack_groups(stream, "x").view(np.uint32)
    assert ((words & 0xFFFF).astype(np.uint16).view(np.float16) == stream.scales).all()
    assert ((words >> 16 & 0xFFF) == stream.col_indices).all()
    assert ((words >> 28) == (stream.zeros if bits < 8 else 0)).all()


def test_8_bit_groups_with_another_zero_are_refused():
    stream = random_stream(4, 64, 16, 8)
    stream.zeros[1] = 127
    with pytest.raises(ModelError, match="layer.q_proj.*zero other than 128"):
        pack_groups(stream, "layer.q_proj")


def test_stacked_rows_stand_one_below_another():
    parts = [random_stream(rows, 96, 16, 4, seed) for seed, rows in enumerate((5, 1, 7))]
    stacked = stack_streams(parts)
    assert stacked.rows == 13 and stacked.crow_indices.dtype == np.int32
    np.testing.assert_array_equal(stacked.dequantize(), np.concatenate([part.dequantize() for part in parts]))
