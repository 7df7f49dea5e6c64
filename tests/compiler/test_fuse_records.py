"""Norms and gates move into linears over records where they may, and only there."""

from dataclasses import replace

import pytest

from gqsac.compiler import ir
from gqsac.compiler.passes.fuse_records import fuse_gates, fuse_norms, fuse_records
from tests.compiler.test_fuse import add, graph, linear, outputs

W = 8


def rms(name: str, x: str, **fields) -> ir.RMSNorm:
    return ir.RMSNorm(name, name, x, f"{name}.weight", **{"width": W, "eps": 1e-5, **fields})


def layer_norm(name: str, x: str) -> ir.LayerNorm:
    return ir.LayerNorm(name, name, x, f"{name}.weight", f"{name}.bias", W, 1e-5)


def piece(name: str, x: str, start: int, width: int = W) -> ir.Slice:
    return ir.Slice(name, name, x, start, width)


def gated(gate="g", up="u", width=W, name="m") -> ir.GatedActivation:
    return ir.GatedActivation(name, name, gate, up, width, "silu")


def everything(op: ir.Linear) -> bool:
    return op.output != "head"


HALVES = (linear("f", "x", 2 * W), piece("g", "f", 0), piece("u", "f", W))


@pytest.mark.parametrize("norm", [rms("n", "x"), layer_norm("n", "x")], ids=["rms", "layer"])
def test_a_norm_moves_into_the_linear_behind_it(norm):
    fused = fuse_norms(graph(norm, linear("f", "n")), everything)
    assert outputs(fused) == ["x", "f", "head"]
    assert fused.ops[1] == replace(linear("f", "x"), norm=norm)


def test_a_norm_moves_into_each_of_its_readers():
    fused = fuse_norms(graph(rms("n", "x"), linear("f", "n"), linear("g", "n"), add("a", "f", "g")), everything)
    assert outputs(fused) == ["x", "f", "g", "a", "head"]
    assert fused.ops[1].norm == fused.ops[2].norm == rms("n", "x") and fused.ops[2].x == "x"


def test_the_norm_before_the_head_moves_too():
    fused = fuse_norms(graph(rms("n", "x")), lambda op: True)
    assert outputs(fused) == ["x", "head"] and fused.ops[1].norm == rms("n", "x")


def test_a_residual_is_no_obstacle_unless_it_is_the_norm():
    fused = fuse_norms(graph(rms("n", "x"), linear("f", "n", residual="x")), everything)
    assert outputs(fused) == ["x", "f", "head"] and fused.ops[1].residual == "x"


@pytest.mark.parametrize(
    "ops",
    [
        (rms("n", "x"), linear("f", "n"), add("a", "n", "f")),  # read by something else too
        (rms("n", "x"), linear("f", "n", residual="n")),
        (rms("n", "x"), linear("f", "n"), linear("g", "f", residual="n")),
        (rms("n", "x"), linear("f", "n"), linear("words", "n"), add("a", "f", "words")),  # a linear that is no record
        (rms("n", "x"), linear("words", "n")),
        (rms("n", "x", width=W // 2, heads=2), linear("f", "n")),  # of slices
        (rms("n", "x"), piece("s", "n", 0), linear("f", "s")),
        (add("n", "x", "x"), linear("f", "n")),
    ],
)
def test_a_norm_stays_apart(ops):
    before = graph(*ops)
    assert fuse_norms(before, lambda op: op.output not in ("head", "words")) == before


def test_a_gate_moves_into_the_linear_that_makes_its_halves():
    fused = fuse_gates(graph(*HALVES, gated()), everything)
    assert outputs(fused) == ["x", "m", "head"]
    made = fused.ops[1]
    assert (made.gated, made.activation, made.n_rows, made.width) == (True, "silu", 2 * W, W)


@pytest.mark.parametrize(
    "ops",
    [
        (*HALVES, gated("u", "g")),  # the halves the other way round
        (*HALVES, gated(), linear("h", "f", W, 2 * W), add("a", "m", "h")),  # the linear has another reader
        (*HALVES, piece("s", "f", 4), gated(), add("a", "m", "s")),  # and another slice
        (linear("f", "x", 3 * W), piece("g", "f", 0), piece("u", "f", W), gated()),  # thirds
        (linear("f", "x", 2 * W), piece("g", "f", 0, 4), piece("u", "f", W, 4), gated(width=4)),
        (linear("g", "x"), linear("u", "x"), gated()),  # two linears
        (linear("e", "x", 2 * W), *HALVES[:2], piece("u", "e", W), gated()),  # halves of two
        (linear("words", "x", 2 * W), piece("g", "words", 0), piece("u", "words", W), gated()),
    ],
)
def test_a_gate_stays_apart(ops):
    before = graph(*ops)
    assert fuse_gates(before, lambda op: op.output not in ("head", "words")) == before


def test_both_at_once_and_twice():
    before = graph(rms("n", "x"), linear("f", "n", 2 * W), *HALVES[1:], gated())
    fused = fuse_records(before, everything, everything)
    assert outputs(fused) == ["x", "m", "head"] and fused.ops[1].norm and fused.ops[1].gated
    assert fuse_records(fused, everything, everything) == fused
    assert fuse_records(before, lambda op: False, everything) == before
    apart = fuse_records(before, everything, lambda op: False)  # rows that fit no block together
    assert outputs(apart) == ["x", "f", "g", "u", "m", "head"] and apart.ops[1].norm and not apart.ops[1].gated
