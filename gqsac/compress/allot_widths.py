"""Before compression: how many bits per weight rows may have in all, what matters, and the widths to begin with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from gqsa_runtime.errors import InputError

from gqsac.compiler.stacks import stacks_of
from gqsac.compress.options import Options
from gqsac.compress.partial import PartialFolder
from gqsac.compress.row_costs import row_costs
from gqsac.compress.sensitivity import sensitivities
from gqsac.compress.widths import WidthBudget

_START_WIDTH = 4  # bits from which a training comes down: hardly anything is lost there
_KEPT = "sensitivity"
TOLERANCE = 0.005  # of the target, within which the result is


@dataclass
class Allotment:
    """A budget in bits per weight and what it is spent by.

    target: bits per weight of the result at most. start: those from which a training comes down, or the target.
    scores: path -> f32 [rows, q_groups], see sensitivity.fisher_scores. costs: path -> f32 [rows, widths], of the
    uncompressed weights. Both are empty until `measure` has been called.
    """

    budget: WidthBudget
    target: float
    start: float
    scores: dict[str, np.ndarray]
    costs: dict[str, np.ndarray]

    @classmethod
    def of(cls, config: dict, shapes: dict[str, tuple[int, int]], options: Options) -> Allotment:
        """Raises InputError for a target that rows of these widths cannot have."""
        budget = WidthBudget(stacks_of(config, shapes), options.widths)
        least, most = budget.limits()
        if not least <= options.target_bpw <= most * (1 + TOLERANCE):
            widths = ", ".join(map(str, options.widths))
            raise InputError(
                f"the target is {options.target_bpw:g} bits per weight, but the linears of this model, rows of "
                f"{widths} bits with scales and all, can have {math.ceil(least * 100) / 100:.2f} to "
                f"{math.floor(most * (1 + TOLERANCE) * 100) / 100:.2f}; choose a target in that range"
            )
        start = budget.bits_per_weight(budget.uniform(_start_width(budget)))
        return cls(budget, options.target_bpw, max(start, options.target_bpw), {}, {})

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

    def row_bits(self, falling: bool) -> dict[str, torch.Tensor]:
        """Path -> widths, uint8 [rows], for the target, or, if a training is to bring them down, to begin with."""
        if falling and self.falls:
            found = self.budget.uniform(_start_width(self.budget))
        else:
            found = self.budget.choose(self.costs, self.target)
        return {path: torch.from_numpy(row_bits) for path, row_bits in found.items()}


def _start_width(budget: WidthBudget) -> int:
    return max((width for width in budget.widths if width <= _START_WIDTH), default=budget.widths[0])
