"""Picks the next token from logits: NumPy, one pass over the vocabulary where that is enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gqsa_runtime.errors import InputError, ModelError

_FIRST_CANDIDATES = 1024  # sorted first; nearly always enough to hold top_p of the mass


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose. Applied in this order: repetition_penalty, temperature, top_k, top_p, min_p.

    temperature: 0 takes the most likely token. top_k: 0 keeps all. top_p: keeps the fewest tokens that
    hold this mass. min_p: drops tokens below this share of the likeliest one's probability.
    repetition_penalty: divides positive logits of tokens already seen, multiplies negative ones.
    Raises InputError where a number is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, value, good, expected in (
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p < 1, "0 or more and below 1"),
            ("repetition_penalty", self.repetition_penalty, 1e-3 <= self.repetition_penalty <= 1e9, "0.001 to 1e9"),
        ):
            if not good:
                raise InputError(f"{name} is {value}, expected {expected}")

    @property
    def greedy(self) -> bool:
        """Whether logits alone decide, and the largest is taken."""
        return (self.temperature == 0 or self.top_k == 1) and self.repetition_penalty == 1


def likeliest(logits: np.ndarray) -> int:
    """Index of the largest logit, f32 [vocab]; of equal ones the first.

    Raises ModelError where the logits hold NaN, as damaged weights or a broken kernel make them.
    """
    best = int(logits.argmax())  # NaN counts as the greatest
    if not np.isfinite(logits[best]):
        raise not_finite()
    return best


def not_finite() -> ModelError:
    """What to raise where no token can be chosen."""
    return ModelError("the model computed logits that are not finite; check the file with `gqsa verify`")


def sample(
    logits: np.ndarray, options: SamplingOptions, generator: np.random.Generator, seen: Sequence[int] = ()
) -> int:
    """Index of the chosen token. logits: f32 [vocab], left as they are. seen: tokens to penalise.

    Raises ModelError as likeliest does.
    """
    if options.repetition_penalty != 1.0 and len(seen):
        logits = penalize(logits, seen, options.repetition_penalty)
    best = likeliest(logits)
    if options.temperature == 0 or options.top_k == 1:
        return best
    candidates, weights = _nucleus(logits, float(logits[best]), options)
    cumulated = np.cumsum(weights)
    # random() < 1, but its product with the sum may round up to the sum.
    index = np.searchsorted(cumulated, generator.random() * cumulated[-1], side="right")
    return int(candidates[min(index, len(candidates) - 1)])


def penalize(logits: np.ndarray, seen: Sequence[int], penalty: float) -> np.ndarray:
    """A copy of f32 [vocab] logits with those of the tokens `seen` made less likely (penalty > 1)."""
    logits = logits.copy()
    tokens = np.unique(np.asarray(seen, np.int64))
    values = logits[tokens]
    logits[tokens] = np.where(values > 0, values / penalty, values * penalty)
    return logits


def _nucleus(logits: np.ndarray, greatest: float, options: SamplingOptions) -> tuple[np.ndarray, np.ndarray]:
    """Candidate tokens and their unnormalised probabilities, float64; likeliest first where top_k or top_p ask."""
    with np.errstate(over="ignore"):  # a tiny temperature: -inf is the right limit
        weights = np.exp((logits.astype(np.float64) - greatest) / options.temperature)
    if not options.top_k and options.top_p == 1:  # no order is needed, and sorting a vocabulary takes milliseconds
        kept = np.flatnonzero(weights >= (options.min_p or np.finfo(np.float64).tiny))
        return kept, weights[kept]
    n_candidates = min(options.top_k or len(logits), len(logits))
    # With top_k the mass that top_p refers to is that of the k tokens alone.
    total = None if options.top_k else float(weights.sum())
    count = n_candidates if options.top_k else min(_FIRST_CANDIDATES, n_candidates)
    order = _largest(weights, count)
    while count < n_candidates and weights[order].sum() < options.top_p * (total or 0.0):
        count = min(8 * count, n_candidates)
        order = _largest(weights, count)
    chosen = weights[order]
    if options.top_p < 1:
        before = np.cumsum(chosen) - chosen
        chosen = chosen[before < options.top_p * (total or chosen.sum())]
    if options.min_p > 0:
        chosen = chosen[chosen >= options.min_p]  # the likeliest has the weight 1
    return order[: len(chosen)], chosen


def _largest(weights: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest weights, largest first; equal ones by index."""
    partial = count < len(weights)
    indices = np.sort(np.argpartition(weights, -count)[-count:]) if partial else np.arange(len(weights))
    return indices[np.argsort(-weights[indices], kind="stable")]
