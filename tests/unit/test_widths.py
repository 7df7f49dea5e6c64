"""Widths by row under a budget: chosen for the least cost, counted as a file stores them."""

import itertools

import numpy as np
import pytest

from gqsac.compiler.stacks import Stack, stacks_of
from gqsac.compress.allot_widths import TOLERANCE, Allotment
from gqsac.compress.widths import WidthBudget

WIDTHS = (1, 2, 3, 4, 8)
STACKS = (
    Stack(("q", "k", "v"), (64, 32, 32), 128, False),
    Stack(("o",), (72,), 64, False),  # no whole number of blocks
    Stack(("gate", "up"), (96, 96), 128, True),
)

LAYER = (  # of a model of which a block of rows is a small part
    Stack(("q", "k", "v"), (256, 128, 128), 256, False),
    Stack(("o",), (264,), 256, False),
    Stack(("gate", "up"), (768, 768), 256, True),
    Stack(("down",), (256,), 768, False),
)


def some_costs(seed=0, stacks=STACKS, widths=WIDTHS):
    """Rows of very different importance, errors that fall as they do with the width."""
    rng = np.random.default_rng(seed)
    errors = 4.0 ** -np.array(widths)
    return {
        path: np.exp(2 * rng.standard_normal((rows, 1))) * errors * stack.columns
        for stack in stacks
        for path, rows in zip(stack.modules, stack.rows, strict=True)
    }


def total_cost(costs, row_bits):
    return sum(
        cost[np.arange(len(cost)), np.searchsorted(WIDTHS, row_bits[path])].sum() for path, cost in costs.items()
    )


