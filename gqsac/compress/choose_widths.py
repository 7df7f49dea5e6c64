"""The widths of a model's rows in end-to-end training: a budget that falls to its target while the weights learn."""

from __future__ import annotations

import numpy as np
import torch

from gqsac.compress.allot_widths import Allotment
from gqsac.compress.fake_quant import GroupLinear
from gqsac.compress.row_costs import nearest_grids, row_costs
from gqsac.compress.select import scheduled_sparsity
from gqsac.compress.sensitivity import fisher_of, sampled_gradient
from gqsac.compress.trainable import autocast

EVERY = 20  # steps between choices
RAMP = 0.3  # share of a training over which the budget falls
_MEMORY = 0.8  # of the running mean of sensitivities, a choice


class WidthChooser:
    """Owns the widths of all GroupLinears of a model.

    The budget falls over the first RAMP of the training from the allotment's start to its target, as sparsity would
    rise; every so often the sensitivities are measured anew on the model as it is, and all widths chosen by them
    and by what the weights as they are lose at each width. A row that changes its width begins there with the grid that
    is nearest to its weights. scores: path -> f32 [rows, q_groups], the running mean of sensitivities. reached: whether
    the widths have come to the target.
    """

    def __init__(
        self,
        model,
        linears: dict[str, GroupLinear],
        allotment: Allotment,
        tokens: torch.Tensor,
        at_once: int,
        seed: int,
    ):
        """tokens: int64 [samples, seq_len], contexts, on the CPU. at_once: how many of them a measurement takes."""
        self._model, self._linears, self._allotment = model, linears, allotment
        self._tokens, self._at_once, self._seed = tokens, at_once, seed
        self.scores = {
            path: torch.from_numpy(allotment.scores[path]).to(linear.weight.device) for path, linear in linears.items()
        }
        self.reached = False

    @property
    def unfinished(self) -> bool:
        """Whether the widths have not yet come to the target."""
        return not self.reached

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that changes, by name, to be saved and to be copied into."""
        found = {}
        for path, linear in self._linears.items():
            found |= {f"bits.{path}": linear.row_bits, f"base.{path}": linear.base, f"score.{path}": self.scores[path]}
        return found

    def step(self, step: int, fraction: float) -> None:
        """Chooses the widths anew if it is time to, for this point of the training."""
        if not self.reached and (step % EVERY == 0 or fraction >= RAMP):
            self._measure(step)
            self.choose(fraction)

    def observe(self) -> None:
        """The gradients of a step tell nothing here: they are of the training's loss, not of the model's own tokens."""

    def _measure(self, step: int) -> None:
        weights = [linear.weight for linear in self._linears.values()]
        rows = np.random.default_rng((self._seed, step)).integers(0, len(self._tokens), self._at_once)
        tokens = self._tokens[torch.from_numpy(rows)].to(weights[0].device)
        with autocast(weights[0].device):
            logits = self._model(tokens, use_cache=False).logits
        generator = torch.Generator(weights[0].device).manual_seed(self._seed + step)
        gradients = torch.autograd.grad(logits, weights, sampled_gradient(logits, generator))
        for score, gradient in zip(self.scores.values(), gradients, strict=True):
            found = fisher_of(gradient, gradient.shape[1] // score.shape[1]) / tokens.numel()
            score.mul_(_MEMORY).add_(found, alpha=1 - _MEMORY)

    @torch.no_grad()
    def choose(self, fraction: float) -> None:
        """Chooses the widths for that share of the training, now."""
        self.reached = self.reached or fraction >= RAMP
        allotment, bits = self._allotment, None
        if not self.reached:
            bits = allotment.start - scheduled_sparsity(allotment.start - allotment.target, fraction, RAMP)
        weights = {path: linear.weight for path, linear in self._linears.items()}
        costs = row_costs(weights, self.scores, allotment.budget.widths)
        costs = dict(zip(costs, _on_cpu(list(costs.values())), strict=True))
        found = allotment.choose({path: c.numpy() for path, c in costs.items()}, bits)
        set_widths(self._linears, {path: torch.from_numpy(row_bits) for path, row_bits in found.items()})


@torch.no_grad()
def set_widths(linears: dict[str, GroupLinear], row_bits: dict[str, torch.Tensor]) -> None:
    """Gives rows other widths, and those whose width changes new scales and zeros.

    row_bits: path -> uint8 [rows], on the CPU.
    """
    wanted, device = [row_bits[path] for path in linears], next(iter(linears.values())).weight.device
    before = _on_cpu([linear.row_bits for linear in linears.values()])
    moved = [torch.nonzero(old != new)[:, 0] for old, new in zip(before, wanted, strict=True)]
    moved = torch.cat(moved).to(device).split([len(rows) for rows in moved])
    wanted = torch.cat(wanted).to(device).split([len(bits) for bits in wanted])
    changed = []
    for linear, bits, rows in zip(linears.values(), wanted, moved, strict=True):
        linear.row_bits.copy_(bits)
        if len(rows):
            changed.append((linear, rows))
    if not changed:
        return
    scales, zeros = nearest_grids(
        (linear.weight[rows] for linear, rows in changed),
        [linear.row_bits[rows] for linear, rows in changed],
        [linear.base.shape[1] for linear, _ in changed],
    )
    for (linear, rows), of_linear, zero in zip(changed, scales, zeros, strict=True):
        linear.base[rows], linear.gains[rows], linear.zeros[rows] = of_linear, 1.0, zero


def _on_cpu(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Copies on the CPU of tensors that differ in their first dimension alone; a GPU is waited for once."""
    return torch.cat(tensors).cpu().split([len(tensor) for tensor in tensors])
