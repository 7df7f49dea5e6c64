"""Before compression: how many bits per weight rows may have in all, what matters, and the widths to begin with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from gqsa_runtime.errors import InputError
from gqsa_runtime.format import ALIGNMENT
from gqsa_runtime.inspect_ import size as in_words

from gqsac.compiler.stacks import stacks_of
from gqsac.compress.goal import Goal
from gqsac.compress.options import Options
from gqsac.compress.partial import PartialFolder
from gqsac.compress.row_costs import row_costs
from gqsac.compress.sensitivity import sensitivities
from gqsac.compress.widths import WidthBudget
from gqsac.source import Source

_START_WIDTH = 4  # bits from which a training comes down: hardly anything is lost there
_KEPT = "sensitivity"
TOLERANCE = 0.005  # of the target, within which the result is
_TRIES, _LEAST_STEP = 8, 1e-4  # bits per weight; of meeting a goal in bytes


@dataclass
class Allotment:
    """A budget in bits per weight and what it is spent by.

    target: bits per weight of the result at most; with a goal in bytes, about, until `measure` has been called. start:
    those from which a training comes down, or the target. goal: what is to be met in bytes, if anything.
    scores: path -> f32 [rows, q_groups], see sensitivity.fisher_scores. costs: path -> f32 [rows, widths], of the
    uncompressed weights. Both are empty until `measure` has been called.
    """

    budget: WidthBudget
    target: float
    start: float
    goal: Goal | None
    scores: dict[str, np.ndarray]
    costs: dict[str, np.ndarray]

    @classmethod
    def of(cls, source: Source, shapes: dict[str, tuple[int, int]], options: Options, shown: bool = False) -> Allotment:
        """Raises InputError for a target that rows of these widths cannot have. shown: progress on a terminal."""
        budget = WidthBudget(stacks_of(source.config, shapes), options.widths)
        goal = Goal.of(source, shapes, options, shown)
        target = options.target_bpw if goal is None else _bits_of(goal, budget, options)
        least, most = budget.limits()
        if goal is None and not least <= target <= most * (1 + TOLERANCE):
            raise InputError(
                f"the target is {target:g} bits per weight, but the linears of this model, rows of "
                f"{_listed(options.widths)} bits with scales and all, can have {math.ceil(least * 100) / 100:.2f} to "
                f"{math.floor(most * (1 + TOLERANCE) * 100) / 100:.2f}; choose a target in that range"
            )
        start = budget.bits_per_weight(budget.uniform(_start_width(budget)))
        return cls(budget, target, max(start, target), goal, {}, {})

    def choose(self, costs: dict[str, np.ndarray], bits_per_weight: float | None = None) -> dict[str, np.ndarray]:
        """Path -> uint8 [rows]: the widths of the least cost that meet the target, or, within TOLERANCE, so many bits.

        costs: path -> f32 [rows, widths]. Where nothing is near the target, the most that is within it: see `missed`.
        """
        if bits_per_weight is not None:
            return self.budget.choose(costs, bits_per_weight, TOLERANCE)
        if self.goal is None:
            return self.budget.choose(costs, self.target)
        return self._met(costs)

    def _met(self, costs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Widths whose bytes are within the goal and, as far as kernels allow, TOLERANCE of it.

        Rows of many widths need more kernels than a goal near the least may have room for: then fewer are tried.
        """
        goal, widths = self.goal, self.budget.widths
        best, enough = (-1, None), goal.most * (1 - TOLERANCE)
        for count, patient in [*((n, False) for n in range(len(widths), 0, -1)), (len(widths), True)]:
            budget = WidthBudget(self.budget.stacks, widths[:count])
            if best[1] is None or budget.limits()[1] >= self.target:  # otherwise too narrow to spend more
                found = self._nearest({path: cost[:, :count] for path, cost in costs.items()}, budget, patient)
                best = max(best, found, key=lambda known: known[0])
            if best[0] >= enough:
                break
        self.target = self.budget.bits_per_weight(best[1])
        return best[1]

    def _nearest(self, costs: dict[str, np.ndarray], budget: WidthBudget, patient: bool) -> tuple[int, dict | None]:
        """(bytes, path -> widths) of the most bytes within the goal that were found; (-1, None) if none are.

        What is not weights, kernels above all, changes a little with the widths: so it is measured and tried again.
        patient: also where the kernels of a choice leave no room for any weights, and fewer bits might need fewer.
        """
        goal, best = self.goal, (-1, None)
        enough = goal.most * (1 - TOLERANCE)
        low, high = budget.limits()
        bits = min(max(self.target, low), high)
        for _ in range(_TRIES):
            found = budget.choose(costs, bits)
            n_bytes = goal.n_bytes(found)
            nearer = bits + 8 * (enough - n_bytes) / budget.n_weights
            if n_bytes < enough:  # by a kernel less than expected, perhaps
                found = budget.filled(costs, found, goal.most - n_bytes - ALIGNMENT * len(budget.stacks))
                n_bytes = goal.n_bytes(found)
            if n_bytes <= goal.most:
                low, best = bits, max(best, (n_bytes, found), key=lambda known: known[0])
            else:
                high = bits
            least = n_bytes - (budget.bits_per_weight(found) - budget.limits()[0]) * budget.n_weights / 8
            if enough <= n_bytes <= goal.most or high - low < _LEAST_STEP or (least > goal.most and not patient):
                break
            bits = nearer if low < nearer < high else (low + high) / 2
        return best

    def reached(self, row_bits: dict[str, np.ndarray]) -> float:
        """What rows of these widths come to: bytes if the goal is one, else bits per weight."""
        return self.budget.bits_per_weight(row_bits) if self.goal is None else self.goal.n_bytes(row_bits)

    def missed(self, reached: float) -> str | None:
        """A sentence about a result that is further below its target than TOLERANCE, or None. reached: see above."""
        budget, goal = self.budget, self.goal
        if goal is None:
            target, figures = self.target, f"{self.target:g} bits per weight, and {reached:.4f}"
            step = f"{8 * budget.least_step / budget.n_weights:.4f} bits per weight"
        else:
            target, figures = goal.most, f"{in_words(goal.most)} for {goal.words}, and {in_words(reached)}"
            step = f"{in_words(budget.least_step)}, and a width that is new to a matrix needs kernels of its own"
        if reached >= target * (1 - TOLERANCE):
            return None
        return (
            f"the target is {figures} were reached, {1 - reached / target:.1%} less: rows of this model become wider "
            f"in blocks of 16, by at least {step}"
        )

    @property
    def falls(self) -> bool:
        """Whether a training begins with more bits than the target."""
        return self.start > self.target

    def measure(self, make_model, block_path, tokens, options: Options, device, partial: PartialFolder, shown: bool):
        """Fills scores and costs, from `partial` if they are there. make_model: the uncompressed model, anew.

        tokens: int64 [samples, seq_len], on the CPU. shown: a bar on a terminal.
        """
        paths = [path for stack in self.budget.stacks for path in stack.modules]
        kept = partial.load_block(_KEPT, 0)
        if kept is None:
            model = make_model()
            blocks = model.get_submodule(block_path)
            scores = sensitivities(model, blocks, paths, tokens, options, device, shown)
            weights = {path: model.get_submodule(path).weight.detach() for path in paths}
            costs = row_costs(weights, {path: score.to(device) for path, score in scores.items()}, self.budget.widths)
            kept = {f"scores.{path}": scores[path].numpy() for path in paths}
            kept |= {f"costs.{path}": costs[path].cpu().numpy() for path in paths}
            partial.save_block(_KEPT, 0, kept)
        self.scores = {path: kept[f"scores.{path}"] for path in paths}
        self.costs = {path: kept[f"costs.{path}"] for path in paths}
        if self.goal is not None:
            self.choose(self.costs)  # from now on the target is known

    def row_bits(self, falling: bool) -> dict[str, torch.Tensor]:
        """Path -> widths, uint8 [rows], for the target, or, if a training is to bring them down, to begin with."""
        falls = falling and self.falls
        found = self.budget.uniform(_start_width(self.budget)) if falls else self.choose(self.costs)
        return {path: torch.from_numpy(row_bits) for path, row_bits in found.items()}


def _start_width(budget: WidthBudget) -> int:
    return max((width for width in budget.widths if width <= _START_WIDTH), default=budget.widths[0])


def _bits_of(goal: Goal, budget: WidthBudget, options: Options) -> float:
    """Bits per weight, about, with which a goal in bytes is met. Raises InputError for one out of reach."""
    ends = [budget.uniform(width) for width in (budget.widths[0], budget.widths[-1])]
    least, most = map(goal.n_bytes, ends)
    if not least <= goal.most <= most * (1 + TOLERANCE):
        raise InputError(
            f"the target is {in_words(goal.most)} for {goal.words}, but with rows of {_listed(options.widths)} bits it "
            f"can take {in_words(least)} to {in_words(most * (1 + TOLERANCE))}, all counted; choose a target in that "
            "range"
        )
    rest = most - budget.n_bytes(ends[1])
    low, high = budget.limits()
    return min(max(low, 8 * (goal.most - rest) / budget.n_weights), high)


def _listed(widths: tuple[int, ...]) -> str:
    return ", ".join(map(str, widths))