def test_bytes_of_blocks_are_those_of_the_layout():
    rng = np.random.default_rng(0)
    for stack in STACKS:
        n_units = stack.n_rows // (2 if stack.paired else 1)
        units = rng.choice(np.array(WIDTHS, np.uint8), n_units)
        row_bits = np.tile(units, 2) if stack.paired else units
        in_block = 8 if stack.paired else 16
        blocks = sum(-(-int((units == width).sum()) // in_block) * stack.block_bytes(width) for width in WIDTHS)
        assert stack.n_bytes(row_bits) == blocks + 8


@pytest.mark.parametrize("target", [1.8, 2.0, 2.6, 3.0, 4.3, 6.5])
def test_the_budget_is_met_and_never_exceeded(target):
    budget, costs = WidthBudget(STACKS, WIDTHS), some_costs()
    row_bits = budget.choose(costs, target)
    assert {path: len(bits) for path, bits in row_bits.items()} == {path: len(cost) for path, cost in costs.items()}
    assert (row_bits["gate"] == row_bits["up"]).all()
    block = max(stack.block_bytes(2) - stack.block_bytes(1) for stack in STACKS) * 4  # from 4 bits to 8
    assert target - 8 * block / budget.n_weights < budget.bits_per_weight(row_bits) <= target


def test_a_large_model_is_within_half_a_percent():
    stacks = tuple(
        Stack(tuple(f"{i}.{part}" for part in stack.modules), tuple(4 * r for r in stack.rows), 576, stack.paired)
        for i in range(8)
        for stack in STACKS
    )
    budget, costs = WidthBudget(stacks, WIDTHS), some_costs(1, stacks)
    for target in (1.9, 2.31, 2.6, 3.0, 4.3):
        achieved = budget.bits_per_weight(budget.choose(costs, target))
        assert 0.995 * target <= achieved <= target


def test_stacks_of_one_width_take_less_and_others_get_the_rest():
    """Records of one width alone have no headers where their columns fill them."""
    stacks = tuple(Stack((f"{i}",), (256,), 512, False) for i in range(8))
    budget, costs = WidthBudget(stacks, (2, 4)), some_costs(1, stacks, (2, 4))
    for i in range(4):
        costs[f"{i}"] *= 1e-6
    least, most = budget.limits()
    assert most * budget.n_weights / 8 < sum(16 * stack.block_bytes(4) for stack in stacks)
    for target, widths in ((least, {2}), (most, {4})):
        chosen = budget.choose(costs, target)
        assert set(np.concatenate(list(chosen.values()))) == widths and budget.bits_per_weight(chosen) == target
    block = stacks[0].block_bytes(4) - stacks[0].block_bytes(2)
    for target in (2.5, 2.8, 3.1):
        chosen = budget.choose(costs, target)
        assert all(set(chosen[f"{i}"]) == {2} for i in range(4))
        assert target - 8 * block / budget.n_weights < budget.bits_per_weight(chosen) <= target


def test_every_target_in_hundredths_of_a_bit_is_met():
    budget, costs = WidthBudget(LAYER, WIDTHS), some_costs(2, LAYER)
    for target in np.arange(150, 801) / 100:
        achieved = budget.bits_per_weight(budget.choose(costs, target))
        assert (1 - TOLERANCE) * target <= achieved <= target, target


def test_a_budget_that_falls_is_kept_on_its_way():
    """Blocks that are not full count: between start and target too, nothing is above the budget."""
    allotment = Allotment(WidthBudget(LAYER, WIDTHS), 2.0, 4.4, None, {}, {})
    for seed, bits in enumerate(np.arange(2.0, 4.4, 0.3)):
        achieved = allotment.budget.bits_per_weight(allotment.choose(some_costs(seed, LAYER), bits))
        assert (1 - TOLERANCE) * bits <= achieved <= bits


class Kernels:
    """A goal in bytes: weights, and kernels of 9000 bytes for every width of a stack."""

    words = "a file"

    def __init__(self, most: int):
        self.most = most

    def n_bytes(self, row_bits):
        rows = [np.concatenate([row_bits[path] for path in stack.modules]) for stack in LAYER]
        weights = sum(stack.n_bytes(bits) for stack, bits in zip(LAYER, rows, strict=True))
        return weights + 9000 * sum(len(set(bits.tolist())) for bits in rows)


def allotted(most: int, target: float) -> tuple[Allotment, dict]:
    allotment = Allotment(WidthBudget(LAYER, WIDTHS), target, target, Kernels(most), {}, {})
    return allotment, allotment.choose(some_costs(3, LAYER))


@pytest.mark.parametrize("most", [260_000, 300_000, 400_000, 650_000])
def test_a_size_is_met_whatever_kernels_take(most):
    """The first has room for the kernels of two widths a stack, but not for those of five."""
    allotment, row_bits = allotted(most, 2.0)
    assert most * (1 - TOLERANCE) <= allotment.goal.n_bytes(row_bits) <= most
    assert allotment.missed(allotment.reached(row_bits)) is None
    assert allotment.target == allotment.budget.bits_per_weight(row_bits)


def test_a_size_that_kernels_put_out_of_reach_is_told():
    budget = WidthBudget(LAYER, WIDTHS)
    least = Kernels(0).n_bytes(budget.uniform(1))
    allotment, row_bits = allotted(least + 8000, budget.limits()[0])
    assert allotment.goal.n_bytes(row_bits) == least
    assert allotment.missed(allotment.reached(row_bits)) == (
        f"the target is {(least + 8000) / 1e3:.2f} kB for a file, and {least / 1e3:.2f} kB were reached, "
        f"{8000 / (least + 8000):.1%} less: rows of this model become wider in blocks of 16, by at least 512 B, and a "
        "width that is new to a matrix needs kernels of its own"
    )


def test_the_choice_is_the_best_there_is():
    """Against every choice for four blocks of rows that are alike within a block."""
    stack = Stack(("a",), (64,), 64, False)
    rng = np.random.default_rng(3)
    blocks = np.exp(2 * rng.standard_normal((4, 1))) * 4.0 ** -np.array(WIDTHS)
    costs = {"a": np.repeat(blocks, 16, 0)}
    budget = WidthBudget((stack,), WIDTHS)
    for target in (2.5, 3.2, 4.1, 5.5):
        ours = budget.choose(costs, target)
        best = min(
            blocks[range(4), list(choice)].sum() * 16
            for choice in itertools.product(range(5), repeat=4)
            if budget.bits_per_weight({"a": np.repeat(np.array(WIDTHS, np.uint8)[list(choice)], 16)}) <= target
        )
        # A Lagrangian finds the best of every budget at which its own choices end, and is near it between.
        assert best <= total_cost(costs, ours) * (1 + 1e-12)
        spent = budget.bits_per_weight(ours)
        exact = min(
            blocks[range(4), list(choice)].sum() * 16
            for choice in itertools.product(range(5), repeat=4)
            if budget.bits_per_weight({"a": np.repeat(np.array(WIDTHS, np.uint8)[list(choice)], 16)}) <= spent
        )
        assert total_cost(costs, ours) < 1.5 * exact


def test_mixed_rows_cost_less_than_one_width_at_the_same_bytes():
    budget, costs = WidthBudget(STACKS, WIDTHS), some_costs()
    uniform = budget.uniform(3)
    mixed = budget.choose(costs, budget.bits_per_weight(uniform))
    assert total_cost(costs, mixed) < 0.6 * total_cost(costs, uniform)


def test_more_bits_never_cost_more():
    budget, costs = WidthBudget(STACKS, WIDTHS), some_costs()
    found = [total_cost(costs, budget.choose(costs, target)) for target in np.arange(1.8, 8.0, 0.1)]
    assert all(later <= earlier * 1.02 for earlier, later in itertools.pairwise(found))


def test_the_limits_are_those_of_one_width():
    budget, costs = WidthBudget(STACKS, (2, 4)), {path: cost[:, [1, 3]] for path, cost in some_costs().items()}
    least, most = budget.limits()
    assert set(np.concatenate(list(budget.choose(costs, least).values()))) == {2}
    assert set(np.concatenate(list(budget.choose(costs, most).values()))) == {4}


def test_stacks_are_found_from_the_config_alone():
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
        "max_position_embeddings": 32, "tie_word_embeddings": True,
    }  # fmt: skip
    layer = "model.layers.0"
    shapes = {f"{layer}.self_attn.{name}_proj": (32 if name in "kv" else 64, 64) for name in "qkvo"}
    shapes |= {f"{layer}.mlp.{name}_proj": (128, 64) for name in ("gate", "up")}
    shapes[f"{layer}.mlp.down_proj"] = (64, 128)
    stacks = stacks_of(config, shapes)
    assert [tuple(path.removeprefix(f"{layer}.") for path in stack.modules) for stack in stacks] == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ]
    assert [stack.paired for stack in stacks] == [False, False, True, False]
    assert [stack.columns for stack in stacks] == [64, 64, 64, 128]
    del shapes[f"{layer}.mlp.up_proj"]  # stays dense: nothing to pair with
    assert not any(stack.paired for stack in stacks_of(config, shapes))
