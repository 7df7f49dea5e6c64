"""Compile: machine code of every kernel for every target, in parallel, cached across builds.

The cache is content-addressed: its key covers the source, the headers, the target, the compiler's
version and its options, so nothing in it can be stale. An entry carries its own digest.
"""

import contextlib
import hashlib
import itertools
import json
import os
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from gqsac import __version__
from gqsac.compiler.passes import compile_cpu, compile_cuda
from gqsac.compiler.passes.render import headers
from gqsac.errors import InputError

CUDA_TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_80")
CPU_TARGETS = tuple(compile_cpu.TARGETS)


@dataclass(frozen=True)
class Compiled:
    """Machine code of one kernel (CUDA) or of all kernels (CPU) for one target.

    report: what the compiler said of it, e.g. registers and spill_bytes; empty for CPU targets.
    """

    target: str
    kernel: str
    data: bytes
    report: dict
    log: str
    cached: bool


def family_of(target: str) -> str:
    """The template family of a target: "cuda" or "cpu"."""
    return "cuda" if target.startswith(("sm_", "compute_")) else "cpu"


def families(targets: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(family_of(target) for target in targets))


def toolchain(targets: tuple[str, ...]) -> dict:
    """What makes the kernels of targets, as the file records it; None for a compiler that they do not need."""
    used = families(targets)
    return {
        "gqsac": __version__,
        "nvrtc": compile_cuda.nvrtc_version() if "cuda" in used else None,
        "zig": compile_cpu.compiler_version() if "cpu" in used else None,
        "targets": list(targets),
    }


def default_targets() -> tuple[str, ...]:
    """All CUDA targets and the CPU targets of this machine."""
    return CUDA_TARGETS + tuple(compile_cpu.host_targets())


def check_targets(targets: tuple[str, ...]) -> tuple[str, ...]:
    """Targets without repeats, in canonical order. "cpu" and "cuda" stand for their defaults."""
    known = CUDA_TARGETS + CPU_TARGETS
    chosen: set[str] = set()
    for target in targets:
        if target == "cpu":
            chosen.update(compile_cpu.host_targets())
        elif target == "cuda":
            chosen.update(CUDA_TARGETS)
        elif target in known:
            chosen.add(target)
        else:
            raise InputError(f"unknown target {target!r}; choose from cpu, cuda, {', '.join(known)}")
    return tuple(target for target in known if target in chosen)


def compile_all(
    sources: dict[str, dict[str, str]],
    targets: tuple[str, ...],
    jobs: int = 0,
    cache_dir: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[Compiled]:
    """Compiles sources["cuda"] and sources["cpu"] (kernel name -> text) for the targets.

    jobs: threads, 0 for all cores. cache_dir: None compiles everything anew. progress: called as ("compile", done,
    total) after each. Results come in the order of targets, then kernels.
    """
    work: list[Callable[[], Compiled]] = []
    # Ctrl-C ends the compilers that run, but not the one that a thread is about to start.
    stopped = threading.Event()
    for target in targets:
        if target in CPU_TARGETS:
            work.append(lambda target=target: _compile_cpu(sources["cpu"], target, cache_dir, stopped))
        else:
            for kernel, source in sources["cuda"].items():
                work.append(lambda t=target, k=kernel, s=source: _compile_cuda(s, t, k, cache_dir))

    done = itertools.count(1)

    def run(make: Callable[[], Compiled]) -> Compiled:
        compiled = make()
        progress("compile", next(done), len(work))
        return compiled

    pool = ThreadPoolExecutor(max_workers=jobs or len(os.sched_getaffinity(0)))
    try:
        # CPU objects take longest: start them first so that they do not trail behind the kernels.
        order = sorted(range(len(work)), key=lambda i: i < len(work) - _count_cpu(targets))
        futures = {i: pool.submit(run, work[i]) for i in order}
        return [futures[i].result() for i in range(len(work))]
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


def default_cache_dir() -> Path:
    """$GQSAC_CACHE, or gqsac/kernels in the user's cache folder."""
    if os.environ.get("GQSAC_CACHE"):
        return Path(os.environ["GQSAC_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gqsac" / "kernels"


def _count_cpu(targets: tuple[str, ...]) -> int:
    return sum(target in CPU_TARGETS for target in targets)


def _compile_cuda(source: str, target: str, kernel: str, cache_dir: Path | None) -> Compiled:
    def make() -> tuple[bytes, dict, str]:
        binary = compile_cuda.compile_cuda(source, target, kernel, headers("cuda"))
        report = {
            "registers": binary.registers,
            "spill_bytes": binary.spill_bytes,
            "stack_bytes": binary.stack_bytes,
            "shared_bytes": binary.shared_bytes,
        }
        return binary.data, report, binary.log

    options = " ".join(compile_cuda.OPTIONS)
    key = _key("cuda", target, compile_cuda.nvrtc_version(), options, kernel, source, *_flat(headers("cuda")))
    return _cached(target, kernel, key, cache_dir, make)


def _compile_cpu(sources: dict[str, str], target: str, cache_dir: Path | None, stopped: threading.Event) -> Compiled:
    def make() -> tuple[bytes, dict, str]:
        return compile_cpu.compile_cpu(sources, target, stopped), {}, ""

    options = " ".join((*compile_cpu.FLAGS, *compile_cpu.TARGETS[target]))
    # The counts keep a source from passing for a header.
    count = str(len(sources))
    key = _key("cpu", target, compile_cpu.compiler_version(), options, count, *_flat(sources), *_flat(headers("cpu")))
    return _cached(target, "", key, cache_dir, make)


def _flat(texts: dict[str, str]) -> list[str]:
    return [part for name in sorted(texts) for part in (name, texts[name])]


def _key(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _cached(target: str, kernel: str, key: str, cache_dir: Path | None, make) -> Compiled:
    entry = cache_dir / key[:2] / key if cache_dir else None
    if entry:
        found = _read_entry(entry)
        if found:
            data, report, log = found
            return Compiled(target, kernel, data, report, log, cached=True)
    data, report, log = make()
    if entry:
        _write_entry(entry, data, report, log)
    return Compiled(target, kernel, data, report, log, cached=False)


def _read_entry(entry: Path) -> tuple[bytes, dict, str] | None:
    """An entry is its sha256 in hex, a newline, a JSON line, then the machine code."""
    try:
        digest, _, rest = entry.read_bytes().partition(b"\n")
    except OSError:
        return None
    if hashlib.sha256(rest).hexdigest().encode() != digest:
        return None  # cut short or damaged: compiled again, then replaced
    head, _, data = rest.partition(b"\n")
    meta = json.loads(head)
    return data, meta["report"], meta["log"]


def _write_entry(entry: Path, data: bytes, report: dict, log: str) -> None:
    rest = json.dumps({"report": report, "log": log}).encode() + b"\n" + data
    temporary = None
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=entry.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest)
        os.replace(temporary, entry)
    except OSError:
        # A cache that cannot be written (read-only home, full disk) must not fail the build.
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
