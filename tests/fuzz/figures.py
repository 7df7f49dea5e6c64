"""Figures of runs: added up, and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tests.fuzz.limited import FAILURES


def none(kinds: Sequence[str]) -> dict[str, dict]:
    """Figures by kind of no mutants at all."""
    return {kind: {"counts": Counter(), "slowest": (0.0, -1), "largest": (0, -1), "failed": []} for kind in kinds}


def add(into: dict, figures: dict) -> None:
    """Adds figures of a kind to others of it. slowest, largest: a measure and the number of its mutant."""
    into["counts"].update(figures["counts"])
    for most in ("slowest", "largest"):
        into[most] = max(into[most], tuple(figures[most]))
    into["failed"] += figures["failed"]


def total(runs: Sequence[dict]) -> dict:
    """The figures of several runs as if they were one. Raises ValueError where two tried the same mutants."""
    seeds = [seed for run in runs for seed in run["seeds"]]
    if twice := [seed for seed, count in Counter(seeds).items() if count > 1]:
        raise ValueError(f"seed {twice[0]} occurs twice, so mutants would be counted twice; leave one of its runs out")
    kinds = none(list(dict.fromkeys(kind for run in runs for kind in run["kinds"])))
    for run in runs:
        for kind, figures in run["kinds"].items():
            add(kinds[kind], figures)
    return {"process_seconds": sum(run["process_seconds"] for run in runs), "seeds": seeds, "kinds": kinds}


def table(found: dict) -> str:
    """Figures as a table in Markdown, a row a kind."""
    rows = [("kind", "mutants", "refused", "accepted", "failed", "slowest, s", "most memory grown, MB")]
    for kind, figures in found["kinds"].items():
        counts = figures["counts"]
        numbers = [counts.total(), counts["refused"], counts["accepted"], sum(counts[name] for name in FAILURES)]
        rows.append((kind, *map(str, numbers), f"{figures['slowest'][0]:.2f}", f"{figures['largest'][0] / 1e6:.1f}"))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    n_mutants = sum(figures["counts"].total() for figures in found["kinds"].values())
    each_ms = 1000 * found["process_seconds"] / max(n_mutants, 1)
    seeds = ", ".join(map(str, found["seeds"]))
    said = f"{n_mutants} mutants, seed {seeds}: {found['process_seconds']:.0f} s of a process, {each_ms:.1f} ms each."
    return "\n".join([*lines, "", said])
