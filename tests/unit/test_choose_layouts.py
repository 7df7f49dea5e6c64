"""Which layout each linear and each table gets, and what their weights are then."""

from dataclasses import replace

import numpy as np
import pytest
from gqsa_runtime.layouts import DENSE_F16, GROUP_WORDS, RECORDS

from gqsac.codec import MatrixHeader
from gqsac.compiler import ir
from gqsac.compiler.passes.choose_layouts import LayoutOptions, Weights, plan_of
from gqsac.compiler.passes.measure_linears import measure_linears
from gqsac.errors import ModelError
from tests.kernels.random_records import random_keep, random_matrix

K, VOCAB = 128, 40
FITS = MatrixHeader(rows=32, columns=K, group_size=16, quant_group_size=64, widths=(4,), nnz=32 * K // 16)


class FakeCheckpoint:
    """headers: module -> MatrixHeader; matrices: module -> QuantizedMatrix; dense: weight -> shape or array."""

    def __init__(self, headers=None, matrices=None, dense=None, streams=()):
        self.matrices, self.streams_of = matrices or {}, streams
        self.headers = {name: _header(matrix) for name, matrix in self.matrices.items()} | (headers or {})
        self.dense = {"embed.weight": (VOCAB, K), "head.weight": (VOCAB, K), **(dense or {})}

    def is_compressed(self, module):
        return module in self.headers

    def is_one_matrix(self, module):
        return module not in self.streams_of

    def matrix_header(self, module):
        return self.headers[module]

    def matrix(self, module):
        return self.matrices[module]

    def pattern(self, module):
        return self.matrices[module].row_bits, self.matrices[module].keep

    def shape(self, weight):
        found = self.dense[weight]
        return found if isinstance(found, tuple) else found.shape

    def read(self, weight):
        return self.dense[weight]


def _header(matrix):
    widths = tuple(sorted(set(matrix.row_bits.tolist())))
    return MatrixHeader(
        matrix.rows, matrix.columns, matrix.group_size, matrix.quant_group_size, widths, matrix.n_groups
    )


def linear(name, x, rows=32, k=K, weights=None, **fields):
    weights = weights or (f"{name}.weight",)
    return ir.Linear(name, name, x, weights, (None,) * len(weights), (rows,) * len(weights), k, **fields)


def graph(*ops, aliases=None):
    embedding = ir.Embedding("embed", "x", "embed.weight", VOCAB, K)
    head = linear("head", "x", VOCAB)
    return ir.Graph("Test", (embedding, *ops, head), "head", VOCAB, 32, aliases=aliases or {})


def layout_of(header, **options):
    weights = Weights(graph(), FakeCheckpoint({"a": header}), LayoutOptions(**options))
    return weights.layout(("a.weight",))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"columns": 32768, "nnz": 32 * 32768 // 16}, RECORDS),
        ({"columns": 32768 + 64, "nnz": 32 * (32768 + 64) // 16}, GROUP_WORDS),  # activations fit no kernel
        ({}, RECORDS),
        ({"quant_group_size": 128}, RECORDS),
        ({"group_size": 64}, RECORDS),
        ({"widths": (2, 3, 4, 8)}, RECORDS),
        ({"widths": (1,)}, RECORDS),
        ({"nnz": 100}, RECORDS),
        ({"nnz": 100, "widths": (2, 8)}, RECORDS),
        ({"nnz": 100, "widths": (1, 3, 4)}, RECORDS),
        ({"nnz": 100, "group_size": 64}, RECORDS),
        ({"group_size": 8}, RECORDS),  # nothing is removed: groups do not matter
        ({"quant_group_size": 16}, GROUP_WORDS),
        ({"quant_group_size": 32}, GROUP_WORDS),
        ({"nnz": 100, "group_size": 8}, GROUP_WORDS),
        ({"columns": 96, "nnz": 32 * 6}, GROUP_WORDS),
    ],
)
def test_compressed_linears(changes, expected):
    header = replace(FITS, **changes)
    if changes.get("group_size") and "nnz" not in changes:
        header = replace(header, nnz=header.rows * (header.columns // header.group_size))
    assert layout_of(header) is expected
    assert layout_of(header, head_bits=16) is expected
    assert layout_of(header, exact=True, head_bits=16) is GROUP_WORDS


def test_streams_of_version_1_stay_streams():
    weights = Weights(graph(), FakeCheckpoint({"a": FITS}, streams=("a",)), LayoutOptions())
    assert weights.layout(("a.weight",)) is GROUP_WORDS


def test_stacked_linears_share_a_layout():
    words = replace(FITS, quant_group_size=16)
    weights = Weights(graph(), FakeCheckpoint({"a": FITS, "b": FITS, "c": words}), LayoutOptions())
    assert weights.layout(("a.weight", "b.weight")) is RECORDS
    assert weights.layout(("a.weight", "c.weight")) is GROUP_WORDS


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (LayoutOptions(), RECORDS),
        (LayoutOptions(head_bits=4), RECORDS),
        (LayoutOptions(head_bits=16), DENSE_F16),
        (LayoutOptions(exact=True), DENSE_F16),
        (LayoutOptions(exact=True, head_bits=16), DENSE_F16),
    ],
)
def test_heads_tables_and_skipped_linears(options, expected):
    skipped = linear("skipped", "x")
    checkpoint = FakeCheckpoint(dense={"skipped.weight": (32, K)})
    weights = Weights(graph(skipped), checkpoint, options)
    assert weights.layout(("embed.weight",)) is weights.layout(("head.weight",)) is expected
    assert weights.layout(("skipped.weight",)) is DENSE_F16


def test_heads_that_fill_no_tiles_stay_dense():
    checkpoint = FakeCheckpoint(dense={"embed.weight": (VOCAB, 96), "head.weight": (VOCAB, K)})
    weights = Weights(graph(), checkpoint, LayoutOptions())
    assert weights.layout(("embed.weight",)) is DENSE_F16 and weights.layout(("head.weight",)) is RECORDS


def test_tables_of_positions_stay_dense():
    positions = ir.Embedding("positions", "p", "positions.weight", 32, K, source="positions")
    checkpoint = FakeCheckpoint(dense={"positions.weight": (32, K)})
    weights = Weights(graph(positions), checkpoint, LayoutOptions())
    assert weights.layout(("positions.weight",)) is DENSE_F16


def test_a_tied_head_is_its_embedding():
    tied = graph(aliases={"head.weight": "embed.weight"})
    table = np.random.default_rng(0).normal(size=(VOCAB, K)).astype(np.float16)
    weights = Weights(tied, FakeCheckpoint(dense={"embed.weight": table}), LayoutOptions())
    assert weights.layout(("head.weight",)) is weights.layout(("embed.weight",)) is RECORDS
    matrix = weights.matrix(("head.weight",))
    np.testing.assert_array_equal(matrix.levels, weights.matrix(("embed.weight",)).levels)
    assert set(matrix.row_bits) == {8} and matrix.quant_group_size == 64
    assert np.abs(matrix.dequantize() - table).max() <= np.abs(table).max() / 127
    stored_parts = measure_linears(tied, weights)
    assert stored_parts.linears["head"][0] == stored_parts.tables["embed.weight"]


def test_a_head_of_nan_is_refused():
    table = np.full((VOCAB, K), np.nan, np.float16)
    weights = Weights(graph(), FakeCheckpoint(dense={"head.weight": table}), LayoutOptions())
    with pytest.raises(ModelError, match=r"head.weight: the checkpoint holds NaN"):
        weights.matrix(("head.weight",))


@pytest.mark.parametrize("paired", [False, True])
def test_plans_made_ahead_are_those_of_the_weights(paired):
    """What the build sizes from masks alone is what it later packs."""
    matrices = {
        "a": random_matrix(32, K, 4, random_keep(32, K, "groups")),
        "b": random_matrix(32, K, 4),
    }
    weights = Weights(graph(), FakeCheckpoint(matrices=matrices), LayoutOptions())
    for names in (("a.weight",), ("b.weight",), ("a.weight", "b.weight"), ("b.weight", "a.weight")):
        ahead, made = weights.plan(names, paired), plan_of(weights.matrix(names), paired)
        assert ahead.constants == made.constants
        for field in ("order", "widths", "block", "tiles", "masked", "sizes"):
            np.testing.assert_array_equal(getattr(ahead, field), getattr(made, field))


def test_rows_of_other_widths_are_no_pairs():
    mixed = np.where(np.arange(32) % 3, 4, 2)
    matrices = {
        "a": random_matrix(32, K, mixed),
        "same": random_matrix(32, K, mixed, seed=1),
        "four": random_matrix(32, K, 4),
        "three": random_matrix(32, K, 3),
        "masked": random_matrix(32, K, 3, random_keep(32, K, "groups")),
    }
    matrices["masked"].zeros[:] = 8  # a level at 3 bits and at 4
    weights = Weights(graph(), FakeCheckpoint(matrices=matrices), LayoutOptions())

    def pairs(*names):
        return weights.can_pair(tuple(f"{name}.weight" for name in names))

    assert pairs("a", "same") and pairs("four", "four") and pairs("three", "three") and pairs("masked", "four")
    assert not pairs("a", "four") and not pairs("three", "four") and not pairs("masked", "three")
    with pytest.raises(ModelError, match="different widths"):
        weights.plan(("a.weight", "four.weight"), True)


def test_linears_of_one_kind_share_the_size_of_their_largest_record():
    matrices = {
        "a": random_matrix(32, K, 4, random_keep(32, K, "groups", 1)),
        "b": random_matrix(32, K, 4, random_keep(32, K, "groups", 2)),
        "dense": random_matrix(32, K, 4),
        "eight": random_matrix(32, K, 8),
        "two": random_matrix(32, K, 4),
    }
    matrices["a"].keep[:16, :4] = True
    checkpoint = FakeCheckpoint(matrices=matrices)
    ops = [linear(name, "x") for name in matrices]
    weights = Weights(graph(*ops), checkpoint, LayoutOptions(head_bits=16))
    stored_parts = measure_linears(graph(*ops), weights)
    parts = {name: stored_parts.linears[name][0] for name in matrices}
    alone = {name: weights.plan((f"{name}.weight",), False).constants["record_bytes"] for name in matrices}
    assert alone["a"] != alone["b"]
    shared = max(alone["a"], alone["b"])
    assert parts["a"].constants == parts["b"].constants and parts["a"].constants["record_bytes"] == shared
    assert parts["dense"].constants == parts["two"].constants != parts["eight"].constants
    assert parts["dense"].constants["record_bytes"] == alone["dense"]
    assert stored_parts.n_clusters == 3
    for name, part in parts.items():
        assert part.nnz == matrices[name].n_groups * matrices[name].group_size // 16
        assert RECORDS.check_constants({"rows": 32, "k": K, **part.constants}) is None
