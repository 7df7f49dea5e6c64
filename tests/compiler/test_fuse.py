"""Each fusion fires where it may and only there."""

import pytest

from gqsac.compiler import ir
from gqsac.compiler.passes.fuse import (
    fuse,
    fuse_activations,
    fuse_gated_activations,
    fuse_residuals,
    remove_dead,
    stack_siblings,
)


def linear(name: str, x: str, rows: int = 8, k: int = 8, **fields) -> ir.Linear:
    return ir.Linear(name, name, x, (f"{name}.weight",), (None,), (rows,), k, **fields)


def graph(*ops: ir.Op) -> ir.Graph:
    """The operators between an embedding `x` and a head that reads the last of them."""
    embedding = ir.Embedding("embed", "x", "embed.weight", 11, 8)
    head = linear("head", ops[-1].output, 11, ir.width(ops[-1]))
    result = ir.Graph("Test", (embedding, *ops, head), "head", 11, 32)
    ir.verify(result)
    return result


def outputs(fused: ir.Graph) -> list[str]:
    ir.verify(fused)
    return [op.output for op in fused.ops]


def activation(name: str, a: str, function: str = "relu") -> ir.Elementwise:
    return ir.Elementwise(name, name, function, a, 8)


def add(name: str, a: str, b: str) -> ir.Elementwise:
    return ir.Elementwise(name, name, "add", a, 8, b)


def mul(name: str, a: str, b: str) -> ir.Elementwise:
    return ir.Elementwise(name, name, "mul", a, 8, b)


@pytest.mark.parametrize("swapped", [False, True])
def test_gate_and_up_fuse_in_either_order(swapped):
    factors = ("u", "s") if swapped else ("s", "u")
    fused = fuse_gated_activations(graph(linear("g", "x"), activation("s", "g"), linear("u", "x"), mul("m", *factors)))
    assert outputs(fused) == ["x", "g", "u", "m", "head"]
    assert fused.ops[3] == ir.GatedActivation("m", "m", "g", "u", 8, "relu")


def test_activation_with_a_second_reader_stays():
    before = graph(linear("g", "x"), activation("s", "g"), mul("m", "s", "x"), add("a", "m", "s"))
    assert fuse_gated_activations(before) == before


def test_square_of_an_activation_is_no_gate():
    before = graph(linear("g", "x"), activation("s", "g"), mul("m", "s", "s"))
    assert fuse_gated_activations(before) == before


def test_siblings_stack_as_long_as_they_may():
    before = graph(
        linear("a.q", "x"), linear("a.k", "x"), linear("a.v", "x"), add("m", "a.q", "a.k"), add("n", "m", "a.v")
    )
    asked = []

    def can_stack(names):
        asked.append(names)
        return "a.v.weight" not in names

    fused = stack_siblings(before, can_stack)
    assert outputs(fused) == ["x", "a.q_stacked", "a.q", "a.k", "a.v", "m", "n", "head"]
    assert fused.ops[1].weights == ("a.q.weight", "a.k.weight")
    assert fused.ops[1].rows == (8, 8)
    assert [(op.x, op.start, op.width) for op in fused.ops[2:4]] == [("a.q_stacked", 0, 8), ("a.q_stacked", 8, 8)]
    assert asked == [("a.q.weight", "a.k.weight"), ("a.q.weight", "a.k.weight", "a.v.weight")]


def test_linears_of_other_modules_or_inputs_do_not_stack():
    before = graph(
        linear("a.q", "x"), linear("b.k", "x"), linear("a.v", "a.q"), add("m", "b.k", "a.v"), add("n", "m", "x")
    )
    assert stack_siblings(before, lambda names: True) == before


def test_the_head_never_stacks():
    before = graph(linear("other", "x"), add("m", "other", "x"))
    twin = ir.Graph("Test", (*before.ops[:-1], linear("head", "x", 11)), "head", 11, 32)
    assert stack_siblings(twin, lambda names: True) == twin


def test_activation_joins_the_linear_it_alone_reads():
    fused = fuse_activations(graph(linear("f", "x"), activation("r", "f")))
    assert outputs(fused) == ["x", "r", "head"]
    assert (fused.ops[1].name, fused.ops[1].activation) == ("f", "relu")


@pytest.mark.parametrize(
    "ops",
    [
        (linear("f", "x"), activation("r", "f"), add("s", "r", "f")),  # f has a second reader
        (linear("f", "x", residual="x"), activation("r", "f")),  # would come before the addition
        (linear("f", "x", activation="silu"), activation("r", "f")),
    ],
)
def test_activation_stays_apart(ops):
    before = graph(*ops)
    assert fuse_activations(before) == before


def test_addition_joins_the_linear_it_alone_reads():
    fused = fuse_residuals(graph(linear("f", "x", activation="relu"), add("s", "x", "f")))
    assert outputs(fused) == ["x", "s", "head"]
    assert (fused.ops[1].residual, fused.ops[1].activation) == ("x", "relu")


def test_of_two_linears_the_later_takes_the_addition():
    fused = fuse_residuals(graph(linear("f", "x"), linear("g", "x"), add("s", "f", "g")))
    assert outputs(fused) == ["x", "f", "s", "head"]
    assert (fused.ops[2].name, fused.ops[2].residual) == ("g", "f")


def test_linear_moves_behind_its_residual():
    fused = fuse_residuals(graph(linear("f", "x"), activation("late", "x"), add("s", "f", "late")))
    assert outputs(fused) == ["x", "late", "s", "head"]
    assert (fused.ops[2].name, fused.ops[2].residual) == ("f", "late")


def test_a_linear_takes_one_addition_only():
    fused = fuse_residuals(graph(linear("f", "x"), add("s", "f", "x"), add("t", "s", "x")))
    assert outputs(fused) == ["x", "s", "t", "head"]
    assert isinstance(fused.ops[2], ir.Elementwise)


@pytest.mark.parametrize(
    "ops", [(linear("f", "x"), add("s", "f", "f")), (linear("f", "x"), add("s", "f", "x"), mul("m", "s", "f"))]
)
def test_addition_stays_apart(ops):
    before = graph(*ops)
    assert fuse_residuals(before) == before


def test_dead_operators_go_with_all_that_only_they_read():
    fused = remove_dead(graph(linear("dead", "x"), activation("also_dead", "dead"), linear("f", "x")))
    assert outputs(fused) == ["x", "f", "head"]


def test_fusing_twice_changes_nothing_more():
    before = graph(
        linear("a.g", "x"), activation("s", "a.g"), linear("a.u", "x"), mul("m", "s", "a.u"), add("n", "m", "x")
    )
    once = fuse(before, lambda names: True)
    assert fuse(once, lambda names: True) == once
