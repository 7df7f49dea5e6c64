"""Weight layouts: one matrix of tests for all of them, and what is special to each."""

from pathlib import Path

import numpy as np
import pytest
from gqsa_runtime.errors import ModelError
from gqsa_runtime.layouts import DENSE_F16, GROUP_WORDS, LAYOUTS

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


CASES = list(_cases())


def packed(layout, params, source) -> dict:
    return {part.name: layout.pack(part.name, source, params) for part in layout.parts}


def test_every_layout_is_in_the_matrix():
    assert {case.values[0] for case in CASES} == set(LAYOUTS.values())


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
    for name in held:
        wrong = layout.check_sizes(params, {**held, name: held[name] + 1})
        assert wrong and "elements, expected" in wrong
    for name, rule in layout.rules(params, n_groups).items():
        assert rule.broken(arrays[name]) is None
        assert rule.broken(np.full_like(arrays[name], -1))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.op)
def test_kernel_headers_exist(layout):
    for family, header in layout.headers.items():
        assert (TEMPLATES / family / "include" / header).is_file()
        suffix = {"cuda": "cu", "cpu": "c"}[family]
        assert header in (TEMPLATES / family / f"{layout.op}.{suffix}.j2").read_text()


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
