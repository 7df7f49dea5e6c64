"""Whether memory stays flat: opens and closes a file again and again, then generates again and again with one model.

    python benchmarks/steady_memory.py model.gqsa --opens 50 --generations 1000
    python benchmarks/steady_memory.py model.gqsa --device cuda

Prints the resident memory after a warm-up and at the end, and on a GPU how much of its free memory has gone meanwhile;
exit code 1 where either has grown by more than --percent: of the resident memory, and of what one open model takes on
the GPU. Others that use it meanwhile are seen, too.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

from gqsa_runtime import Model, device_cuda
from gqsa_runtime.load import parse_device


def resident_bytes() -> int:
    """Of this process, after Python has let go of what it can."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def free_bytes(ordinal: int) -> int:
    """Of a GPU, in which this process has a context when it is asked."""
    with device_cuda.free_bytes(ordinal) as free:
        return free


def growth(
    what: str, work: Callable[[], None], warm_up: int, times: int, ordinal: int | None, model_bytes: int
) -> dict:
    """Memory and open files before and after so many times of work(). ordinal: of the GPU, None without one."""
    for _ in range(warm_up):
        work()
    free = None if ordinal is None else free_bytes(ordinal)
    before, files, began_s = resident_bytes(), len(os.listdir("/proc/self/fd")), time.monotonic()
    for _ in range(times):
        work()
    after, took_s = resident_bytes(), time.monotonic() - began_s
    row = {
        "what": what, "times": times, "seconds": round(took_s, 1), "before_mb": round(before / 1e6, 2),
        "after_mb": round(after / 1e6, 2), "grown_percent": round(100 * (after / before - 1), 3),
        "files_left": len(os.listdir("/proc/self/fd")) - files,
    }  # fmt: skip
    if ordinal is not None:
        gone = free - free_bytes(ordinal)
        row |= {"device_grown_mb": round(gone / 1e6, 2), "device_grown_percent": round(100 * gone / model_bytes, 3)}
    return row


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--opens", type=int, default=50)
    parser.add_argument("--generations", type=int, default=1000)
    # A driver and an allocator go on taking memory for the first some fifty contexts, and then no more.
    parser.add_argument("--warm-up", type=int, default=60)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N.")
    parser.add_argument("--percent", type=float, default=1.0)
    arguments = parser.parse_args()
    kind, number = parse_device(arguments.device)
    ordinal = number if kind == "cuda" else None

    def open_and_close() -> None:
        with Model.open(arguments.file, device=arguments.device) as model:
            "".join(model.generate("Once upon a time", max_new_tokens=4))

    model_bytes = 0
    if ordinal is not None:
        free = free_bytes(ordinal)
        with Model.open(arguments.file, device=arguments.device):
            model_bytes = free - free_bytes(ordinal)
    on = (ordinal, model_bytes)
    found = [growth("open, generate, close", open_and_close, arguments.warm_up, arguments.opens, *on)]
    with Model.open(arguments.file, device=arguments.device) as model:

        def generate() -> None:
            "".join(model.generate("Once upon a time", max_new_tokens=16, temperature=1.0))

        found.append(growth("generate", generate, arguments.warm_up, arguments.generations, *on))
        print(
            json.dumps(
                {"device": model.device.name, "model_on_device_mb": round(model_bytes / 1e6, 1), "found": found},
                indent=1,
            )
        )
    grown = [row.get(name, 0) for row in found for name in ("grown_percent", "device_grown_percent")]
    return int(max(grown) > arguments.percent or any(row["files_left"] for row in found))


if __name__ == "__main__":
    sys.exit(main())
