"""Opens files whose plan, indices, widths or masks were changed, and runs those that the reader accepts under
compute-sanitizer's memcheck: none may lead a kernel out of its memory.

python -m tests.gpu.hostile_plans --make seeds                   # three tiny files; needs the compiler, no GPU
python -m tests.gpu.hostile_plans seeds --files 500 --jobs 8     # needs a GPU, the runtime and compute-sanitizer
python -m tests.gpu.hostile_plans seeds --device cpu             # without memcheck: only crashes and hangs are seen

Every tensor, KV cache and rotary table is given memory of its own, so that memcheck sees one that is left for another;
activations share theirs. The sound files are run too: they must be clean. A mutant is made from the seed files and its
number alone; what fails is kept in --keep. Exit code 1 where anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "It was the best of times, it was the worst of times"
MEMCHECK = ("--tool", "memcheck", "--report-api-errors", "no", "--print-limit", "5", "--log-file")
FAILURES = ("findings", "crash", "hang", "untyped")
_BATCH = 12  # files that one process runs one after another
_SECONDS = 60  # without a sign from a process: it hangs


def make_seeds(folder: Path) -> None:
    """Writes three tiny LLaMAs for sm_90 and for CPUs: masked records of 4 bits, widths by row, and group words."""
    from tests.e2e.checkpoints import save_checkpoint
    from tests.e2e.command import succeed

    options = {
        "masked": ("--quant-group-size", 64, "--sparsity", 0.25),
        "mixed": ("--target-bpw", 3.2),
        "words": ("--quant-group-size", 16, "--sparsity", 0.25),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        source = save_checkpoint(Path(scratch) / "source", "llama", seed=2, intermediate_size=128)
        for name, chosen in options.items():
            compressed = Path(scratch) / name
            succeed("compress", source, "-o", compressed, *chosen, "--samples", 4, "--seq-len", 32)
            file = folder / f"{name}.gqsa"
            file.unlink(missing_ok=True)
            succeed("build", compressed, "-o", file, "--target", "sm_90", "--target", "x86_64_v3")


@dataclass
class Outcome:
    """How a file ended: "refused" (by the reader), "ran", "ended" (a GqsaError while it ran) or one of FAILURES."""

    kind: str
    detail: str = ""


@dataclass
class Watch:
    """Runs files in processes of their own.

    device: of Model.open. prefix: a command line before Python's, which gets the path of its log; a log that tells of
    errors is a finding. command: what runs files. seconds: without a sign from a process, which is a hang.
    """

    device: str
    prefix: Sequence[str] = ()
    command: Sequence[str] = (sys.executable, "-m", "tests.gpu.hostile_plans", "--run")
    seconds: float = _SECONDS
    logs: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="hostile-")))

    def run(self, files: Sequence[Path]) -> dict[Path, Outcome]:
        """How each file ends. Findings among several files: those run again, each alone."""
        outcomes: dict[Path, Outcome] = {}
        while left := [path for path in files if path not in outcomes]:
            ended, findings = self._process(left)
            if findings and len(ended) > 1:
                for path in ended:
                    outcomes |= self.run([path])
                continue
            if findings:
                ended = {path: Outcome("findings", findings) for path in ended}
            outcomes |= ended
        return outcomes

    def _process(self, files: Sequence[Path]) -> tuple[dict[Path, Outcome], str]:
        """(outcomes of one process, of at least one file, what the log tells of errors)."""
        log = self.logs / f"{threading.get_ident()}-{time.monotonic_ns()}"
        prefix = (*self.prefix, str(log)) if self.prefix else ()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "runtime")])}
        ended: dict[Path, Outcome] = {}
        complaints, said = log.with_suffix(".stderr"), b""
        with complaints.open("wb") as errors, subprocess.Popen(
            [*prefix, *self.command, self.device, *map(str, files)],
            cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
            start_new_session=True,
        ) as process:  # fmt: skip
            while select.select([process.stdout], [], [], self.seconds)[0]:
                part = os.read(process.stdout.fileno(), 1 << 16)
                if not part:
                    break
                *lines, said = (said + part).split(b"\n")
                for line in lines:
                    if line.startswith(b"{"):  # compute-sanitizer may say something too
                        report = json.loads(line)
                        ended[Path(report["file"])] = Outcome(report["kind"], report["detail"])
            else:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                ended[self._running(files, ended)] = Outcome("hang", f"more than {self.seconds:g} s")
                return ended, ""
        if code := process.returncode:
            why = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            said = complaints.read_text(errors="replace")[-1500:]
            ended[self._running(files, ended)] = Outcome("crash", f"{why}: {said}")
        text = log.read_text(errors="replace") if log.is_file() else ""
        return ended, text[:4000] if "ERROR SUMMARY" in text and "ERROR SUMMARY: 0 errors" not in text else ""

    @staticmethod
    def _running(files: Sequence[Path], ended: dict[Path, Outcome]) -> Path:
        """The file that a process was at, or its last."""
        return next((path for path in files if path not in ended), files[-1])


def run_files(device: str, files: Sequence[str]) -> None:
    """In a process of its own: opens files and generates with them, a line of JSON to stdout for each.

    Ends early, with exit code 0, where the device failed: what comes after could not be told from it.
    """
    from gqsa_runtime import Model
    from gqsa_runtime.errors import DeviceError, GqsaError

    allocate_apart()
    for path in files:
        failed = False
        try:
            with Model.open(path, device=device, threads=1) as model:
                for options in ({}, {"temperature": 1.0, "seed": 1}):
                    list(model.generate(PROMPT, max_new_tokens=4, **options))
                model.score(PROMPT)
            kind, detail = "ran", ""
        except GqsaError as error:
            kind, detail, failed = "ended", str(error), isinstance(error, DeviceError)
        except BaseException as error:
            kind, detail = "untyped", f"{type(error).__name__}: {error}"
        print(json.dumps({"file": path, "kind": kind, "detail": detail[:1000]}), flush=True)
        if failed and device != "cpu":
            return


def allocate_apart() -> None:
    """Makes CUDA devices allocate every tensor, KV cache and rotary table, and the activations, by themselves."""
    from gqsa_runtime import device_cuda
    from gqsa_runtime.program import DTYPE_BYTES

    allocate, close = device_cuda.CudaDevice._allocate, device_cuda.CudaDevice.close

    def apart(self, tensors, context, slots):
        allocate(self, tensors, context, slots)
        self.own_memory = []

        def take(size: int) -> int:
            self.own_memory.append(device_cuda.call("cuMemAlloc", max(size, 1)))
            device_cuda.call("cuMemsetD8Async", self.own_memory[-1], 0, max(size, 1), self._stream)
            return int(self.own_memory[-1])

        program = self._program
        arena = take(self.plan.arena_bytes)
        self._buffers = {b.name: (arena + b.offset, b.dtype, b.elements) for b in self.plan.buffers}
        for kind, name in self._addresses:
            if kind == "tensor":
                size = tensors.nbytes(name)
            elif kind == "rope":
                size = context * program.ropes[name].rotary_dim * DTYPE_BYTES["f32"]
            else:
                size = slots * program.slot_rows(name, context) * program.kv_row_bytes(name)
            self._addresses[kind, name] = take(size)

    def close_apart(self):
        if self._context is not None:
            self._set_current()
            for memory in self.__dict__.pop("own_memory", []):
                device_cuda.call("cuMemFree", memory)
        close(self)

    device_cuda.CudaDevice._allocate, device_cuda.CudaDevice.close = apart, close_apart


def make_and_verify(folder: str, seed_file: str, family: str, numbers: Sequence[int]) -> list[tuple[str, str, Outcome]]:
    """(path, kind of change, how the reader takes it) of mutants, which are written where they are accepted or fail."""
    from tests.fuzz import hostile
    from tests.fuzz.kinds import use_path
    from tests.fuzz.limited import run_all_limited

    parts = hostile.Parts.read(seed_file, family)
    paths, kinds = [], []
    for number in numbers:
        kind, data = hostile.mutant(Random(f"{Path(seed_file).name} {number}"), parts)
        paths.append(Path(folder) / f"{Path(seed_file).stem}-{kind}-{number}.gqsa")
        kinds.append(kind)
        paths[-1].write_bytes(data)
    taken = run_all_limited([lambda path=path: use_path(path) for path in paths], 10, 256 << 20)
    made = []
    for path, kind, outcome in zip(paths, kinds, taken, strict=True):
        if outcome.kind == "refused":
            path.unlink()
        names = {"accepted": "ran", "refused": "refused", "memory": "untyped"}
        made.append((str(path), kind, Outcome(names.get(outcome.kind, outcome.kind), outcome.detail)))
    return made


def run(seeds: Sequence[Path], files: int, seed: int, jobs: int, watch: Watch, folder: Path) -> dict[str, list]:
    """(path, outcome) by kind of change, "sound" for the seeds themselves."""
    family = "cpu" if watch.device == "cpu" else "cuda"
    shares = []
    for start in range(0, files, 20):
        numbers = [seed * 1_000_000 + number for number in range(start, min(start + 20, files))]
        shares.append((str(folder), str(seeds[start // 20 % len(seeds)]), family, numbers))
    found: dict[str, list] = {"sound": []}
    with ProcessPoolExecutor(jobs) as pool:
        made = [item for share in pool.map(make_and_verify, *zip(*shares, strict=True)) for item in share]
    for path, kind, outcome in made:
        found.setdefault(kind, []).append((Path(path), outcome))
    accepted = [Path(path) for path, _, outcome in made if outcome.kind == "ran"]
    with ThreadPoolExecutor(jobs) as pool:
        found["sound"] = list(watch.run(seeds).items())
        batches = [accepted[start : start + _BATCH] for start in range(0, len(accepted), _BATCH)]
        outcomes = {path: outcome for done in pool.map(watch.run, batches) for path, outcome in done.items()}
    return {kind: [(path, outcomes.get(path, outcome)) for path, outcome in items] for kind, items in found.items()}


def table(found: dict[str, list]) -> str:
    """Counts by kind of change as a table in Markdown."""
    columns = ("refused", "ran", "ended", *FAILURES)
    lines = ["| changed | files | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for kind, items in sorted(found.items()):
        counts = Counter(outcome.kind for _, outcome in items)
        lines.append(f"| {kind} | {len(items)} | " + " | ".join(str(counts[column]) for column in columns) + " |")
    return "\n".join(lines)


def sanitizer() -> str | None:
    """The path of compute-sanitizer, or None."""
    return shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")


def main() -> int:
    """The command line."""
    if sys.argv[1:2] == ["--run"]:
        run_files(sys.argv[2], sys.argv[3:])
        return 0
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.hostile_plans", description=__doc__.splitlines()[0])
    parser.add_argument("seeds", nargs="?", type=Path, help="Folder of sound files.")
    parser.add_argument("--make", type=Path, metavar="FOLDER", help="Write the sound files, and do nothing else.")
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="Other mutants for another number.")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--keep", type=Path, default=Path("hostile-failures"), help="Folder for files that fail.")
    parser.add_argument("--json", type=Path, help="A file for what came of each.")
    arguments = parser.parse_args()
    if arguments.make:
        make_seeds(arguments.make)
        return 0
    seeds = sorted(arguments.seeds.glob("*.gqsa")) if arguments.seeds else []
    if not seeds:
        parser.error("name a folder of .gqsa files, such as --make writes")
    prefix = ()
    if arguments.device != "cpu":
        if not sanitizer():
            parser.error("compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin")
        prefix = (sanitizer(), *MEMCHECK)
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hostile-") as scratch:
        watch = Watch(arguments.device, prefix, logs=Path(scratch))
        found = run(seeds, arguments.files, arguments.seed, arguments.jobs, watch, Path(scratch))
        failed = [
            (path, outcome)
            for kind, items in found.items()
            for path, outcome in items
            if outcome.kind in FAILURES or (kind == "sound" and outcome.kind != "ran")
        ]
        for path, _ in failed:
            arguments.keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, arguments.keep)
    if arguments.json:
        rows = [{"file": path.name, **vars(outcome)} for items in found.values() for path, outcome in items]
        arguments.json.write_text(json.dumps({"seconds": time.monotonic() - began_s, "files": rows}, indent=1))
    for path, outcome in failed:
        print(f"{path.name}: {outcome.kind}: {outcome.detail[:1500]}\n")
    print(table(found))
    print(f"\n{sum(map(len, found.values()))} files in {time.monotonic() - began_s:.0f} s on {arguments.device}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
