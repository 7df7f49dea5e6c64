"""Tries mutants, each in a forked child with limits of time and memory, and tells what came of them.

python -m tests.fuzz --seconds 300 --jobs 2            # as long as one likes
python -m tests.fuzz --kind tokenizer --mutants 100000 --seed 7
python -m tests.fuzz --replay tests/fuzz/seeds/*       # mutants that failed once

A mutant is made from its kind and number alone. What fails is kept in --keep, named by both; then the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from random import Random

SEEDS = Path(__file__).parent / "seeds"
_BATCH = 100  # mutants a job
_CHILD = 20  # mutants a child


def mutant(kind: str, number: int) -> bytes:
    """The bytes of one mutant."""
    from tests.fuzz.kinds import KINDS

    return KINDS[kind].make(Random(f"{kind} {number}"))


def try_out(kind: str, mutants: list[bytes]) -> list:
    """Outcomes of mutants, each in a child as tests.fuzz.limited has it."""
    from tests.fuzz.kinds import KINDS
    from tests.fuzz.limited import run_all_limited

    chosen = KINDS[kind]
    works = [lambda data=data: chosen.use(data) for data in mutants]
    return run_all_limited(works, chosen.seconds, chosen.memory_bytes + max(map(len, mutants)))


def batch(kind: str, first: int, until_s: float, keep: str, count: int = _BATCH) -> dict:
    """Figures of mutants first, first + 1, …: counts by outcome, the slowest and the largest."""
    from tests.fuzz.limited import FAILURES

    counts, slowest, largest, failed = Counter(), (0.0, -1), (0, -1), []
    for start in range(first, first + count, _CHILD):
        if time.time() > until_s:
            break
        numbers = range(start, min(start + _CHILD, first + count))
        mutants = [mutant(kind, number) for number in numbers]
        for number, data, outcome in zip(numbers, mutants, try_out(kind, mutants), strict=True):
            if outcome.kind == "hang":  # once more: the machine may have been busy with something else
                (outcome,) = try_out(kind, [data])
            counts[outcome.kind] += 1
            slowest = max(slowest, (outcome.seconds, number))
            largest = max(largest, (outcome.grown_bytes, number))
            if outcome.kind in FAILURES:
                failed.append(f"{kind}-{number}: {outcome.kind}: {outcome.detail[-1500:]}")
                Path(keep).mkdir(parents=True, exist_ok=True)
                (Path(keep) / f"{kind}-{number}").write_bytes(data)
    return {"kind": kind, "counts": counts, "slowest": slowest, "largest": largest, "failed": failed}


def run(kinds: dict[str, float], seconds: float, mutants: int, seed: int, jobs: int, keep: str) -> dict:
    """Figures by kind of a run that ends after so many seconds or mutants."""
    began_s = time.time()
    figures = {kind: {"counts": Counter(), "slowest": (0.0, -1), "largest": (0, -1), "failed": []} for kind in kinds}
    next_number = dict.fromkeys(kinds, seed * 1_000_000_000)
    spent, total = dict.fromkeys(kinds, 0.0), 0
    with ProcessPoolExecutor(jobs) as pool:
        pending = {}
        while True:
            while len(pending) < jobs and time.time() < began_s + seconds and total < mutants:
                # The kind that has had the least of its share.
                kind = min(kinds, key=lambda kind: spent[kind] / kinds[kind])
                spent[kind] += 0.01  # until it is known
                count = min(_BATCH if kind != "template" else 10, mutants - total)
                arguments = (kind, next_number[kind], began_s + seconds, keep, count)
                pending[pool.submit(batch, *arguments)] = time.time()
                next_number[kind] += count
                total += count
            if not pending:
                break
            done = wait(pending, return_when=FIRST_COMPLETED).done.pop()
            found, started_s = done.result(), pending.pop(done)
            kind, into = found["kind"], figures[found["kind"]]
            spent[kind] += time.time() - started_s
            into["counts"] += found["counts"]
            into["slowest"] = max(into["slowest"], found["slowest"])
            into["largest"] = max(into["largest"], found["largest"])
            into["failed"] += found["failed"]
    return {"seconds": round(time.time() - began_s, 1), "kinds": figures}


def main() -> int:
    """The command line. Exit code 1 where a mutant failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--mutants", type=int, default=sys.maxsize)
    parser.add_argument("--kind", action="append", help="Only this kind. May be given several times.")
    parser.add_argument("--seed", type=int, default=0, help="Other mutants for another number.")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--keep", default="fuzz-failures", help="Folder for mutants that fail.")
    parser.add_argument("--replay", nargs="*", help="Files of mutants, named by their kind, in place of new ones.")
    arguments = parser.parse_args()
    from tests.fuzz.kinds import SHARES
    from tests.fuzz.limited import FAILURES

    if arguments.replay is not None:
        outcomes = []
        for path in map(Path, arguments.replay):
            outcomes += try_out(path.name.split("-")[0], [path.read_bytes()])
            print(f"{path}: {outcomes[-1].kind}: {outcomes[-1].detail[-1500:]}")
        return any(outcome.kind in FAILURES for outcome in outcomes)
    kinds = {kind: SHARES[kind] for kind in arguments.kind or SHARES}
    found = run(kinds, arguments.seconds, arguments.mutants, arguments.seed, arguments.jobs, arguments.keep)
    print(json.dumps(found, indent=1))
    return any(figures["failed"] for figures in found["kinds"].values())


if __name__ == "__main__":
    sys.exit(main())
