"""Rounding without data: what is dropped, how the rest is coded, and what is refused."""

import numpy as np
import pytest

from gqsac.bsr import unpack_values
from gqsac.errors import InputError, ModelError
from gqsac.rounding import RoundedCheckpoint, Rounding, round_groups


class Dense:
    """A checkpoint of dense tensors, as far as RoundedCheckpoint uses one."""

    def __init__(self, **tensors):
        self.tensors = {name.replace("__", "."): array for name, array in tensors.items()}

    def shape(self, name):
        return self.tensors[name].shape

    def read(self, name):
        return self.tensors[name]


def weights(rows=12, columns=96, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def rounded(weight: np.ndarray, *options) -> RoundedCheckpoint:
    return RoundedCheckpoint(Dense(layers__0__up__weight=weight), Rounding(*options))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [8, 16, 32])
def test_kept_weights_are_within_half_a_step(bits, group_size):
    weight = weights()
    (stream,) = rounded(weight, bits, group_size).streams("layers.0.up")
    assert (stream.bits, stream.group_size, stream.nnz) == (bits, group_size, 12 * 96 // group_size)
    error = np.abs(stream.dequantize() - weight).reshape(-1, group_size).max(axis=1)
    # Half a step from rounding, and the ends of the range move by another half with the zero.
    assert (error <= 1.02 * stream.scales.astype(np.float32)).all()
    assert stream.zeros.max() < 1 << bits and (bits != 8 or (stream.zeros == 128).all())


@pytest.mark.parametrize("bits, most", [(2, 0.45), (3, 0.2), (4, 0.09), (8, 0.006)])
def test_more_bits_are_closer(bits, most):
    weight = weights()
    (stream,) = rounded(weight, bits).streams("layers.0.up")
    error = np.linalg.norm(stream.dequantize() - weight) / np.linalg.norm(weight)
    assert most / 3 < error < most


@pytest.mark.parametrize("sparsity, kept", [(0.0, 6), (0.3, 4), (0.5, 3), (0.9, 1), (0.99, 0)])
def test_the_smallest_groups_of_each_row_go(sparsity, kept):
    weight = weights()
    checkpoint = rounded(weight, 4, 16, sparsity)
    (stream,) = checkpoint.streams("layers.0.up")
    assert (np.diff(stream.crow_indices) == kept).all()
    (header,) = checkpoint.stream_headers("layers.0.up")
    assert (header.rows, header.columns, header.nnz) == (12, 96, stream.nnz)
    norms = np.square(weight.reshape(12, 6, 16)).sum(axis=2)
    for row in range(12):
        columns = stream.col_indices[stream.crow_indices[row] : stream.crow_indices[row + 1]]
        assert set(columns) == set(np.argsort(norms[row])[6 - kept :])
        assert (np.diff(columns) > 0).all()


def test_zero_is_coded_exactly():
    # A range that does not hold zero is widened, so that padding and pruned weights stay zero.
    groups = np.stack([np.linspace(3, 5, 16), np.linspace(-5, -3, 16), np.zeros(16), np.r_[0, np.full(15, 9)]])
    for bits in (2, 4):
        scales, zeros, levels = round_groups(groups.astype(np.float32), bits)
        assert np.isfinite(scales).all() and (scales > 0).all()
        values = (levels - zeros[:, None].astype(np.float32)) * scales[:, None]
        assert (values[2] == 0).all() and values[3, 0] == 0
        assert levels.dtype == np.uint8 and levels.max() < 1 << bits


def test_extreme_groups_stay_in_range():
    tiny, huge = np.full((1, 16), 1e-30, np.float32), np.full((1, 16), 60000, np.float32)
    for bits in (2, 4, 8):
        for group in (tiny, -tiny, huge, -huge):
            scales, zeros, levels = round_groups(group, bits)
            value = (levels.astype(np.float32) - zeros) * scales.astype(np.float32)
            assert np.isfinite(value).all() and np.abs(value - group).max() <= max(1e-4, 0.01 * np.abs(group).max())


def test_levels_come_back_from_the_packed_form():
    (stream,) = rounded(weights(), 3, 8).streams("layers.0.up")
    levels = unpack_values(stream.values, 3, 8)
    assert levels.max() == 7 and levels.min() == 0


def test_only_matrices_inside_numbered_blocks_are_rounded():
    dense = Dense(layers__0__up__weight=weights(), layers__0__norm__weight=np.ones(96), lm_head__weight=weights())
    four, sixteen = RoundedCheckpoint(dense, Rounding(4)), RoundedCheckpoint(dense, Rounding(16))
    assert four.is_compressed("layers.0.up")
    assert not any(four.is_compressed(name) for name in ("layers.0.norm", "lm_head"))
    assert not sixteen.is_compressed("layers.0.up")


def test_what_cannot_be_rounded_is_named():
    with pytest.raises(ModelError, match=r"layers\.0\.up: its 96 columns do not divide into groups of 64"):
        rounded(weights(), 4, 64).stream_headers("layers.0.up")
    bad = weights()
    for value in (np.nan, np.inf, -np.inf):
        bad[3, 7] = value
        with pytest.raises(ModelError, match=r"layers\.0\.up\.weight: .*NaN or infinite"):
            rounded(bad).streams("layers.0.up")
    bad[3, 7] = -1e7
    with pytest.raises(ModelError, match=r"layers\.0\.up\.weight: its largest weight is 1e\+07"):
        rounded(bad).streams("layers.0.up")


@pytest.mark.parametrize(
    "options, message",
    [
        ((5,), "--bits is 5"),
        ((4, 24), "--group-size is 24; choose from 8, 16, 32, 64, 128"),
        ((4, 16, 1.0), "--sparsity is 1.0"),
        ((4, 16, -0.5), "--sparsity is -0.5"),
        ((4, 16, float("nan")), "--sparsity is nan"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(InputError, match=message):
        Rounding(*options)


def test_the_options_are_recorded():
    assert Rounding(8, 32, 0.25).as_dict() == {"bits": 8, "group_size": 32, "sparsity": 0.25}
