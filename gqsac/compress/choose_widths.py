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
from gqsac.compress.world import World, own_part, own_rows, together, whole_rows

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
        blocks=(),
        world: World = World(),
    ):
        """tokens: int64 [samples, seq_len], contexts, on the CPU. at_once: how many of them a measurement takes.

        blocks: of the model, whose weights come together one after another where they are spread over the world.
        """
        self._world, self._blocks = world, blocks
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
        world, device = self._world, self._device
        rows = np.random.default_rng((self._seed, step)).integers(0, len(self._tokens), self._at_once * world.size)
        tokens = self._tokens[torch.from_numpy(rows[world.rank :: world.size])].to(device)
        with autocast(device):
            logits = self._model(tokens, use_cache=False).logits
        generator = torch.Generator(device).manual_seed(self._seed + step * world.size + world.rank)
        gradients = self._gradients(logits, sampled_gradient(logits, generator))
        count = tokens.numel() * world.size
        for score, gradient in zip(self.scores.values(), gradients, strict=True):
            found = fisher_of(own_part(gradient), gradient.shape[1] // score.shape[1]) / count
            score.mul_(_MEMORY).add_(whole_rows(found, gradient), alpha=1 - _MEMORY)

    def _gradients(self, logits: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
        """By each linear's weights, summed over all processes."""
        if self._world.size == 1:
            return list(torch.autograd.grad(logits, [linear.weight for linear in self._linears.values()], upstream))
        self._model.zero_grad()
        logits.backward(upstream)
        gradients = [linear.weight.grad * self._world.size for linear in self._linears.values()]  # they are means
        self._model.zero_grad()
        return gradients

    @torch.no_grad()
    def choose(self, fraction: float) -> None:
        """Chooses the widths for that share of the training, now."""
        self.reached = self.reached or fraction >= RAMP
        allotment, bits = self._allotment, None
        if not self.reached:
            bits = allotment.start - scheduled_sparsity(allotment.start - allotment.target, fraction, RAMP)
        costs = {}
        for linears in self._parts():
            weights = {path: linear.weight for path, linear in linears.items()}
            scores = {path: self.scores[path] for path in linears}
            costs |= row_costs(weights, scores, allotment.budget.widths)
        costs = dict(zip(costs, _on_cpu(list(costs.values())), strict=True))
        chosen = allotment.choose({path: c.numpy() for path, c in costs.items()}, bits)
        wanted = [torch.from_numpy(chosen[path]) for path in self._linears]
        wanted = self._world.first_has(torch.cat(wanted), self._device).split([len(bits) for bits in wanted])
        row_bits = dict(zip(self._linears, wanted, strict=True))
        grids = []
        for linears in self._parts():
            grids += new_grids(linears, {path: row_bits[path] for path in linears})
        put_grids(grids, self._world)

    @property
    def _device(self) -> torch.device:
        return next(iter(self._linears.values())).base.device

    def _parts(self):
        """The linears with whole weights, as many at a time as are together."""
        if self._world.size == 1:
            yield self._linears
            return
        for block in self._blocks:
            inside = set(block.modules())
            with together(block):
                yield {path: linear for path, linear in self._linears.items() if linear in inside}


@torch.no_grad()
def set_widths(linears: dict[str, GroupLinear], row_bits: dict[str, torch.Tensor]) -> None:
    """Gives rows other widths, and those whose width changes new scales and zeros.

    row_bits: path -> uint8 [rows], on the CPU.
    """
    put_grids(new_grids(linears, row_bits))


def new_grids(linears: dict[str, GroupLinear], row_bits: dict[str, torch.Tensor]) -> list[tuple]:
    """Gives rows other widths. (linear, rows, scales, zeros) of those whose width changes, not put in place yet."""
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
        return []
    scales, zeros = nearest_grids(
        (linear.weight[rows] for linear, rows in changed),
        [linear.row_bits[rows] for linear, rows in changed],
        [linear.base.shape[1] for linear, _ in changed],
    )
    return [(*which, *grid) for which, *grid in zip(changed, scales, zeros, strict=True)]


def put_grids(grids: list[tuple], world: World = World()) -> None:
    """Puts what `new_grids` found in place, in each process what it has of the linears."""
    for linear, rows, scales, zeros in grids:
        linear.base[rows] = scales
        if world.size > 1:
            first, count = own_rows(linear.gains)
            mine = (rows >= first) & (rows < first + count)
            rows, zeros = rows[mine] - first, zeros[mine]
        own_part(linear.gains)[rows], own_part(linear.zeros)[rows] = 1.0, zeros


def _on_cpu(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Copies on the CPU of tensors that differ in their first dimension alone; a GPU is waited for once."""
    return torch.cat(tensors).cpu().split([len(tensor) for tensor in tensors])
