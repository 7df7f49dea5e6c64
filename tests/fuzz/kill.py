"""Kills `compress` and `build` at random moments until they finish: then their output must be what it is undisturbed.

python -m tests.fuzz.kill --kills 200                       # of each
python -m tests.fuzz.kill --kills 20 --command build --seed 3

"build" compiles its kernels anew each time, "rebuild" finds them in the cache, so that most moments are others.

After each kill there is no output, or the whole of it; at the end nothing else is left beside it, nor in the temporary
folder. Every other kill takes the compilers that a build has started along; otherwise they run on beside the next try.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from random import Random

COMMANDS = ("compress", "build", "rebuild")


def undisturbed(arguments: list[str], log: Path) -> float:
    """Seconds that the command takes in a child of this process, which has imported everything already."""
    began_s = time.monotonic()
    assert _killed(arguments, math.inf, log) is None, log.read_text()
    return time.monotonic() - began_s


def _killed(arguments: list[str], after_s: float, log: Path, group: bool = True) -> float | None:
    """Starts the command and kills it after so many seconds: returns them, or None where it had finished before."""
    pid = os.fork()
    if pid == 0:
        _run(arguments, log)
    began_s = time.monotonic()
    while time.monotonic() < began_s + after_s:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            assert code == 0, f"exit code {code}: {log.read_text()[-2000:]}"
            return None
        time.sleep(0.002)
    os.killpg(pid, signal.SIGKILL) if group else os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return after_s


def _run(arguments: list[str], log: Path) -> None:
    code = 1
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        from gqsa_runtime.cli import main

        from gqsac.cli import cli

        main(cli, arguments, "gqsac")
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        os._exit(code)


def content(path: Path) -> dict[str, bytes] | bytes | None:
    """Of a file, or of the files of a folder but for its report. None: it is not there."""
    if path.is_dir():
        from tests.unit.compress_models import folder_bytes

        return folder_bytes(path)
    return path.read_bytes() if path.exists() else None


def try_out(arguments: list[str], output: Path, kills: int, random: Random, scratch: Path, log: Path) -> dict:
    """Figures of so many kills. Raises AssertionError where an output is not what it should be."""
    beside = set(output.parent.iterdir())
    seconds = undisturbed(arguments, log)
    expected, finished, killed = content(output), 0, []
    while len(killed) < kills:
        _remove(output)
        while True:
            most_s = random.uniform(0, 1.1 * seconds) if len(killed) < kills else math.inf
            after_s = _killed(arguments, most_s, log, group=len(killed) % 2 == 0)
            found = content(output)
            if after_s is None:
                break
            killed.append(after_s)
            assert found in (None, expected), f"{output} is neither whole nor missing after {after_s:.3f} s"
            if found is not None:  # it was published, and killed before its process had ended
                _settle(arguments, output, log)
                break
        assert content(output) == expected, f"{output} differs after {len(killed)} kills"
        left = set(output.parent.iterdir()) - beside - {output}
        assert not left, f"left beside {output}: {sorted(path.name for path in left)}"
        finished += 1
    if "--no-cache" in arguments:
        undisturbed(arguments, log)  # sweeps what the compilers of killed builds wrote late
    left = sorted(path.name for path in scratch.iterdir() if path.name.startswith("gqsac-"))
    assert not left, f"left in the temporary folder: {left}"
    return {"kills": len(killed), "finished": finished, "undisturbed_s": round(seconds, 2)}


def _settle(arguments: list[str], output: Path, log: Path) -> None:
    """The same command once more. `compress` says that it is finished; `build` makes its file anew."""
    pid = os.fork()
    if pid == 0:
        _run(arguments, log)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0 or "is a finished compression" in log.read_text(), log.read_text()


def _remove(path: Path) -> None:
    import shutil

    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.kill", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="Of each command.")
    parser.add_argument("--command", choices=COMMANDS, action="append")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        folder = Path(name)
        scratch = folder / "scratch"
        scratch.mkdir()
        os.environ |= {"OMP_NUM_THREADS": "1", "TMPDIR": str(scratch), "GQSAC_CACHE": str(folder / "cache")}
        tempfile.tempdir = None  # read anew
        import torch

        import gqsac.compiler.pipeline
        import gqsac.compress.run  # noqa: F401, what is imported here need not be in each child
        from tests.unit.compress_models import TEXT, save_model

        torch.set_num_threads(1)
        source, text = save_model(folder / "source"), folder / "text.txt"
        text.write_text(TEXT)
        work, log = folder / "work", folder / "log"
        work.mkdir()
        sizes = ("--samples", "16", "--seq-len", "16", "--epochs", "1", "--e2e-steps", "20", "--batch-tokens", "64")
        compress = ["compress", str(source), "-o", str(work / "out"), "--calibration", str(text), "--device", "cpu",
                    "--sparsity", "0.5", "--stages", "bqpo,e2e-oqp", *sizes]  # fmt: skip
        build = ["build", str(source), "-o", str(work / "out.gqsa"), "--bits", "4", "--target", "x86_64_v3"]
        for command in arguments.command or COMMANDS:
            arguments_of = {"compress": compress, "build": [*build, "--no-cache"], "rebuild": build}
            output = work / ("out" if command == "compress" else "out.gqsa")
            if command != "compress":
                undisturbed(arguments_of[command], log)  # fills the compilers' caches, and that of kernels
                _remove(output)
            random = Random(f"{command} {arguments.seed}")
            figures = try_out(arguments_of[command], output, arguments.kills, random, scratch, log)
            print(json.dumps({"command": command, **figures}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
