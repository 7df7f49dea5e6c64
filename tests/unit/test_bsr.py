"""Packing of levels and the dense meaning of a BSR stream."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqsac.bsr import BITS, GROUP_SIZES, BsrStream, pack_values, unpack_values
from tests.unit.compress_models import random_stream


@given(st.sampled_from(BITS), st.sampled_from(GROUP_SIZES), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_unpacking_undoes_packing(bits, group_size, n, seed):
    levels = np.random.default_rng(seed).integers(0, 1 << bits, (n, group_size)).astype(np.uint8)
    packed = pack_values(levels, bits)
    assert packed.shape == (n, group_size * bits // 8)
    assert packed.dtype == np.uint8
    np.testing.assert_array_equal(unpack_values(packed, bits, group_size), levels)


def test_four_bits_stand_lowest_first():
    assert pack_values(np.array([[1, 2, 3, 15, 0, 0, 0, 8]], np.uint8), 4).tolist() == [[0x21, 0xF3, 0x00, 0x80]]


def test_three_bits_are_a_plane_of_two_and_a_plane_of_one():
    # Low bits 3 2 1 0 3 2 1 0, high bits 1 1 1 1 0 0 0 0.
    packed = pack_values(np.array([[7, 6, 5, 4, 3, 2, 1, 0]], np.uint8), 3)
    assert packed.tolist() == [[0b00011011, 0b00011011, 0b00001111]]


@pytest.mark.parametrize("bits", BITS)
def test_dequantize_matches_a_loop(bits):
    stream = random_stream(np.random.default_rng(bits), bits=bits, empty_rows=(0, 3))
    expected = np.zeros((stream.rows, stream.columns), np.float32)
    levels = unpack_values(stream.values, bits, 16)
    for row in range(stream.rows):
        for g in range(stream.crow_indices[row], stream.crow_indices[row + 1]):
            for i in range(16):
                level = int(levels[g, i]) - int(stream.zeros[g])
                expected[row, stream.col_indices[g] * 16 + i] = np.float32(level) * np.float32(stream.scales[g])
    np.testing.assert_array_equal(stream.dequantize(), expected)


def test_a_stream_without_groups_is_zero():
    nothing = np.zeros(0, np.int32)
    stream = BsrStream(
        2, 32, 16, 4, np.zeros(3, np.int32), nothing, np.zeros((0, 8), np.uint8), nothing.astype(np.float16), nothing
    )
    assert stream.nnz == 0
    np.testing.assert_array_equal(stream.dequantize(), np.zeros((2, 32), np.float32))
