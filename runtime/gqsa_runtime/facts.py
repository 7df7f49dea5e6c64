"""What is known of a file's model beside its program and weights. It is carried in the metadata, for people."""

from __future__ import annotations

import json
import math
from typing import Any

from gqsa_runtime import format as gqsa
from gqsa_runtime.errors import FormatError

# How far a compressed model is from the uncompressed one, on n_tokens tokens of the calibration text: KL in nats a
# token, its mean and 99th percentile; the share of positions at which the likeliest next token is another (flips); the
# perplexities of both.
MEASURES = ("kl", "kl_99", "flips", "perplexity", "reference_perplexity", "n_tokens")


def facts_json(sparsity: float, measured: dict[str, float] | None) -> str:
    """The text for the metadata, always of FACTS_CHARACTERS: a file's size is known before anything is measured.

    sparsity: share of the weights in removed groups. measured: MEASURES, or None where nothing was.
    """
    values = measured and {name: float(f"{measured[name]:.6g}") for name in MEASURES}
    text = gqsa.canonical_json({"measured": values, "sparsity": float(f"{sparsity:.6g}")})
    return text.ljust(gqsa.FACTS_CHARACTERS)


def read_facts(text: str, where: str) -> dict[str, Any]:
    """The object of `facts_json`. Raises FormatError, which names `where`, for anything else."""
    try:
        facts = json.loads(text)
        measured, sparsity = facts["measured"], facts["sparsity"]
        wrong = not _is_number(sparsity) or sparsity > 1 or (measured is not None and not is_measured(measured))
    except (ValueError, RecursionError, KeyError, TypeError):
        wrong = True
    if wrong:
        raise FormatError(
            f"{where}: the metadata string {gqsa.KEY_FACTS!r} does not hold a sparsity and measures; build it again"
        )
    return {"sparsity": sparsity, "measured": measured}


def is_measured(value: object) -> bool:
    """Whether it is an object of MEASURES, all numbers of 0 or more."""
    return isinstance(value, dict) and value.keys() == set(MEASURES) and all(map(_is_number, value.values()))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
