"""Weight layouts: one matrix of tests for all of them, and what is special to each."""

from pathlib import Path

import numpy as np
import pytest
from gqsa_runtime.errors import ModelError
from gqsa_runtime.layouts import DENSE_F16, GROUP_WORDS, LAYOUTS, RECORDS, records
from gqsa_runtime.layouts.records import make_plan

from tests.kernels.random_records import random_keep, random_matrix
from tests.unit.random_streams import random_stream

TEMPLATES = Path(__file__).resolve().parents[2] / "templates"
DTYPES = {"i8": np.int8, "i32": np.int32, "f16": np.float16}


def _cases():
    """(layout, params, source, groups in the file, dense weights) of every layout."""
    weight = np.random.default_rng(0).normal(size=(5, 24)).astype(np.float16)
    yield pytest.param(DENSE_F16, {"rows": 5, "k": 24}, weight, 0, weight.astype(np.float32), id="dense")
    for bits in GROUP_WORDS.kernel_bits:
        for group_size in (8, 16, 128):
            for kept in (1.0, 0.6, 0.0):
                stream = random_stream(9, 1280, group_size, bits, kept)
                params = {"rows": 9, "k": 1280, "group_size": group_size, "bits": bits, "n_tasks": 4}
                yield pytest.param(
                    GROUP_WORDS,
                    params,
                    stream,
                    max(stream.nnz, 1),
                    stream.dequantize(),
                    id=f"w{bits} g{group_size} {kept}",
                )
    for name, source in _record_sources():
        matrix, plan = source
        dense = np.where(matrix.row_bits[:, None] > 0, matrix.dequantize(), 0)
        epilogue = "gated" if name.endswith("pairs") else "rows"
        params = {"rows": matrix.rows, "k": matrix.columns, "epilogue": epilogue, **plan.constants}
        yield pytest.param(RECORDS, params, source, (len(plan.block), plan.sizes.sum()), dense, id=f"records {name}")


