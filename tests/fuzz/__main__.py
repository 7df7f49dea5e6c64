"""Tries mutants, each in a forked child with limits of time and memory, and tells what came of them.

python -m tests.fuzz --seconds 300 --jobs 2                          # as long as one likes
python -m tests.fuzz --mutants 1000000 --seed 7 --json fuzz.json     # so many; of each kind its share
python -m tests.fuzz --mutants 1000000 --seed 7 --seconds 3600       # or as many of those as an hour allows
python -m tests.fuzz --add one.json two.json                         # the figures of several such runs as one
python -m tests.fuzz --replay tests/fuzz/seeds/*                     # mutants that failed once

A mutant is made from its kind and number alone, and no number belongs to two seeds, so a large run may be shared among
machines, each with a seed of its own. What fails is kept in --keep, named by both; then the exit code is 1.
It needs what the runtime needs, and neither PyTorch nor a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from random import Random

from tqdm import tqdm

from tests.fuzz import figures

SEEDS = Path(__file__).parent / "seeds"
_BATCH = 100  # mutants a job
_CHILD = 50  # mutants a child


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


def run(kinds: Sequence[str], seconds: float, mutants: int | None, seed: int, jobs: int, keep: str) -> dict:
    """Figures by kind of a run that ends after so many mutants, or seconds where they are fewer.

    mutants: of each kind its share of them, whatever the machine. None: each kind has its share of the time.
    """
    from tests.fuzz.kinds import KINDS

    began_s = time.time()
    found = figures.none(kinds)
    left = dict.fromkeys(kinds, sys.maxsize) if mutants is None else _quotas(kinds, mutants)
    shares = {kind: KINDS[kind].time_share if mutants is None else KINDS[kind].count_share for kind in kinds}
    next_number, had = dict.fromkeys(kinds, seed * 1_000_000_000), dict.fromkeys(kinds, 0.0)
    progress = tqdm(total=mutants, unit=" mutants", disable=None)
    with ProcessPoolExecutor(jobs) as pool, progress:
        pending = {}
        while True:
            while len(pending) < jobs and time.time() < began_s + seconds and any(left.values()):
                # The kind that has had the least of its share.
                kind = min(filter(left.get, kinds), key=lambda kind: had[kind] / shares[kind])
                count = min(_BATCH if kind != "template" else 10, left[kind])
                had[kind] += 0.01 if mutants is None else count  # the time until it is known
                arguments = (kind, next_number[kind], began_s + seconds, keep, count)
                pending[pool.submit(batch, *arguments)] = time.time()
                next_number[kind] += count
                left[kind] -= count
            if not pending:
                break
            done = wait(pending, return_when=FIRST_COMPLETED).done.pop()
            tried, started_s = done.result(), pending.pop(done)
            kind = tried.pop("kind")
            had[kind] += time.time() - started_s if mutants is None else 0
            figures.add(found[kind], tried)
            progress.update(tried["counts"].total())
    return {"process_seconds": round((time.time() - began_s) * jobs, 1), "seeds": [seed], "kinds": found}


def _quotas(kinds: Sequence[str], mutants: int) -> dict[str, int]:
    """How many mutants of each kind, so many in all."""
    from tests.fuzz.kinds import KINDS

    total, quotas, given, shares = sum(KINDS[kind].count_share for kind in kinds), {}, 0, 0
    for kind in kinds:
        shares += KINDS[kind].count_share
        quotas[kind] = mutants * shares // total - given
        given += quotas[kind]
    return quotas


def main() -> int:
    """The command line. Exit code 1 where a mutant failed."""
    from tests.fuzz.kinds import KINDS
    from tests.fuzz.limited import FAILURES, why_not_here

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, help="At most. [30, or as long as --mutants take]")
    parser.add_argument("--mutants", type=int, help="How many in all.")
    parser.add_argument("--kind", action="append", choices=KINDS, help="Only this kind. May be given several times.")
    parser.add_argument("--seed", type=int, default=0, help="Other mutants for another number.")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--keep", default="fuzz-failures", help="Folder for mutants that fail.")
    parser.add_argument("--json", help="A file for the figures, with the reason of every failure.")
    parser.add_argument("--replay", nargs="*", help="Files of mutants, named by their kind, in place of new ones.")
    parser.add_argument("--add", nargs="+", metavar="JSON", help="Only adds up what runs have written with --json.")
    arguments = parser.parse_args()
    if arguments.add:
        try:
            found = figures.total([json.loads(Path(path).read_text()) for path in arguments.add])
        except (OSError, ValueError) as error:
            parser.error(str(error))
        return _tell(found, arguments.json)
    if why := why_not_here():
        parser.error(why)
    if arguments.replay is not None:
        outcomes = []
        for path in map(Path, arguments.replay):
            outcomes += try_out(path.name.split("-")[0], [path.read_bytes()])
            print(f"{path}: {outcomes[-1].kind}: {outcomes[-1].detail[-1500:]}")
        return any(outcome.kind in FAILURES for outcome in outcomes)
    seconds = arguments.seconds or (30 if arguments.mutants is None else math.inf)
    kinds = [kind for kind in KINDS if kind in (arguments.kind or KINDS)]
    found = run(kinds, seconds, arguments.mutants, arguments.seed, arguments.jobs, arguments.keep)
    return _tell(found, arguments.json)


def _tell(found: dict, path: str | None) -> bool:
    """Prints figures, and writes them to a file where one is named. Returns whether anything failed."""
    if path:
        Path(path).write_text(json.dumps(found, indent=1))
    print(figures.table(found))
    failed = [reason for of_kind in found["kinds"].values() for reason in of_kind["failed"]]
    print(*failed[:20], *[f"… and {len(failed) - 20} more"][: len(failed) > 20], sep="\n", end="")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
