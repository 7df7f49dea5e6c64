"""The stored form of a matrix: it comes back, in few and canonical bytes, and one refusal per rule."""

import itertools

import numpy as np
import pytest

from gqsac import codec
from gqsac.errors import FormatError
from gqsac.quantized_matrix import ROW_BITS
from tests.unit.damage import change, put
from tests.unit.random_matrices import random_matrix

SIZES = [(g, q) for g, q in itertools.product((8, 16, 32, 64, 128), (16, 32, 64, 128)) if g % q == 0 or q % g == 0]


def unpack(tensors, matrix):
    shape = matrix.rows, matrix.columns
    return codec.unpack(tensors, shape, matrix.group_size, matrix.quant_group_size, "model/: tensor up_proj")


def check_round_trip(matrix):
    tensors = codec.pack(matrix)
    found = unpack(tensors, matrix)
    np.testing.assert_array_equal(found.dequantize(), matrix.dequantize())
    np.testing.assert_array_equal(found.row_bits, matrix.row_bits)
    keep = np.ones((matrix.rows, matrix.columns // matrix.group_size), bool) if matrix.keep is None else matrix.keep
    np.testing.assert_array_equal(keep if found.keep is None else found.keep, keep)
    columns = np.repeat(keep, matrix.group_size, axis=1)
    np.testing.assert_array_equal(found.levels, np.where(columns, matrix.levels, 0))
    for part in ("levels", "scales", "zeros"):
        assert getattr(found, part).dtype == getattr(matrix, part).dtype
    shape = matrix.rows, matrix.columns
    sizes = matrix.group_size, matrix.quant_group_size
    header = codec.header(codec.array_headers(tensors), shape, *sizes, "up_proj")
    assert header == codec.MatrixHeader(*shape, *sizes, tuple(sorted(set(matrix.row_bits.tolist()))), matrix.n_groups)
    again = codec.pack(found)
    assert again.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)
        assert array.flags.c_contiguous and array.dtype == (np.float16 if name == "scales" else np.uint8)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("widths", [*((bits,) for bits in ROW_BITS), (2, 8), ROW_BITS])
def test_matrices_come_back(sizes, widths):
    for seed, (rows, kept) in enumerate(itertools.product((1, 7, 32), (1, 0.6, 0.02, 0))):
        check_round_trip(random_matrix(rows, 384, *sizes, widths, kept, seed))


def test_empty_rows_of_a_width_of_their_own():
    matrix = random_matrix(6, 128, 16, 64, (4,))
    matrix.row_bits[2], matrix.keep[2], matrix.keep[5] = 3, False, False
    assert codec.pack(matrix)["levels.3"].shape == (0, 6)
    check_round_trip(matrix)


def test_a_mask_of_all_groups_is_not_stored():
    matrix = random_matrix(5, 128, 16, 64, kept=2)
    assert matrix.keep.all() and "keep" not in codec.pack(matrix)
    check_round_trip(matrix)


def test_what_removed_groups_held_leaves_no_trace():
    first, second = (random_matrix(5, 256, 16, 64, kept=0.3) for _ in range(2))
    second.levels[~np.repeat(second.keep, 16, axis=1)] ^= 255
    second.scales[~second.keep.reshape(5, 4, 4).any(2)] = np.nan
    for name, array in codec.pack(first).items():
        np.testing.assert_array_equal(codec.pack(second)[name], array, err_msg=name)


@pytest.mark.parametrize(
    "widths, group_size, kept, most",
    [((4,), 64, 1, 4.32), ((4,), 16, 0.5, 2.40), ((2,), 64, 1, 2.32), ((1,), 64, 1, 1.32)],
)
def test_bits_per_weight(widths, group_size, kept, most):
    matrix = random_matrix(512, 4096, group_size, 64, widths, kept)
    assert 8 * sum(array.nbytes for array in codec.pack(matrix).values()) / matrix.levels.size <= most


@pytest.mark.parametrize(
    "part, value, message", [
        ("row_bits", 5, "rows have \\[4, 5\\] bits"), ("levels", 16, "a level of 4 bits is 16"),
        ("scales", np.inf, "a scale is not finite"), ("zeros", 16, "a zero is 16 sixteenths"),
    ],
)  # fmt: skip
def test_matrices_out_of_range_are_not_stored(part, value, message):
    matrix = random_matrix(5, 128, 16, 64, kept=1)
    getattr(matrix, part).reshape(-1)[3] = value
    with pytest.raises(ValueError, match=message):
        codec.pack(matrix)


def drop(name):
    return lambda tensors: tensors.pop(name)


def add(name, array):
    return lambda tensors: tensors.update({name: array})


def flipped(bit):
    return lambda array: array ^ np.array([0] * (len(array) - 1) + [1 << bit], np.uint8)


# Of 5 rows of 12 groups of 16 columns, 4 scale groups a row: 60 groups, so 4 bits of the mask are unused.
DAMAGES = {
    "levels of another type": (change("levels.4", lambda a: a.view(np.int8)), "levels.4 is of type int8, expected U8"),
    "levels of another rank": (change("levels.4", np.ravel), "levels.4 has shape .*, expected 2 dimensions"),
    "levels of no width": (add("levels.5", np.zeros((0, 10), np.uint8)), "levels.5 is of no known width"),
    "a width written otherwise": (add("levels.04", np.zeros((0, 8), np.uint8)), "levels.04 is of no known width"),
    "levels of another group size": (change("levels.4", lambda a: a[:, :7].copy()), "7 bytes a group, expected 8"),
    "no levels": (drop("levels.4"), "levels.<bits> is missing"),
    "too few levels": (change("levels.4", lambda a: a[1:]), "levels.4 has 17 groups, but keep has 18"),
    "levels of another width too": (add("levels.2", np.zeros((0, 4), np.uint8)), "row_bits is missing"),
    "widths beside one width": (add("row_bits", np.full(5, 4, np.uint8)), "row_bits is there, but .* 1 width"),
    "mask of another type": (change("keep", lambda a: a.view(bool)), "keep is of type bool, expected U8"),
    "mask of another rank": (change("keep", lambda a: a[None]), "keep has shape \\[1, 8\\], expected 1 dim"),
    "mask too short": (change("keep", lambda a: a[1:]), "keep has 7 entries, expected 8: a bit for each of 60 groups"),
    "mask with other groups": (change("keep", lambda a: np.full_like(a, 0)), "levels.4 has 18 groups, but keep has 0"),
    "mask with bits beyond": (change("keep", flipped(7)), "keep has bits beyond its 60 groups"),
    "mask where all is kept": (change("levels.4", lambda a: np.zeros((60, 8), np.uint8)), "expected no mask"),
    "no mask": (drop("keep"), "scales has .* entries, expected 20"),
    "scales of another type": (change("scales", lambda a: a.astype(np.float32)), "scales is of type float32"),
    "scales of another rank": (change("scales", lambda a: a[None]), "scales has shape"),
    "no scales": (drop("scales"), "scales is missing"),
    "too few scales": (change("scales", lambda a: a[:-1]), "scales has 13 entries, expected 14"),
    "too many scales": (
        lambda t: t.update(scales=np.ones(18, np.float16), zeros=np.zeros(9, np.uint8)), "18 entries, expected 14"),
    "scale is NaN": (change("scales", put(0, np.nan)), "scales holds a NaN"),
    "scale is infinite": (change("scales", put(0, -np.inf)), "scales holds a NaN or an infinity"),
    "zeros of another type": (change("zeros", lambda a: a.astype(np.int32)), "zeros is of type I32"),
    "zeros of another rank": (change("zeros", lambda a: a[None]), "zeros has shape"),
    "no zeros": (drop("zeros"), "zeros is missing"),
    "too few zeros": (change("zeros", lambda a: a[:-1]), "zeros has 6 entries, expected 7: half a byte for each of 14"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_tensors_are_refused_by_name(name):
    matrix = random_matrix(5, 192, 16, 48, kept=0.4, seed=4)
    assert (matrix.n_groups, len(codec.pack(matrix)["scales"])) == (18, 14)
    apply, message = DAMAGES[name]
    tensors = codec.pack(matrix)
    apply(tensors)
    with pytest.raises(FormatError, match=f"model/: tensor up_proj.*{message}"):
        unpack(tensors, matrix)


WIDTH_DAMAGES = {
    "too few widths": (change("row_bits", lambda a: a[1:]), "row_bits has 4 entries, expected 5: one per row"),
    "width of no levels": (change("row_bits", put(0, 3)), "row_bits holds .*, but the levels are of \\[2, 4\\] bits"),
    "width of no row": (change("row_bits", lambda a: np.full_like(a, 4)), "row_bits holds \\[4\\], but"),
    "other rows' widths": (change("row_bits", lambda a: put(1, 4)(a)), "groups, but row_bits asks for"),
    "no widths": (drop("row_bits"), "row_bits is missing, but the levels are of 2 width"),
    "not all levels": (change("levels.4", lambda a: a[1:]), "levels.* have 59 groups, but without .*keep all 60"),
    "half a zero beyond the last": (change("zeros", flipped(4)), "zeros has a last half byte of 1 that belongs to no"),
}


@pytest.mark.parametrize("name", WIDTH_DAMAGES)
def test_damaged_tensors_of_mixed_rows_are_refused_by_name(name):
    matrix = random_matrix(5, 192, 16, 192, (2, 4), kept=1, seed=2)
    assert matrix.row_bits.tolist() == [4, 2, 2, 2, 2]
    apply, message = WIDTH_DAMAGES[name]
    tensors = codec.pack(matrix)
    apply(tensors)
    with pytest.raises(FormatError, match=f"model/: tensor up_proj.*{message}"):
        unpack(tensors, matrix)
