"""The CPU device: one arena, one pool of threads, and one native call per phase. numpy and ctypes only."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from gqsa_runtime.errors import DeviceError
from gqsa_runtime.program import DTYPE_BYTES, NUMPY_DTYPES, Argument, Binary, Place, Plan, Program, Step
from gqsa_runtime.rope import RopeTables
from gqsa_runtime.session import cache_shapes
from gqsa_runtime.stopwatch import Stopwatch

_log = logging.getLogger(__name__)

ALIGNMENT = 64  # of everything in the arena: a cache line
_LAUNCH_BYTES = 16  # of a native launch: {function, args}
_BANDWIDTH_BYTES = 1 << 28  # read to measure the bandwidth: more than a cache holds
# Chooses a binary by its target's name, e.g. x86_64_v3 on a machine with AVX-512. For tests and comparisons.
TARGET_VARIABLE = "GQSA_CPU_TARGET"


# The flags of /proc/cpuinfo ("Features" on Arm: the kernel's HWCAP by name) that a target's code relies on; the best
# target comes first.
_V3 = frozenset(["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"])
_V4 = _V3 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
_TARGETS = {
    "x86_64_v4_vnni": _V4 | frozenset(["avx512_vnni"]),
    "x86_64_v4": _V4,
    "x86_64_v3_vnni": _V3 | frozenset(["avx_vnni"]),
    "x86_64_v3": _V3,
    "aarch64_dotprod": frozenset(["asimddp"]),
    "aarch64": frozenset(),
}

# Loaded shared objects by digest. They stay loaded for the life of the process: glibc knows a library
# by its path, and the path of an in-memory file comes back for another file once that is closed.
_libraries: dict[bytes, tuple[ctypes.CDLL, int | None]] = {}


def supported_targets() -> tuple[str, ...]:
    """CPU targets whose code this machine can run, the best first; empty where there is none."""
    if not sys.platform.startswith("linux"):
        return ()
    machine = platform.machine().lower()
    family = {"arm64": "aarch64", "amd64": "x86_64"}.get(machine, machine)
    flags = _cpu_flags()
    return tuple(name for name, needed in _TARGETS.items() if f"{name}_".startswith(f"{family}_") and needed <= flags)


def _cpu_flags() -> frozenset[str]:
    """Of the first CPU that has any; on Arm Linux names there only what all of its CPUs can do."""
    with open("/proc/cpuinfo") as lines:
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                return frozenset(value.split())
    return frozenset()


def probe(program: Program) -> tuple[bool, str]:
    """Whether this machine's CPU can run the program, and the reason in a few words."""
    try:
        binary = choose_binary(program.binaries)
    except DeviceError as error:
        return False, str(error)
    return True, f"the CPU runs {binary.target} kernels"


def choose_binary(binaries: tuple[Binary, ...]) -> Binary:
    """The best of a file's binaries for this machine's CPU.

    Raises DeviceError that names the CPU's and the file's targets and the command that rebuilds.
    """
    held = {binary.target: binary for binary in binaries if binary.kind == "shared_object"}
    supported = supported_targets()
    wanted = os.environ.get(TARGET_VARIABLE)
    for target in supported:
        if target in held and wanted in (None, "", target):
            return held[target]
    if wanted:
        raise DeviceError(
            f"{TARGET_VARIABLE}={wanted} cannot be used: the file's CPU targets are {', '.join(held) or 'none'} and "
            f"this CPU runs {', '.join(supported) or 'none of gqsac'}; unset the variable, or make them with "
            f"`gqsac relink FILE -o NEW --target {wanted}`"
        )
    if not supported:
        raise DeviceError(
            f"this CPU ({platform.system()} {platform.machine()}) cannot run any gqsac kernels; they need Linux on "
            "x86-64 with AVX2, FMA and F16C, or on 64-bit Arm"
        )
    raise DeviceError(
        f"the file has no kernels for this CPU ({supported[0]}): its CPU targets are {', '.join(held) or 'none'}; "
        f"make them with `gqsac relink FILE -o NEW --target {supported[0]}`"
    )


