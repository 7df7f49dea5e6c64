"""Runs rendered CUDA kernels on the CPU: g++ compiles their source over emulation/cuda_shim.h."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from gqsa_runtime.operators import OPERATORS

from gqsac.compiler.cuda_launch import launch
from gqsac.compiler.kernel_spec import KernelSpec
from gqsac.compiler.passes.render import render, templates_folder

_FOLDER = Path(__file__).parent / "emulation"
_FLAGS = ("-std=c++17", "-O1", "-w", "-fPIC", "-march=native", "-U_FORTIFY_SOURCE", "-DGQSA_HOST_EMULATION")
_PARTS = 2 * max(1, min(4, os.cpu_count() or 1))  # more parts than processors, so that none waits long


def is_available() -> bool:
    """Whether there is a g++ to compile with."""
    return shutil.which("g++") is not None


class EmulatedKernels:
    """Kernels compiled for emulation, a shared object that is kept in `folder` under a digest of its source."""

    def __init__(self, kernels: dict[KernelSpec, str], folder: Path, macros: tuple[str, ...] = (), target: str = ""):
        """macros: defined when compiling. target: whose launches are made."""
        self._names, self._target = kernels, target
        self._paired = {
            spec for spec, name in kernels.items() if target == "sm_90" and "GQSA_PAIR" in render("cuda", spec, name)
        }
        self._library = ctypes.CDLL(str(_build(kernels, folder, tuple(f"-D{macro}" for macro in macros))))
        self._library.emulation_launch.restype = ctypes.c_char_p

    def run(self, spec: KernelSpec, arguments: list, max_tokens: int, backwards: bool = False) -> None:
        """Launches a kernel as cuda_launch says. arguments: flat NumPy arrays or None; outputs change in place.

        backwards: the threads of a block run last to first. Raises AssertionError for a broken kernel:
        diverged barriers, a write behind the shared memory, a misaligned load.
        """
        made = launch(spec, max_tokens, self._target)
        pointers = (ctypes.c_void_p * len(arguments))(*[None if a is None else a.ctypes.data for a in arguments])
        function = ctypes.cast(getattr(self._library, self._names[spec]), ctypes.c_void_p)
        problem = self._library.emulation_launch(
            function,
            pointers,
            len(arguments),
            (ctypes.c_uint * 3)(*made.grid),
            ctypes.c_uint(made.block),
            ctypes.c_size_t(made.shared_bytes),
            int(backwards),
            2 if spec in self._paired else 1,
        )
        assert problem is None, f"{self._names[spec]}: {problem.decode()}"


def run_both_ways(kernels: EmulatedKernels, case) -> None:
    """Runs a case with a block's threads in both orders; the bits must agree, and match the oracle.

    A missing barrier lets a thread read what another has not written yet in one of the two orders.
    """
    forwards, backwards = case.build(), case.build()
    kernels.run(case.spec, forwards.arguments, case.max_tokens)
    kernels.run(case.spec, backwards.arguments, case.max_tokens, backwards=True)
    forwards.check()
    operands = OPERATORS[case.spec.op].operands
    for operand, one, other in zip(operands, forwards.arguments, backwards.arguments, strict=True):
        if one is not None and operand.access != "scratch":
            np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))


def _build(kernels: dict[KernelSpec, str], folder: Path, macros: tuple[str, ...]) -> Path:
    """Path of the shared object with all kernels; compiled only if the folder does not hold it."""
    flags = (*_FLAGS, *macros)
    sources = [render("cuda", spec, name) for spec, name in kernels.items()]
    version = subprocess.run(["g++", "--version"], check=True, capture_output=True).stdout
    digest = hashlib.sha256(version + " ".join(flags).encode())
    for text in (*sources, *_read_all(_FOLDER), *_read_all(templates_folder() / "cuda" / "include")):
        digest.update(text.encode() + b"\0")
    library = folder / f"kernels-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library

    work = folder / f"build-{os.getpid()}"
    work.mkdir(parents=True)
    units = [_FOLDER / "emulator.cpp"]
    for part in range(_PARTS):
        units.append(work / f"part{part}.cpp")
        units[-1].write_text("\n".join(sources[part::_PARTS]))
    includes = [f"-I{_FOLDER}", f"-I{templates_folder() / 'cuda' / 'include'}"]

    def compile_unit(unit):
        output = work / f"{unit.stem}.o"
        _call(["g++", *flags, *includes, "-c", str(unit), "-o", str(output)])
        return str(output)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_unit, units))
    _call(["g++", "-shared", *objects, "-o", str(work / "kernels.so")])
    os.replace(work / "kernels.so", library)
    shutil.rmtree(work)
    return library


def _read_all(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.iterdir()) if path.is_file()]


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
