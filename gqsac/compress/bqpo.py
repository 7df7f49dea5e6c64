"""BQPO, block-wise quantisation-pruning optimisation (GQSA, arXiv 2412.17560, section 3.3).

Each block's weights, scales and zeros learn to give the uncompressed block's outputs (the targets, from the
full-precision stream) on the inputs that the compressed blocks before it make. The training starts from the
one-shot block, whose weights have already taken on the errors of the removed groups, and keeps its mask. Or, with
removal="gradual", it starts with all groups, which go gradually and are chosen anew while the weights learn; the
removed ones go on learning, straight through, and may come back. The first was measured to be better.
The recipe of the optimisation is EfficientQAT's Block-AP (arXiv 2407.11062), the schedule of removal is
Zhu and Gupta's (arXiv 1710.01878).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from gqsa_runtime.errors import ModelError
from torch import nn

from gqsac.compress.blocks import BlockRunner
from gqsac.compress.clock import Clock, learning_rate_factor
from gqsac.compress.compiled import compiled_block
from gqsac.compress.fake_quant import GroupLinear
from gqsac.compress.losses import relative_error
from gqsac.compress.one_shot import Siblings, choose_mask, quantize_block
from gqsac.compress.options import Options
from gqsac.compress.quantize import QuantizedLinear
from gqsac.compress.select import CHOOSE_UNTIL, RAMP, scheduled_sparsity
from gqsac.compress.trainable import (
    adamw,
    autocast,
    install,
    parameter_groups,
    set_learning_rates,
    set_master_dtype,
)

_STOP_FROM = 0.5  # with a mask that stays, the share of the training from which it may stop early
_MASKS = 40  # masks chosen during a training
_BATCH_TOKENS = 4096  # of a step at most
_STEPS_PER_EPOCH = 32  # wished for: few samples make small steps
_LEAST_GAIN = 1e-3  # an epoch that gains less than this share of the loss is the last


@dataclass
class BlockResult:
    """linears: path -> compressed linear. before, after: relative error on samples that were not trained on
    (on the trained ones if there are fewer than 8), one-shot at full sparsity and trained. kept: "trained", or
    "one-shot" where training was no better, or "dense" where nothing is compressed. epochs: that were run. seconds:
    of training.
    """

    linears: dict[str, QuantizedLinear]
    before: float
    after: float
    kept: str
    epochs: int
    seconds: float
    curve: list[float]


class BlockTrainer:
    """Trains one block. `block` is left with the trained linears in it."""

    def __init__(
        self,
        index: int,
        block: nn.Module,
        linears: dict[str, nn.Linear],
        runner: BlockRunner,
        siblings: list[Siblings],
        rates: dict[str, float],
        row_bits: dict[str, torch.Tensor],
        options: Options,
    ):
        self._index, self._block, self._runner, self._options = index, block, runner, options
        self._siblings, self._rates, self._row_bits = siblings, rates, row_bits
        self._weights = {path: linear.weight.detach() for path, linear in linears.items()}
        self._biases = {path: linear.bias for path, linear in linears.items()}
        count = len(runner.hidden)
        held_out = count // 8
        self._train, self._check = np.arange(count - held_out), np.arange(count - held_out if held_out else 0, count)
        self._batch = max(1, min(len(self._train) // _STEPS_PER_EPOCH, _BATCH_TOKENS // runner.hidden.shape[1]))

    def train(self, seconds: float | None) -> BlockResult:
        """Runs the block's epochs, at most for `seconds`. Raises ModelError when the loss is not finite."""
        options = self._options
        if not self._weights:  # all of the block's linears stay dense
            error = self._error()
            return BlockResult({}, error, error, "dense", 0, 0.0, [])
        one_shot = quantize_block(self._weights, self._siblings, self._rates, self._row_bits, options)
        before = self._error_with(one_shot)
        gradual = options.removes_gradually("bqpo")
        ramp = RAMP if gradual else 0.0
        start = one_shot
        if gradual:
            none = dict.fromkeys(self._rates, 0.0)
            start = quantize_block(self._weights, self._siblings, none, self._row_bits, options)
        modules = {
            path: GroupLinear.from_quantized(start[path], self._biases[path], options.zeros_between_levels)
            for path in self._weights
        }
        del start
        set_master_dtype(modules, options.master_dtype)
        install(self._block, modules)
        self._forward = compiled_block(self._block, self._runner.device)
        optimizer = adamw(parameter_groups(modules, options.rates("bqpo")), self._runner.device)
        per_epoch = -(-len(self._train) // self._batch)
        steps = options.epochs * per_epoch
        clock = Clock(steps, seconds)
        every = max(1, steps // _MASKS)
        step, epochs, curve, best = 0, 0, [], (float("inf"), None)
        chosen_at = None if gradual else 1.0  # share of the training at which the mask was last chosen
        while clock.fraction(step) < 1 or best[1] is None:
            order = np.random.default_rng((options.seed, self._index, epochs)).permutation(self._train)
            losses = []
            for first in range(0, len(order), self._batch):
                fraction = clock.fraction(step)
                if fraction >= 1 and step and chosen_at >= ramp:
                    break
                due = step % every == 0 and fraction < CHOOSE_UNTIL
                if gradual and (due or chosen_at is None or chosen_at < ramp <= fraction):
                    self._choose(modules, fraction)
                    chosen_at = fraction
                set_learning_rates(optimizer, learning_rate_factor(fraction))
                losses.append(self._step(modules, optimizer, order[first : first + self._batch]))
                step += 1
            epochs += 1
            curve.append(float(torch.stack(losses).mean()) if losses else curve[-1])
            if not np.isfinite(curve[-1]):
                raise ModelError(
                    f"the loss of the training became {curve[-1]} in epoch {epochs}; finished blocks are kept, so "
                    "give the same command with a lower --weight-lr and --scale-lr to go on from here"
                )
            if chosen_at >= ramp:  # before, the mask is not yet the one to keep
                error = self._error()
                enough = error < best[0] * (1 - _LEAST_GAIN)
                if error < best[0] or best[1] is None:
                    best = (error, {path: _copied(module.export()) for path, module in modules.items()})
                if not enough and clock.fraction(step) >= (CHOOSE_UNTIL if gradual else _STOP_FROM):
                    break
        after, trained = best
        kept = "trained" if after < before else "one-shot"
        linears = trained if kept == "trained" else one_shot
        return BlockResult(linears, before, min(after, before), kept, epochs, clock.spent_s, curve)

    def _choose(self, modules: dict[str, GroupLinear], fraction: float) -> None:
        for group in self._siblings:
            for path in group.paths:
                sparsity = scheduled_sparsity(self._rates[path], fraction, RAMP)
                weight = modules[path].weight.detach().float()
                modules[path].keep.copy_(choose_mask(weight, group.metrics, sparsity, self._options))

    def _step(self, modules, optimizer, rows) -> torch.Tensor:
        with autocast(self._runner.device):
            output = self._runner.call(self._index, self._forward, self._on_device(self._runner.hidden, rows))
        loss = relative_error(output, self._on_device(self._runner.reference, rows))
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        optimizer.zero_grad()  # the old gradients are not to lie beside the new
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.detach()

    def _on_device(self, states: torch.Tensor, rows) -> torch.Tensor:
        return states[torch.from_numpy(rows)].to(self._runner.device)

    @torch.no_grad()
    def _error(self) -> float:
        total = 0.0
        for first in range(0, len(self._check), self._batch):
            rows = self._check[first : first + self._batch]
            with autocast(self._runner.device):
                output = self._runner.call(self._index, self._block, self._on_device(self._runner.hidden, rows))
            total += len(rows) * float(relative_error(output, self._on_device(self._runner.reference, rows)))
        return total / len(self._check)

    def _error_with(self, linears: dict[str, QuantizedLinear]) -> float:
        """Error of the block with these compressed linears, the uncompressed ones put back after."""
        modules = {path: self._block.get_submodule(path) for path in linears}
        try:
            for path, part in linears.items():
                modules[path].weight.data = part.dequantize()
            return self._error()
        finally:
            for path, module in modules.items():
                module.weight.data = self._weights[path]


def _copied(part: QuantizedLinear) -> QuantizedLinear:
    return replace(part, keep=part.keep.clone(), adjusted=part.adjusted.clone())