def default_threads() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class CpuDevice:
    """Runs a program on the CPU. All memory is reserved when it is made; nothing is allocated after.

    tensors: name -> read-only C-contiguous array, flat or shaped; they are used in place, not copied.
    binaries: gives a binary's bytes, whose digest the reader has checked: they are native code.
    context: positions of a slot of the KV cache; slots: sequences that it holds. threads: of the pool with
    the caller, by default all CPUs that this process may use; results do not depend on it. One
    thread at a time may call the methods. clock: gets the stage "modules".
    Raises DeviceError for a CPU that the file has no kernels for, and where memory does not suffice.
    """

    def __init__(
        self,
        program: Program,
        tensors: Mapping[str, np.ndarray],
        binaries: Callable[[Binary], bytes],
        context: int,
        threads: int | None = None,
        slots: int = 1,
        clock: Stopwatch | None = None,
    ):
        clock = clock or Stopwatch()
        self.threads = default_threads() if threads is None else threads
        if self.threads < 1:
            raise DeviceError(f"{threads} threads cannot run anything; choose 1 or more")
        self._pool: Any = None
        binary = choose_binary(program.binaries)
        self.target = binary.target
        self.name = f"CPU ({self.target}, {self.threads} thread{'s' if self.threads > 1 else ''})"
        with clock.stage("modules"):
            self._library = _load_library(binaries(binary))
        self._context, self._slots = context, slots
        self._keep: list[np.ndarray] = []  # arrays that native code points into
        self._addresses: dict[Place, int] = {}
        plan = self.plan = program.plans["cpu"]
        self._allocate(program, plan, tensors)
        self._use_tensors(plan, tensors)
        self._phases = {phase: self._resolve(plan, steps) for phase, steps in plan.phases.items()}
        self._pool = self._library.gqsa_pool_create(self.threads)
        if not self._pool:
            raise DeviceError(f"{self.threads} threads cannot be started; choose fewer with --threads")

    def upload(self, buffer: str, values: np.ndarray) -> None:
        """Copies values to the start of a buffer, as the buffer's dtype. Raises ValueError if they do not fit."""
        array = self._buffers[buffer]
        values = np.asarray(values).reshape(-1)
        if values.size > array.size:
            raise ValueError(f"{values.size} values do not fit buffer {buffer!r} of {array.size}")
        array[: values.size] = values

    def launch(self, *phases: str) -> None:
        """Runs phases and returns when they are done. Other Python threads run meanwhile."""
        for phase in phases:
            launches, count = self._phases[phase]
            self._library.gqsa_run(self._pool, launches, count)

    def download(self, buffer: str, count: int) -> np.ndarray:
        """A copy of the first `count` elements of a buffer. Raises ValueError if it holds fewer."""
        array = self._buffers[buffer]
        if count > array.size:
            raise ValueError(f"buffer {buffer!r} holds {array.size} elements, not {count}")
        values: np.ndarray = array[:count].copy()
        return values

    def download_rows(self, cache: str, layer: int, count: int) -> np.ndarray:
        """See engine.Device."""
        rows: np.ndarray = self._caches[cache, layer][:count].copy()
        return rows

    def upload_rows(self, cache: str, layer: int, rows: np.ndarray) -> None:
        """See engine.Device."""
        self._caches[cache, layer][: len(rows)] = rows

    def fill_ropes(self, long: frozenset[str]) -> None:
        """See engine.Device."""
        for name, table in self._ropes.make(long):
            self._tables[name][:] = table.reshape(-1)

    def bandwidth(self) -> float:
        """Bytes per second that as many threads as the pool has read from memory together, the best of 10 passes:
        others that use the bus only take from it.
        """
        memory = np.ones(_BANDWIDTH_BYTES // 8, np.int64)
        parts = np.array_split(memory, 8 * self.threads)
        seconds = []
        with ThreadPoolExecutor(self.threads) as pool:
            for _ in range(10):
                began_s = time.perf_counter()
                list(pool.map(np.max, parts))  # NumPy has vectors for it and lets go of the interpreter
                seconds.append(time.perf_counter() - began_s)
        return memory.nbytes / min(seconds)

    def step_seconds(self, phase: str, repeats: int) -> list[float]:
        """Seconds of each step of a phase, launched by a call of its own; the median of `repeats` passes."""
        launches, count = self._phases[phase]
        seconds = np.empty((repeats, count))
        for times in seconds:
            for index in range(count):
                began_s = time.perf_counter()
                self._library.gqsa_run(self._pool, launches + index * _LAUNCH_BYTES, 1)
                times[index] = time.perf_counter() - began_s
        return [float(median) for median in np.median(seconds, axis=0)]

    def close(self) -> None:
        """Ends the threads and frees the memory. Safe to call twice."""
        if self._pool:
            self._library.gqsa_pool_destroy(self._pool)
        self._pool = None
        for held in (self._phases, self._buffers, self._caches, self._addresses, self._tables, self._keep):
            held.clear()

    def __del__(self) -> None:
        if getattr(self, "_pool", None):
            self.close()

    def _allocate(self, program: Program, plan: Plan, tensors: Mapping[str, np.ndarray]) -> None:
        """One arena: activations, KV caches, rope tables."""
        context = self._context
        sizes: dict[Place, int] = {("arena", None): plan.arena_bytes}
        for layer in range(len(program.kv_layers)):
            size = self._slots * program.slot_rows(layer, context) * program.kv_row_bytes(layer)
            sizes["k_cache", layer] = sizes["v_cache", layer] = size
        for name, rope in program.ropes.items():
            sizes["rope", name] = context * rope.rotary_dim * DTYPE_BYTES["f32"]
        total = ALIGNMENT + sum(_align(size) for size in sizes.values())
        try:
            raw = np.zeros(total, np.uint8)
        except MemoryError as error:
            raise DeviceError(
                f"context {context} needs {total / 1e9:.2f} GB that the system does not give; choose a smaller "
                "--context"
            ) from error
        self._keep.append(raw)
        offset = -raw.ctypes.data % ALIGNMENT
        places: dict[Place, np.ndarray] = {}
        for key, size in sizes.items():
            places[key] = raw[offset : offset + size]
            self._addresses[key] = raw.ctypes.data + offset
            offset += _align(size)
        self._ropes = RopeTables(program.ropes, tensors, context)
        self._tables = {name: places["rope", name].view(np.float32) for name in program.ropes}
        self.fill_ropes(frozenset())
        self._caches = {  # of slot 0
            (cache, layer): places[cache, layer]
            .view(NUMPY_DTYPES[program.kv_element])
            .reshape(-1, width)[: program.slot_rows(layer, context)]
            for cache, layer, width in cache_shapes(program)
        }
        arena = places["arena", None]
        self._buffers = {
            b.name: arena[b.offset : b.offset + b.elements * DTYPE_BYTES[b.dtype]].view(NUMPY_DTYPES[b.dtype])
            for b in plan.buffers
        }

    def _use_tensors(self, plan: Plan, tensors: Mapping[str, np.ndarray]) -> None:
        """Takes the addresses of the tensors that the steps name."""
        used = {arg.name for step in plan.steps() for arg in step.args if arg.kind == "tensor"}
        for name in (name for name in tensors if name in used):  # in the order in which they are read ahead
            array = tensors[name]
            if not array.flags.c_contiguous:
                raise ValueError(f"tensor {name!r} is not contiguous")
            self._keep.append(array)
            self._addresses["tensor", name] = array.ctypes.data

    def _resolve(self, plan: Plan, steps: tuple[Step, ...]) -> tuple[int, int]:
        """Native launch list of a phase: (address, count). A launch is {function, args}, two pointers."""
        launches = np.zeros((len(steps), 2), np.uint64)
        buffers = {buffer.name: buffer for buffer in plan.buffers}

        def address(arg: Argument) -> int:
            if arg.kind == "null":
                return 0
            if arg.kind == "buffer":
                buffer = buffers[arg.named]
                return self._addresses["arena", None] + buffer.offset + arg.offset * DTYPE_BYTES[buffer.dtype]
            return self._addresses[arg.kind, arg.name]

        for launch, step in zip(launches, steps, strict=True):
            args = np.array([address(arg) for arg in step.args], np.uint64)
            self._keep.append(args)
            function = ctypes.cast(getattr(self._library, step.kernel), ctypes.c_void_p).value
            launch[:] = np.array([function, args.ctypes.data], np.uint64)
        self._keep.append(launches)
        return launches.ctypes.data, len(steps)


def _align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _load_library(data: bytes) -> ctypes.CDLL:
    digest = hashlib.sha256(data).digest()
    if digest not in _libraries:
        try:
            _libraries[digest] = _open_library(data)
        except OSError as error:
            raise DeviceError(
                f"the file's CPU kernels cannot be loaded ({error}); check the file with `gqsa verify`"
            ) from error
        library = _libraries[digest][0]
        library.gqsa_pool_create.argtypes = [ctypes.c_int]
        library.gqsa_pool_create.restype = ctypes.c_void_p
        library.gqsa_pool_destroy.argtypes = [ctypes.c_void_p]
        library.gqsa_pool_destroy.restype = None
        library.gqsa_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
        library.gqsa_run.restype = None
    return _libraries[digest][0]


def _open_library(data: bytes) -> tuple[ctypes.CDLL, int | None]:
    """(library, descriptor to keep open). From memory, or where that may not run code from a private file."""
    descriptor = os.memfd_create("gqsa_kernels")
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(data)
    try:
        return ctypes.CDLL(f"/proc/self/fd/{descriptor}"), descriptor
    except OSError as error:
        os.close(descriptor)
        _log.debug("no code is run from memory here (%s): the kernels go through a private file", error)
    with tempfile.TemporaryDirectory(prefix="gqsa-") as folder:  # mode 0700
        path = os.path.join(folder, "kernels.so")
        with open(path, "wb") as file:
            file.write(data)
        return ctypes.CDLL(path), None
