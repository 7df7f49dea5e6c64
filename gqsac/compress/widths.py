"""Widths by row under a budget of bytes: a Lagrangian over what each row costs the model at each width.

Minimising sum of costs(row, width) + lambda * bytes(row, width) takes each row by itself; lambda is searched for so
that the bytes meet the budget. A file stores blocks of 16 rows of one width, so of a stack whole blocks are
made of rows near the border between two widths.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from gqsa_runtime.layouts.records import ROWS

from gqsac.compiler.stacks import Stack

_SEARCHES = 48  # halvings of the logarithm of lambda
_NEAR = 2.0  # lambda with whole blocks is that without, but for this factor, or less


@dataclass
class _Units:
    """Rows of a stack that get one width together: one, or the two of a pair. costs: f64 [units, widths].

    in_block: units of a block. block_bytes: f64 [widths].
    """

    stack: Stack
    costs: np.ndarray
    in_block: int
    block_bytes: np.ndarray


class WidthBudget:
    """Chooses widths for the stacks of a model. widths: those that a row may have, ascending."""

    def __init__(self, stacks: tuple[Stack, ...], widths: tuple[int, ...]):
        self.stacks, self.widths = stacks, tuple(sorted(widths))
        self.n_weights = sum(stack.n_weights for stack in stacks)
        by_columns = {}
        for stack in stacks:
            if stack.columns not in by_columns:
                by_columns[stack.columns] = np.array([stack.block_bytes(width) for width in self.widths], np.float64)
        self._block_bytes = by_columns

    def n_bytes(self, row_bits: dict[str, np.ndarray]) -> int:
        """Bytes of all stacks in a file. row_bits: path -> uint8 [rows]."""
        return sum(stack.n_bytes(np.concatenate([row_bits[path] for path in stack.modules])) for stack in self.stacks)

    def bits_per_weight(self, row_bits: dict[str, np.ndarray]) -> float:
        """As gqsac.compiler.stacks defines them."""
        return 8 * self.n_bytes(row_bits) / self.n_weights

    def uniform(self, width: int) -> dict[str, np.ndarray]:
        """One width for every row."""
        return {
            path: np.full(rows, width, np.uint8)
            for stack in self.stacks
            for path, rows in zip(stack.modules, stack.rows, strict=True)
        }

    def limits(self) -> tuple[float, float]:
        """The least and the most bits per weight."""
        least, most = (self.bits_per_weight(self.uniform(width)) for width in (self.widths[0], self.widths[-1]))
        return least, most

    @property
    def least_step(self) -> int:
        """Bytes by which a choice grows at least, but for rows that a stack's last block has room for."""
        return min(int(np.diff(of_widths).min(initial=of_widths[0])) for of_widths in self._block_bytes.values())

    def choose(self, costs: dict[str, np.ndarray], bits_per_weight: float, slack: float = 0.0) -> dict[str, np.ndarray]:
        """Path -> uint8 [rows]: the widths of the least total cost in at most so many bits per weight.

        costs: path -> f32 [rows, widths], comparable over the whole model. bits_per_weight: within `limits`.
        slack: share of the budget that may be left, which is faster.
        """
        budget = bits_per_weight * self.n_weights / 8
        widest = self.uniform(self.widths[-1])
        if self.n_bytes(widest) <= round(budget):  # less than its blocks count beside others
            return widest
        units = [self._units(stack, costs) for stack in self.stacks]
        every_cost = np.concatenate([u.costs for u in units])
        every_bytes = np.concatenate([np.tile(u.block_bytes / u.in_block, (len(u.costs), 1)) for u in units])

        def without_blocks(weight: float):
            chosen = (every_cost + weight * every_bytes).argmin(1)
            return every_bytes[np.arange(len(chosen)), chosen].sum(), chosen

        scale = max(float(every_cost.max()), 1e-30) / float(every_bytes.min())
        lowest, highest = 1e-16 * scale, 1e4 * scale
        weight, _ = _search(without_blocks, lowest, highest, budget, 1e-3) or (highest, None)
        fixed = 8 * len(units)  # closes the tables of a stack

        def with_blocks(weight: float):
            choices = [_whole_blocks(u, weight) for u in units]
            return fixed + sum(_bytes(u, c) for u, c in zip(units, choices, strict=True)), choices

        near = weight / _NEAR, weight * _NEAR
        found = _search(with_blocks, *near, budget, 1e-4, slack) or _search(with_blocks, near[1], highest, budget, 1e-4)
        parts = found[1] if found else with_blocks(highest)[1]  # the narrowest for all
        if fixed + sum(map(_bytes, units, parts)) < budget * (1 - slack):
            _fill(units, parts, budget - fixed)
            # A stack of one width may take less than its blocks count beside others.
            found = self._by_path(units, parts)
            return self.filled(costs, found, int(budget) - self.n_bytes(found))
        return self._by_path(units, parts)

    def filled(self, costs: dict[str, np.ndarray], row_bits: dict[str, np.ndarray], more: int) -> dict[str, np.ndarray]:
        """The widths with up to so many bytes more, where they gain most, and the same kernels.

        Blocks go to widths that their stack has already, and none is emptied. costs: see `choose`.
        """
        units = [self._units(stack, costs) for stack in self.stacks]
        parts = []
        for stack in self.stacks:
            widths = np.concatenate([row_bits[path] for path in stack.modules])
            parts.append(np.searchsorted(self.widths, widths[: len(widths) // 2] if stack.paired else widths))
        now = sum(_bytes(u, chosen) for u, chosen in zip(units, parts, strict=True))
        _fill(units, parts, now + more, same_kernels=True)
        return self._by_path(units, parts)

    def _units(self, stack: Stack, costs: dict[str, np.ndarray]) -> _Units:
        rows = np.concatenate([np.asarray(costs[path], np.float64) for path in stack.modules])
        if stack.paired:
            rows = rows.reshape(2, -1, rows.shape[1]).sum(0)
        return _Units(stack, rows, ROWS // 2 if stack.paired else ROWS, self._block_bytes[stack.columns])

    def _by_path(self, units: list[_Units], parts) -> dict[str, np.ndarray]:
        widths, found = np.array(self.widths, np.uint8), {}
        for u, chosen in zip(units, parts, strict=True):
            row_bits = np.tile(widths[chosen], 2) if u.stack.paired else widths[chosen]
            found.update(zip(u.stack.modules, np.split(row_bits, np.cumsum(u.stack.rows)[:-1]), strict=True))
        return found


def _search(choose, low: float, high: float, budget: float, precision: float, slack: float = 0.0):
    """(lambda, choice) of the least lambda, in the limits, whose bytes are within the budget; None if none of those
    that were tried is. slack: share of the budget whose rest ends the search.

    choose: lambda -> (bytes, choice).
    """
    best = None
    for _ in range(_SEARCHES):
        middle = (low * high) ** 0.5
        n_bytes, choice = choose(middle)
        if n_bytes <= budget:
            high, best = middle, (middle, choice)
            if n_bytes >= budget * (1 - slack):
                break
        else:
            low = middle
        if high / low < 1 + precision:
            break
    return best


def _bytes(u: _Units, chosen: np.ndarray) -> float:
    blocks = -(-np.bincount(chosen, minlength=len(u.block_bytes)) // u.in_block)
    return float(blocks @ u.block_bytes)


def _whole_blocks(u: _Units, weight: float) -> np.ndarray:
    """The widths of least cost + weight * bytes, moved so that each but the narrowest fills whole blocks."""
    total = u.costs + weight * u.block_bytes / u.in_block
    chosen = total.argmin(1)
    for width in range(len(u.block_bytes) - 1, 0, -1):
        mine, narrower = np.flatnonzero(chosen == width), np.flatnonzero(chosen < width)
        over = len(mine) % u.in_block
        if not over or not len(narrower):  # without narrower rows, a last block that is not full stays so
            continue
        best_below = total[mine, :width].argmin(1)
        lost = total[mine, best_below] - total[mine, width]
        down = np.argsort(lost, kind="stable")[:over]
        wanted = u.in_block - over
        if len(narrower) >= wanted:
            regret = total[narrower, width] - total[narrower, chosen[narrower]]
            up = np.argsort(regret, kind="stable")[:wanted]
            if regret[up].sum() < lost[down].sum():
                chosen[narrower[up]] = width
                continue
        chosen[mine[down]] = best_below[down]
    return chosen


def _fill(units: list[_Units], parts: list[np.ndarray], budget: float, same_kernels: bool = False) -> None:
    """Spends what is left of the budget on the blocks that gain most a byte, in place. same_kernels: see `filled`."""
    left = budget - sum(_bytes(u, chosen) for u, chosen in zip(units, parts, strict=True))

    def moves(number: int):
        """(gain a byte, bytes, stack, its units, new width) of a block of each width of a stack made wider."""
        u, chosen = units[number], parts[number]
        steps = np.unique(chosen) if same_kernels else np.arange(len(u.block_bytes))
        for width, wider in zip(steps[:-1].tolist(), steps[1:].tolist(), strict=True):
            mine = np.flatnonzero(chosen == width)
            if len(mine) >= u.in_block + same_kernels:
                gain = u.costs[mine, width] - u.costs[mine, wider]
                most = np.argsort(-gain, kind="stable")[: u.in_block]
                more = u.block_bytes[wider] - u.block_bytes[width]
                if more <= left:
                    yield gain[most].sum() / more, more, number, mine[most], wider

    known = {number: list(moves(number)) for number in range(len(units))}
    while True:
        fitting = [move for of_stack in known.values() for move in of_stack if move[1] <= left and move[0] > 0]
        if not fitting:
            return
        _, more, number, which, width = max(fitting, key=lambda move: move[:3])
        parts[number][which] = width
        left -= more
        known[number] = list(moves(number))
