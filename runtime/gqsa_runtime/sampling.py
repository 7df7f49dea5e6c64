"""Picks the next token from logits. `choose` is the definition of what the operator `choose` computes on a device.

Logits over the temperature become integers first, and everything after that is exact in integers: which tokens top_k,
top_p and min_p keep, and which one a random number falls on. So no order of summing or sorting can matter, and equal
logits give the same token wherever it is chosen.

A token's place in the order, likeliest first:
    scaled = logit * scale, one f32 product: the logarithm of its weight to base 2
    octave = floor(scaled of the likeliest) - floor(scaled), 0 up; from OCTAVES on a token is never drawn
    step   = its 16 bits behind the point; of equal octaves the larger step comes first, of equal steps the lower token
Its weight is 2^(step / 2^16) in 24 bits (`_mantissas`), right to 2 parts in 10^7, shifted right by its octave: an
octave's weights are summed first, then shifted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gqsa_runtime.errors import InputError, ModelError

OCTAVES = 64
STEP_BITS = 16
LIMIT = np.float32(2.0**29)  # of scaled logits; beyond it they count as equal
EXPONENTIAL = (1488531108, 515749229, 119829401, 19363925, 4009631)  # 2^x = 1 + x (c0 + x (c1 + ..)), times 2^31

# A draw is i32 [DRAW]: how one token is chosen. All zeros: the likeliest is taken.
SCALE, TOP_K, SPAN, TOP_P, COUNTER = 0, 1, 2, 3, slice(4, 6)
DRAW = 6
GREEDY = np.zeros(DRAW, np.int32)
_GAMMA = 0x9E3779B97F4A7C15  # between the counters of two draws: SplitMix64


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
        """Whether the largest logit is taken."""
        return self.temperature == 0 or self.top_k == 1


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


def first_draw(options: SamplingOptions, seed: int | None = None) -> np.ndarray:
    """The draw of a generation's first token, i32 [DRAW]. seed: the same, the same random numbers; None: any.

    {scale: f32, top_k, span: how far in steps of 2^-16 octaves the kept are from the likeliest one, top_p: u32 fraction
    of 2^32, counter: u64, low half first}; top_k and top_p 0: off. repetition_penalty is not part of it.
    """
    draw = GREEDY.copy()
    if options.greedy:
        return draw
    scale = math.log2(math.e) / options.temperature if options.temperature > 2.0**-100 else 2.0**100
    draw[SCALE : SCALE + 1].view(np.float32)[:] = min(max(scale, 2.0**-100), 2.0**100)
    draw[TOP_K] = min(options.top_k, 2**31 - 1)
    draw[SPAN] = math.floor(-math.log2(options.min_p) * 2**STEP_BITS) if options.min_p else 2**31 - 1
    if options.top_p < 1:
        draw[TOP_P : TOP_P + 1].view(np.uint32)[:] = min(max(round(options.top_p * 2**32), 1), 2**32 - 1)
    draw[COUNTER].view(np.uint64)[:] = np.random.default_rng(seed).integers(2**64, dtype=np.uint64)
    return draw


def next_draw(draw: np.ndarray) -> np.ndarray:
    """The draw of the token after. The likeliest is taken without random numbers."""
    if not draw[SCALE]:
        return draw
    after = draw.copy()
    after[COUNTER].view(np.uint64)[:] += np.uint64(_GAMMA)
    return after


def choose(logits: np.ndarray, draw: np.ndarray) -> int:
    """Index of the chosen token. logits: f32 [vocab]. draw: i32 [DRAW].

    Raises ModelError as likeliest does.
    """
    best = likeliest(logits)
    scale = draw[SCALE : SCALE + 1].view(np.float32)[0]
    if scale == 0:
        return best
    tokens = _Tokens(_places(logits, best, scale))
    likeliest_place = int(tokens.places.min())
    if 0 < draw[TOP_K] < len(tokens.places):
        tokens = tokens.up_to(tokens.at_count(int(draw[TOP_K]) - 1))
    top_p = int(draw[TOP_P : TOP_P + 1].view(np.uint32)[0])
    if top_p:
        tokens = tokens.up_to(tokens.at_share(top_p << 32))
    if draw[SPAN] < OCTAVES << STEP_BITS:
        tokens = tokens.up_to(((likeliest_place >> _INDEX_BITS) + int(draw[SPAN]) << _INDEX_BITS) + _INDEX_MASK)
    random = _mixed(int(draw[COUNTER].view(np.uint64)[0]))
    return tokens.at_share(random) & _INDEX_MASK


_INDEX_BITS = 32
_INDEX_MASK = (1 << _INDEX_BITS) - 1


def _places(logits: np.ndarray, best: int, scale: np.float32) -> np.ndarray:
    """Places in the order of the tokens that may be drawn, i64: octave, 16 bits of the step turned round, index."""
    with np.errstate(over="ignore"):
        scaled = np.clip(logits * scale, -LIMIT, LIMIT)
    whole = np.floor(scaled)
    octaves = whole[best] - whole
    near = np.flatnonzero((octaves < OCTAVES) & (logits > -np.inf))
    # Just below a whole number the difference is rounded up to 1.
    most = (1 << STEP_BITS) - 1
    steps = np.minimum(((scaled[near] - whole[near]) * np.float32(1 << STEP_BITS)).astype(np.int64), most)
    places: np.ndarray = ((octaves[near].astype(np.int64) << STEP_BITS | most - steps) << _INDEX_BITS) | near
    return places


class _Tokens:
    """Tokens in order, by their places."""

    def __init__(self, places: np.ndarray) -> None:
        self.places = places
        self._octaves = places >> STEP_BITS + _INDEX_BITS
        self._counts = np.bincount(self._octaves, minlength=OCTAVES).tolist()
        # Sums of f64 that are exact: under 2^53.
        sums = np.bincount(self._octaves, weights=_weights(places), minlength=OCTAVES).tolist()
        self._masses = [int(total) >> octave for octave, total in enumerate(sums)]

    def up_to(self, last: int) -> _Tokens:
        """Those up to a place."""
        return _Tokens(self.places[self.places <= last])

    def at_count(self, position: int) -> int:
        """The place of token number `position`, from 0 on."""
        octave, before = _find(self._counts, position)
        return int(self._in_order(octave)[position - before])

    def at_share(self, fraction: int) -> int:
        """The place of the token on which the share fraction / 2^64 of all weights falls."""
        position = sum(self._masses) * fraction  # in units of 2^-64
        octave, before = _find(self._masses, position >> 64)
        position = position - (before << 64) >> 64 - octave  # in units of the octave's own weights
        places = self._in_order(octave)
        return int(places[np.searchsorted(np.cumsum(_weights(places)), position, side="right")])

    def _in_order(self, octave: int) -> np.ndarray:
        return np.sort(self.places[self._octaves == octave])


def _find(amounts: list[int], position: int) -> tuple[int, int]:
    """(which of the amounts holds a position in their sum, the sum of those before)."""
    before = 0
    for index, amount in enumerate(amounts):
        if position < before + amount:
            return index, before
        before += amount
    raise ValueError(f"position {position} is outside {before}")


def _weights(places: np.ndarray) -> np.ndarray:
    """Weights in the units of their own octaves, i64 from 2^23 up to 2^24."""
    most = (1 << STEP_BITS) - 1
    weights: np.ndarray = _mantissas()[most - (places >> _INDEX_BITS & most)]
    return weights


@functools.cache
def _mantissas() -> np.ndarray:
    """2^(step / 2^16) in units of 2^-23 for every step, i64 [2^16]."""
    x = np.arange(1 << STEP_BITS, dtype=np.uint64) << np.uint64(32 - STEP_BITS)
    power = np.zeros_like(x)
    for coefficient in reversed(EXPONENTIAL):
        power = np.uint64(coefficient) + (power * x >> np.uint64(32))
    mantissas: np.ndarray = (np.uint64(1 << 31) + (power * x >> np.uint64(32)) >> np.uint64(8)).astype(np.int64)
    return mantissas


def _mixed(counter: int) -> int:
    """A random u64 from a counter: SplitMix64."""
    mask = (1 << 64) - 1
    counter = (counter ^ counter >> 30) * 0xBF58476D1CE4E5B9 & mask
    counter = (counter ^ counter >> 27) * 0x94D049BB133111EB & mask
    return counter ^ counter >> 31


def penalize(logits: np.ndarray, seen: Sequence[int], penalty: float) -> np.ndarray:
    """A copy of f32 [vocab] logits with those of the tokens `seen` made less likely (penalty > 1)."""
    logits = logits.copy()
    tokens = np.unique(np.asarray(seen, np.int64))
    values = logits[tokens]
    logits[tokens] = np.where(values > 0, values / penalty, values * penalty)
    return logits