def _record_sources():
    """(name, (matrix, plan)): rows that fill no block beside whole ones, tiles that fill no record."""
    shapes = ((16, 256), (16, 64), (37, 320), (5, 1024 + 192))
    for rows, columns in shapes:
        for width in records.WIDTHS:
            yield f"w{width} {rows}x{columns}", record_source(rows, columns, width)
    for pattern in ("groups", "tiles", "skewed", "empty"):
        for width in records.MASKED_WIDTHS:
            yield f"w{width} {pattern}", record_source(37, 704, width, pattern)
    mixed = np.random.default_rng(3).choice((0, *records.WIDTHS), 60)
    yield "mixed", record_source(60, 320, mixed)
    yield "mixed pairs", record_source(60, 320, np.tile(mixed[:30], 2), pairs=True)
    yield "mixed masked pairs", record_source(60, 320, np.tile(2 * (mixed[:30] // 2), 2), "groups", pairs=True)
    yield "pairs", record_source(38, 320, 4, "groups", pairs=True)
    yield "q128", record_source(20, 256, 3, quant_group_size=128)


def record_source(rows, columns, widths, pattern="all", pairs=False, quant_group_size=64):
    """(QuantizedMatrix, Plan). pairs: row r of the first half and of the second stand together."""
    keep = random_keep(rows, columns, pattern, seed=rows)
    matrix = random_matrix(rows, columns, widths, keep, quant_group_size, seed=columns)
    halves = np.arange(rows, dtype=np.int32).reshape(2, -1).T if pairs else None
    return matrix, make_plan(matrix.row_bits, columns, keep, halves)


CASES = list(_cases())


def packed(layout, params, source) -> dict:
    return {part.name: layout.pack(part.name, source, params) for part in layout.parts}


def broken(layout, params, n_groups, arrays) -> dict[str, str]:
    """What the layout's rules say of arrays, by part; parts that need a broken one are not asked."""
    said = {}
    for name, rule in layout.rules(params, n_groups).items():
        if not said.keys() & set(rule.needs):
            wrong = rule.broken(arrays[name], *(arrays[need] for need in rule.needs))
            said |= {name: wrong} if wrong else {}
    return said


def test_every_layout_is_in_the_matrix():
    assert {case.values[0] for case in CASES} == set(LAYOUTS)


@pytest.mark.parametrize(("layout", "params", "source", "n_groups", "dense"), CASES)
def test_packed_weights(layout, params, source, n_groups, dense):
    arrays = packed(layout, params, source)
    shapes = layout.shapes(params, n_groups)
    for part in layout.parts:
        assert arrays[part.name].shape == shapes[part.name] and arrays[part.name].dtype == DTYPES[part.dtype]
    assert sum(array.nbytes for array in arrays.values()) == layout.n_bytes(params, n_groups)
    np.testing.assert_array_equal(layout.unpack(arrays, params), dense)

    held = {name: array.size for name, array in arrays.items()}
    assert layout.count_groups(params, held) == n_groups
    assert layout.check_constants(params) is None and layout.check_sizes(params, held) is None
    assert not broken(layout, params, n_groups, arrays)
    for name in held:
        for longer in {**arrays, name: np.append(arrays[name], arrays[name][-1:])}, {**arrays, name: arrays[name][:-1]}:
            sizes = {part: array.size for part, array in longer.items()}
            wrong = layout.check_sizes(params, sizes)
            if arrays[name].size and wrong is None:  # it is this part that tells how many groups there are
                assert broken(layout, params, layout.count_groups(params, sizes), longer)
            elif arrays[name].size:
                assert "elements, expected" in wrong
    for name in layout.rules(params, n_groups):
        if arrays[name].size:
            assert name in broken(layout, params, n_groups, {**arrays, name: np.full_like(arrays[name], -1)})


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.op)
def test_kernel_headers_exist(layout):
    for family, header in layout.headers.items():
        assert (TEMPLATES / family / "include" / header).is_file()
        suffix = {"cuda": "cu", "cpu": "c"}[family]
        # What is its decode's or its prefill's alone may have a header of its own, which includes the common one.
        assert f'#include "{Path(header).stem}' in (TEMPLATES / family / f"{layout.op}.{suffix}.j2").read_text()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_group_words_hold_scale_column_and_zero(bits):
    stream = random_stream(9, 16 * 50, 16, bits)
    words = GROUP_WORDS.pack("groups", stream, {}).view(np.uint32)
    assert ((words & 0xFFFF).astype(np.uint16).view(np.float16) == stream.scales).all()
    assert ((words >> 16 & 0xFFF) == stream.col_indices).all()
    assert ((words >> 28) == (stream.zeros if bits < 8 else 0)).all()


def test_8_bit_groups_with_another_zero_are_refused():
    stream = random_stream(4, 64, 16, 8)
    stream.zeros[1] = 127
    with pytest.raises(ModelError, match="zero other than 128"):
        GROUP_WORDS.pack("groups", stream, {})


def test_group_words_index_4096_groups_of_a_row():
    params = {"rows": 1, "group_size": 16, "bits": 4, "n_tasks": 1}
    assert GROUP_WORDS.check_constants({**params, "k": 16 * 4096}) is None
    assert "4096 whole groups of 16" in GROUP_WORDS.check_constants({**params, "k": 16 * 4097})
    assert "whole groups" in GROUP_WORDS.check_constants({**params, "k": 40})


def test_constants_of_records():
    _, plan = record_source(37, 320, 4, "groups")
    good = {"rows": 37, "k": 320, **plan.constants}
    assert good | {"n_blocks": 3, "widths": 0, "masked_widths": 1 << 4, "whole": False} == good
    assert RECORDS.check_constants(good) is None
    assert record_source(16, 256, 4)[1].constants == {
        "n_blocks": 1, "widths": 1 << 4, "masked_widths": 0, "whole": True,
        "record_bytes": 4 * 32 + 4 * 8 + 4 * 512,
    }  # fmt: skip
    bare = {"rows": 16, "k": 256, **record_source(16, 256, 4)[1].constants}
    assert RECORDS.check_constants({**bare, "rows": 16 * 1000, "n_blocks": 1000}) is None
    for changes, message in (
        ({"k": 320}, "k is 320, expected whole records of 256 columns"),
        ({"record_bytes": 2224}, "record_bytes is 2224, expected 2208 for four tiles of 4 bits"),
        ({"n_blocks": 1 << 26}, f"n_blocks is {1 << 26}, whose records take {1 << 35} bytes or more"),
    ):
        assert message in RECORDS.check_constants({**bare, **changes})
    for changes, message in (
        ({"k": 352}, "k is 352, expected whole tiles of 64"),
        ({"k": 64 << 15}, "below 32768"),
        ({"n_blocks": 2}, "n_blocks is 2, expected blocks of 16 rows that hold 37"),
        ({"n_blocks": 1 << 27}, f"n_blocks is {1 << 27}"),
        ({"record_bytes": 24}, "record_bytes is 24, expected a multiple of 16"),
        ({"record_bytes": records.MAX_RECORD_BYTES + 16}, f"up to {records.MAX_RECORD_BYTES}"),
        ({"widths": 1 << 5}, "widths is 32, expected bits 1, 2, 3, 4, 8 alone"),
        ({"widths": 1}, "widths is 1"),
        ({"masked_widths": 1 << 3}, "masked_widths is 8, expected bits 2, 4, 8 alone"),
        ({"masked_widths": 1 << 9}, "masked_widths is 512"),
    ):
        assert message in RECORDS.check_constants({**good, **changes})


@pytest.mark.parametrize("width", records.WIDTHS)
def test_a_linear_of_one_width_needs_neither_headers_nor_starts(width):
    rows, columns = 37, 768
    matrix, plan = record_source(rows, columns, width)
    params = {"rows": rows, "k": columns, **plan.constants}
    assert records.is_bare(params) and params["record_bytes"] == 4 * (32 + 8 + 128 * width)
    arrays = packed(RECORDS, params, (matrix, plan))
    assert arrays["starts"].size == 0 and arrays["records"].size == 3 * 3 * params["record_bytes"]
    assert plan.n_bytes == sum(array.nbytes for array in arrays.values())
    # The bytes are those of the records that the first block has beside others, without their headers.
    others = np.full(16, 4 if width == 8 else 8, np.uint8)
    taken = matrix.rows - 5  # two whole blocks
    mixed = random_matrix(taken + 16, columns, np.append(np.full(taken, width, np.uint8), others))
    for name in ("levels", "scales", "zeros"):
        getattr(mixed, name)[:taken] = getattr(matrix, name)[:taken]
    with_headers = make_plan(mixed.row_bits, columns)
    assert not records.is_bare(with_headers.constants)
    block = int(np.flatnonzero(with_headers.widths == width)[0])
    first = int(np.flatnonzero(with_headers.block == block)[0])
    starts = RECORDS.pack("starts", (mixed, with_headers), {"k": columns, **with_headers.constants})
    data = RECORDS.pack("records", (mixed, with_headers), {"k": columns, **with_headers.constants})
    for i in range(6):
        record = data[starts[first + i] * 16 + 16 : starts[first + i + 1] * 16]
        assert (record == arrays["records"][i * record.size : (i + 1) * record.size]).all()


@pytest.mark.parametrize(
    ("columns", "widths", "pattern"), [(192, 4, "all"), (576, 4, "all"), (512, "two", "all"), (512, 4, "groups")]
)
def test_other_linears_have_headers(columns, widths, pattern):
    matrix, plan = record_source(32, columns, np.repeat([2, 4], 16) if widths == "two" else widths, pattern)
    assert not records.is_bare(plan.constants)
    params = {"rows": 32, "k": columns, **plan.constants}
    assert RECORDS.pack("starts", (matrix, plan), params).size == len(plan.block) + 1


def test_the_largest_record():
    _, plan = record_source(16, 256, 8, "groups")
    assert plan.constants["record_bytes"] <= records.MAX_RECORD_BYTES
    keep = np.ones((16, 16), bool)
    keep[0, 0] = False
    matrix = random_matrix(16, 256, 8, keep)
    plan = make_plan(matrix.row_bits, 256, keep)
    assert plan.constants["record_bytes"] == records.MAX_RECORD_BYTES - 16  # what the removed group would take


def test_what_records_cannot_hold():
    ones = np.ones((16, 4), bool)
    some = ones.copy()
    some[3, 2] = False
    with pytest.raises(ModelError, match="100 columns are no whole tiles of 64"):
        make_plan(np.full(16, 4, np.uint8), 100)
    for width in (1, 3):
        with pytest.raises(ModelError, match="2, 4 or 8 bits only"):
            make_plan(np.full(16, width, np.uint8), 64, some)
        assert not make_plan(np.full(16, width, np.uint8), 64, ones).masked.any()
    pairs = np.stack([np.arange(8), np.arange(8) + 8], 1)
    with pytest.raises(ModelError, match="different widths"):
        make_plan(np.repeat([4, 3], 8).astype(np.uint8), 64, None, pairs)


def test_zeros_between_levels_and_a_mask_exclude_each_other():
    matrix, plan = record_source(16, 64, 2, "groups")
    params = {"rows": 16, "k": 64, **plan.constants}
    for fine in (0, 4, 8, 12):
        matrix.zeros[5, 0] = fine
        RECORDS.pack("records", (matrix, plan), params)
    for between in (1, 2, 3, 6):
        matrix.zeros[5, 0] = between
        with pytest.raises(ModelError, match="zeros must be levels"):
            RECORDS.pack("records", (matrix, plan), params)
    whole, plan = record_source(16, 64, 2)
    assert (whole.zeros & 3).any()
    RECORDS.pack("records", (whole, plan), {"rows": 16, "k": 64, **plan.constants})


def test_tiles_without_groups_are_not_stored_and_full_ones_have_no_mask():
    keep = np.ones((32, 20), bool)
    keep[:16, 4:8] = False  # one tile of the first block
    keep[20, 17] = False  # one group of the second block, in its fifth tile
    plan = make_plan(np.full(32, 4, np.uint8), 320, keep)
    assert plan.block.tolist() == [0, 1, 1]
    assert plan.tiles.tolist() == [[0, 2, 3, 4], [0, 1, 2, 3], [4, -1, -1, -1]]
    assert plan.masked.tolist() == [False, False, True]


def test_rows_of_a_width_stand_together_and_pairs_eight_apart():
    bits = np.array([4, 8, 2, 4, 8, 2, 2, 4, 8, 2, 2, 4], np.uint8)
    plan = make_plan(bits, 64)
    assert plan.widths.tolist() == [8, 4, 2]
    assert [block[block >= 0].tolist() for block in plan.order.reshape(-1, 16)] == [
        [1, 4, 8], [0, 3, 7, 11], [2, 5, 6, 9, 10],
    ]  # fmt: skip
    order = make_plan(np.full(20, 4, np.uint8), 64, None, np.arange(20).reshape(2, 10).T).order.reshape(-1, 2, 8)
    assert order[0].tolist() == [list(range(8)), list(range(10, 18))]
    assert order[1].tolist() == [[8, 9] + [-1] * 6, [18, 19] + [-1] * 6]


def test_weights_in_records_are_counted_where_sizes_tell():
    for rows, widths, pattern, expected in ((32, 4, "all", 32 * 256), (32, 4, "groups", None)):
        matrix, plan = record_source(rows, 256, widths, pattern)
        params = {"rows": rows, "k": 256, **plan.constants}
        assert RECORDS.n_weights(params, (len(plan.block), int(plan.sizes.sum()))) == expected
        assert RECORDS.n_weights(params, matrix.n_groups) == 16 * matrix.n_groups


@pytest.mark.parametrize(
    ("name", "source"), _record_sources(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_records_tell_the_widths_of_their_rows_by_sizes_alone(name, source):
    matrix, plan = source
    params = {"rows": matrix.rows, "k": matrix.columns, **plan.constants}
    found = RECORDS.rows_by_width(params, lambda part: RECORDS.pack(part, source, params))
    empty = (np.bincount(plan.block, minlength=len(plan.widths)) == 0).any()
    if plan.masked.any() or empty:
        assert found is None
    else:
        widths, rows = np.unique(matrix.row_bits, return_counts=True)
        assert found == dict(zip(widths.tolist(), rows.tolist(), strict=True))


def test_mixed_rows_without_masks_are_told_apart():
    source = record_source(60, 320, np.random.default_rng(1).choice(records.WIDTHS, 60))
    params = {"rows": 60, "k": 320, **source[1].constants}
    found = RECORDS.rows_by_width(params, lambda part: RECORDS.pack(part, source, params))
    assert len(found) == 5 and sum(found.values()) == 60
    assert all((source[0].row_bits == width).sum() == rows for width, rows in found.items())
