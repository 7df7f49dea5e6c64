"""The masks of a model in end-to-end training: removed gradually, and chosen anew by what each group costs."""

from __future__ import annotations

import torch

from gqsac.compress.fake_quant import GroupLinear
from gqsac.compress.options import Options
from gqsac.compress.select import (
    CHOOSE_UNTIL,
    LEAST_ROW_SHARE,
    RAMP,
    protect_2_of_4,
    protect_rows,
    scheduled_sparsity,
    select_globally,
    select_groups,
)

EVERY = 10  # steps between choices
_MEMORY = 0.95  # of the running mean of squared group gradients, a step


class MaskChooser:
    """Owns the masks of all GroupLinears of a model.

    scores: per linear, f32 [rows, units], the running mean over steps of (w_g . dL/dw_g)^2. By the loss's
    second-order expansion with the empirical Fisher matrix as its Hessian (as in oBERT, arXiv 2203.07259) this is,
    up to a factor common to all, what removing the group would cost; so it compares across layers. Removed
    groups are scored alike, by the gradient that passes straight through to them. reached: whether the masks have
    come to the full sparsity.
    """

    def __init__(self, linears: dict[str, GroupLinear], options: Options, already_sparse: bool):
        self._linears, self._options = linears, options
        self._ramp = 0.0 if already_sparse else RAMP
        self.scores = {path: torch.zeros_like(linear.keep, dtype=torch.float32) for path, linear in linears.items()}
        self.reached = already_sparse

    @torch.no_grad()
    def observe(self) -> None:
        """Takes in the gradients of one step."""
        for path, linear in self._linears.items():
            product = (linear.weight.float() * linear.weight.grad).view(*linear.keep.shape, -1).sum(2)
            self.scores[path].mul_(_MEMORY).addcmul_(product, product, value=1 - _MEMORY)

    @property
    def unfinished(self) -> bool:
        """Whether the masks have not yet reached the full sparsity."""
        return not self.reached and self._options.sparsity > 0

    def keeps(self) -> dict[str, torch.Tensor]:
        """The masks, bool [rows, units] each."""
        return {path: linear.keep for path, linear in self._linears.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that changes, by name, to be saved and to be copied into."""
        found = {f"keep.{path}": keep for path, keep in self.keeps().items()}
        return found | {f"score.{path}": score for path, score in self.scores.items()}

    def step(self, step: int, fraction: float) -> None:
        """Chooses the masks anew if it is time to, at the sparsity of this point of the training."""
        late = not self.reached and fraction >= CHOOSE_UNTIL  # a clock may leap over the end of the ramp
        if self._options.sparsity == 0 or step == 0 or not (late or (step % EVERY == 0 and fraction < CHOOSE_UNTIL)):
            return
        self.choose(fraction)

    @torch.no_grad()
    def choose(self, fraction: float) -> None:
        """Chooses the masks for that share of the training, now."""
        sparsity = self._options.sparsity
        if self._ramp > 0:
            sparsity = scheduled_sparsity(sparsity, fraction, self._ramp)
        self.reached = self.reached or fraction >= self._ramp
        scores = self.scores
        if self._options.pattern == "2:4":
            scores = {path: protect_2_of_4(score) for path, score in scores.items()}
        if self._options.allocation == "global":
            share = min(LEAST_ROW_SHARE, 1 - self._options.sparsity)
            keeps = select_globally({path: protect_rows(score, share) for path, score in scores.items()}, sparsity)
        else:
            keeps = {path: select_groups(score, sparsity, self._options.allocation) for path, score in scores.items()}
        for path, keep in keeps.items():
            self._linears[path].keep.copy_(keep)
