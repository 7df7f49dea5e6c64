"""Runs every kernel case of CPUs under sanitizers, each by a pool of one thread and of four.

python -m tests.kernels.sanitize                               # address, undefined and thread, on every target here
python -m tests.kernels.sanitize thread --target x86_64_v3     # Any other word must be in a case's name.

The kernels are compiled by zig's clang as for a file, at -O2 and with checks, and run with the sanitizers of gcc. For
AddressSanitizer what lies behind an argument's last 64 bytes is closed. Exit code 1 where anything was found.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

SANITIZERS = {"address": "libasan.so", "undefined": "libubsan.so", "thread": "libtsan.so"}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:exitcode=66",  # Python itself keeps much until it ends
    "UBSAN_OPTIONS": "print_stacktrace=0:halt_on_error=0",  # each place once, and then on
    "TSAN_OPTIONS": "exitcode=66:report_signal_unsafe=0",
}
THREADS = (1, 4)
# What clang calls for ThreadSanitizer and gcc's runtime has under the plain names, which it watches.
_THREAD_NAMES = """
#include <string.h>
void *__tsan_memset(void *to, int value, size_t n) { return memset(to, value, n); }
void *__tsan_memcpy(void *to, const void *from, size_t n) { return memcpy(to, from, n); }
void *__tsan_memmove(void *to, const void *from, size_t n) { return memmove(to, from, n); }
"""


def compile_all(sanitizer: str, target: str, words: list[str], folder: Path) -> Path:
    """A shared object of the cases' kernels with the sanitizer's checks, which expects its runtime to be there."""
    from gqsac.compiler.passes import compile_cpu
    from gqsac.compiler.passes.render import headers, render
    from tests.kernels.cases import KERNEL_NAMES

    names = {KERNEL_NAMES[case.spec]: case.spec for case in cases(words)}
    texts = {f"{name}.c": render("cpu", spec, name) for name, spec in names.items()}
    for name, text in {**headers("cpu"), **texts}.items():
        (folder / name).write_text(text)
    triple, cpu = compile_cpu.TARGETS[target]
    link_time = ("-shared", "-s", "-lm", "-pthread", "-O3", "-g0", "-fno-sanitize=all", "-Wl,--build-id=none")
    flags = [flag for flag in compile_cpu.FLAGS if flag not in link_time]
    goes_on = f"-f{'' if sanitizer == 'undefined' else 'no-'}sanitize-recover=all"
    flags += ["-O2", "-g1", f"-fsanitize={sanitizer}", "-fno-sanitize-trap=all", goes_on, "-c"]
    command = [sys.executable, "-m", "ziglang", "cc", "-target", triple, f"-mcpu={cpu}", *flags]
    sources = [*texts, "runtime.c"]

    def compile_one(source: str) -> None:
        subprocess.run([*command, source], cwd=folder, check=True)

    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, sources))
    (folder / "names.c").write_text(_THREAD_NAMES if sanitizer == "thread" else "")
    objects = [f"{Path(source).stem}.o" for source in sources]
    link = ["gcc", "-shared", "-fPIC", "-fno-builtin", *objects, "names.c", "-lm", "-pthread", "-o", "kernels.so"]
    subprocess.run(link, cwd=folder, check=True)
    return folder / "kernels.so"


def cases(words: list[str]) -> list:
    """The cases of CPUs whose names hold all words."""
    from tests.kernels.cases import CPU_CASES

    return [case for case in CPU_CASES if all(word in case.name for word in words)]


def run_cases(path: str, sanitizer: str, words: list[str]) -> None:
    """In a process that the sanitizer's runtime was loaded into first; its reports end it, but for undefined."""
    from tests.kernels.cases import KERNEL_NAMES

    library = ctypes.CDLL(path)
    library.gqsa_pool_create.restype = ctypes.c_void_p
    for n_threads in THREADS:
        pool = ctypes.c_void_p(library.gqsa_pool_create(n_threads))
        for case in cases(words):
            problem = case.build()
            arguments = np.array([0 if a is None else a.ctypes.data for a in problem.arguments], np.uint64)
            kernel = ctypes.cast(getattr(library, KERNEL_NAMES[case.spec]), ctypes.c_void_p).value
            launches = np.array([[kernel, arguments.ctypes.data]], np.uint64)
            closed = _behind(problem) if sanitizer == "address" else []
            _mark("poison", closed)
            print(case.name, file=sys.stderr, flush=True)  # what a report below it is about
            library.gqsa_run(pool, ctypes.c_void_p(launches.ctypes.data), 1)
            _mark("unpoison", closed)
            problem.check()
        library.gqsa_pool_destroy(pool)


def _behind(problem) -> list[tuple[int, int]]:
    """(address, bytes) behind what the arguments need, from a multiple of 64 on: files pad tensors so."""
    from tests.kernels.cases import TAIL

    ends = {}
    for argument in problem.arguments:
        if argument is not None:
            end = argument.ctypes.data + argument.nbytes
            ends[end] = -(-(end - TAIL * argument.itemsize) // 64) * 64
    return [(start, end - start) for end, start in ends.items() if end > start]


def _mark(how: str, places: list[tuple[int, int]]) -> None:
    for address, n_bytes in places:
        runtime = ctypes.CDLL(None)
        getattr(runtime, f"__asan_{how}_memory_region")(ctypes.c_void_p(address), ctypes.c_size_t(n_bytes))


def check(sanitizer: str, target: str, words: list[str]) -> bool:
    """Whether all cases ran without a report and with the right results."""
    with tempfile.TemporaryDirectory(prefix="sanitize-") as name:
        kernels = compile_all(sanitizer, target, words, Path(name))
        runtime = subprocess.run(
            ["gcc", f"-print-file-name={SANITIZERS[sanitizer]}"], capture_output=True, text=True, check=True
        )
        environment = {**os.environ, **OPTIONS, "LD_PRELOAD": runtime.stdout.strip(), "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.kernels.sanitize", "--run", str(kernels), sanitizer, *words]
        if sanitizer == "thread":
            command = ["setarch", "-R", *command]  # its runtime needs addresses where they are without randomness
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    found = [line for line in done.stderr.splitlines() if ": runtime error: " in line]
    clean = not done.returncode and not found
    print(f"{sanitizer}, {target}: {len(cases(words))} cases, {'clean' if clean else 'FOUND'}", flush=True)
    if not clean:
        print(*found, done.stderr[-6000:] if done.returncode else "", sep="\n")
    return clean


def main() -> int:
    """The command line."""
    if sys.argv[1:2] == ["--run"]:
        run_cases(sys.argv[2], sys.argv[3], sys.argv[4:])
        return 0
    from gqsa_runtime.device_cpu import supported_targets

    parser = argparse.ArgumentParser(prog="python -m tests.kernels.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="Sanitizers, and words that a case's name must hold.")
    parser.add_argument("--target", action="append", choices=supported_targets())
    arguments = parser.parse_args()
    words = [word for word in arguments.words if word not in SANITIZERS]
    sanitizers = [name for name in SANITIZERS if name in arguments.words] or list(SANITIZERS)
    targets = arguments.target or supported_targets()
    clean = [check(sanitizer, target, words) for sanitizer in sanitizers for target in targets]
    return not all(clean)


if __name__ == "__main__":
    sys.exit(main())
