"""Whether memory stays flat: opens and closes a file again and again, then generates again and again with one model.

    python benchmarks/steady_memory.py model.gqsa --opens 50 --generations 1000

Prints the resident memory after a warm-up and at the end; exit code 1 where it has grown by more than --percent.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import sys
from pathlib import Path

from gqsa_runtime import Model


def resident_bytes() -> int:
    """Of this process, after Python has let go of what it can."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def growth(what: str, work, warm_up: int, times: int) -> dict:
    """Memory and open files before and after so many times of work()."""
    for _ in range(warm_up):
        work()
    before, files = resident_bytes(), len(os.listdir("/proc/self/fd"))
    for _ in range(times):
        work()
    after = resident_bytes()
    return {
        "what": what, "times": times, "before_mb": round(before / 1e6, 2), "after_mb": round(after / 1e6, 2),
        "grown_percent": round(100 * (after / before - 1), 3), "files_left": len(os.listdir("/proc/self/fd")) - files,
    }  # fmt: skip


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--opens", type=int, default=50)
    parser.add_argument("--generations", type=int, default=1000)
    parser.add_argument("--warm-up", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--percent", type=float, default=1.0)
    arguments = parser.parse_args()

    def open_and_close() -> None:
        with Model.open(arguments.file, device=arguments.device) as model:
            "".join(model.generate("Once upon a time", max_new_tokens=4))

    found = [growth("open, generate, close", open_and_close, arguments.warm_up, arguments.opens)]
    with Model.open(arguments.file, device=arguments.device) as model:

        def generate() -> None:
            "".join(model.generate("Once upon a time", max_new_tokens=16, temperature=1.0))

        found.append(growth("generate", generate, arguments.warm_up, arguments.generations))
    print(json.dumps(found, indent=1))
    return int(any(row["grown_percent"] > arguments.percent or row["files_left"] for row in found))


if __name__ == "__main__":
    sys.exit(main())
