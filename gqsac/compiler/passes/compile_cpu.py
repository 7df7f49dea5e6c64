"""Compile for CPUs: rendered C becomes one shared object per target, by zig's clang.

zig cross-compiles offline to every target from any machine, and links against an old glibc so that
the result loads on any Linux of the last ten years. The same sources always give the same bytes: the
compiler sees relative paths only and the linker strips all symbols but the kernels' names.
"""

import contextlib
import os
import platform
import subprocess
import sys
import tempfile
import threading
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from gqsa_runtime.errors import DeviceError

from gqsac.compiler.passes.render import headers
from gqsac.locks import scratch_folder

# Target -> (zig triple, -mcpu). x86_64_v4 is AVX-512 (F, BW, CD, DQ, VL), x86_64_v3 AVX2, FMA and F16C; VNNI and
# dotprod are the dot products of bytes that linear_records lives on.
TARGETS = {
    "x86_64_v3": ("x86_64-linux-gnu.2.17", "x86_64_v3"),
    "x86_64_v3_vnni": ("x86_64-linux-gnu.2.17", "x86_64_v3+avxvnni"),
    "x86_64_v4": ("x86_64-linux-gnu.2.17", "x86_64_v4"),
    "x86_64_v4_vnni": ("x86_64-linux-gnu.2.17", "x86_64_v4+avx512vnni"),
    "aarch64": ("aarch64-linux-gnu.2.17", "generic"),
    "aarch64_dotprod": ("aarch64-linux-gnu.2.17", "generic+dotprod"),
}

# What changes the code beside the sources, the headers and compiler_version.
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-g0",
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-sanitize=all",  # zig adds traps for undefined behaviour by default
    "-ffp-contract=on",  # a * b + c may fuse; nothing else of the arithmetic may change
    "-fno-math-errno",  # sqrtf is one instruction
    "-mprefer-vector-width=512",  # clang splits 64-byte vectors for x86_64_v4 otherwise
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-psabi",  # vectors are only passed between inlined functions
    "-s",
    "-Wl,--build-id=none",
    "-pthread",
    "-lm",
)
_STOPPED_AFTER_S = 0.1  # A compiler ends so long after it was told to, at most.


def host_targets() -> tuple[str, ...]:
    """Targets that a build on this machine includes by default: those of its own architecture.

    Empty on an architecture without one.
    """
    machine = platform.machine().lower()
    family = {"arm64": "aarch64", "amd64": "x86_64"}.get(machine, machine)
    return tuple(target for target in TARGETS if f"{target}_".startswith(f"{family}_"))


@cache
def compiler_version() -> str:
    """What compiles, for the file's record: "zig 0.17.1". Raises DeviceError without ziglang."""
    return f"zig {_run_zig(['version'], Path.cwd()).strip()}"


def compile_cpu(sources: dict[str, str], target: str, stopped: threading.Event | None = None) -> bytes:
    """Bytes of a Linux shared object that holds the kernels of `sources` and the runtime core.

    sources: kernel name -> C text, as `render("cpu", spec, name)` makes it. target: key of TARGETS.
    The object exports every kernel by its name, and gqsa_pool_create, gqsa_pool_destroy and gqsa_run.
    stopped: once it is set, in another thread, nothing is compiled any more. Raises DeviceError then, for an unknown
    target, without ziglang, or with the compiler's own words if a source does not compile.
    """
    if target not in TARGETS:
        raise DeviceError(f"unknown CPU target {target!r}; expected one of {', '.join(TARGETS)}.")
    triple, cpu = TARGETS[target]
    names = sorted(sources)
    objects = [f"{name}.c" for name in (*names, "runtime")]
    try:
        with scratch_folder("gqsac-build-") as build:
            for name, text in [*headers("cpu").items(), *((f"{name}.c", sources[name]) for name in names)]:
                (build / name).write_text(text)
            command = ["cc", "-target", triple, f"-mcpu={cpu}", *FLAGS, *objects, "-o", "kernels.so"]
            _run_zig(command, build, stopped)
            return (build / "kernels.so").read_bytes()
    except OSError as error:
        raise DeviceError(
            f"CPU kernels are compiled in {tempfile.gettempdir()}, and that failed: {error.strerror or error}; free "
            "some space there, or set TMPDIR to another folder"
        ) from error


def _run_zig(arguments: list[str], folder: Path, stopped: threading.Event | None = None) -> str:
    if find_spec("ziglang") is None:
        raise DeviceError("CPU kernels need the compiler of the package ziglang; run `pip install ziglang`.")
    cache_folder = str(_cache_folder())
    # zig locks its cache, so parallel builds may share it.
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": cache_folder, "ZIG_LOCAL_CACHE_DIR": cache_folder}
    command = [sys.executable, "-m", "ziglang", *arguments]
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as zig:
        said = None
        try:
            while said is None:
                if stopped and stopped.is_set():
                    raise DeviceError("the CPU kernels were not compiled, since the build was stopped.")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    said = zig.communicate(timeout=_STOPPED_AFTER_S)
        finally:
            zig.kill()
    if zig.returncode:
        raise DeviceError(f"the CPU kernels do not compile; zig says: {said[1].strip()[-4000:]}")
    return said[0]


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "gqsac" / "zig"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeviceError(
            f"the compiler's cache folder {folder} cannot be made ({error.strerror}); set XDG_CACHE_HOME to "
            "a folder that can."
        ) from error
    return folder
