"""Compile: CUDA source text to a cubin or PTX with NVRTC. Knows bytes, nothing of models or templates.

NVRTC needs neither a GPU nor a driver nor a toolkit, and releases the GIL: call `compile_cuda` from a
thread pool. The same source, target and NVRTC version give the same bytes.
"""

import re
from dataclasses import dataclass

from gqsa_runtime.errors import DeviceError

# What changes the code beside the source, the headers, the target and nvrtc_version.
# No fast math: a compiled model must give the tokens that f32 arithmetic gives.
OPTIONS = (
    "--std=c++17",
    "--ptxas-options=-v",
    "--no-source-include",
    "--no-cache",
    "--device-as-default-execution-space",
)


# Targets whose cubins, which run there alone, may use all that the architecture has. (PTX must run on later ones too.)
_ARCHITECTURES = {"sm_90": "sm_90a"}


class CompileError(DeviceError):
    """NVRTC is missing, does not know a target, or refused a kernel."""


@dataclass(frozen=True)
class CudaBinary:
    """data: cubin for "sm_XX" targets, PTX text for "compute_XX". log: what NVRTC and ptxas said.

    registers: per thread; spill_bytes (stores and loads), stack_bytes: of local memory per thread;
    shared_bytes: static shared memory per block. All four are 0 for PTX, which no assembler has seen.
    """

    data: bytes
    log: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int


def nvrtc_version() -> str:
    """Version of the installed NVRTC, such as "12.9"."""
    nvrtc = _load_nvrtc()
    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"


def compile_cuda(source: str, target: str, name: str, headers: dict[str, str]) -> CudaBinary:
    """Compiles one kernel's source, which must define extern "C" `name`.

    target: "sm_XX" (cubin) or "compute_XX" (PTX). headers: include name -> text.
    Raises CompileError with the compiler's log.
    """
    nvrtc = _load_nvrtc()
    success = nvrtc.nvrtcResult.NVRTC_SUCCESS
    texts, names = [t.encode() for t in headers.values()], [n.encode() for n in headers]
    created, program = nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), len(names), texts, names)
    if created != success:
        raise CompileError(f"NVRTC could not take the source of kernel {name}: {created.name}")
    try:
        options = [o.encode() for o in (*OPTIONS, f"--gpu-architecture={_ARCHITECTURES.get(target, target)}")]
        (compiled,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = _read(nvrtc, program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
        log = log.rstrip(b"\0").decode(errors="replace")
        log = re.sub(r"ptxas info *: Compile time.*\n", "", log)  # the one line that differs from run to run
        if compiled == nvrtc.nvrtcResult.NVRTC_ERROR_INVALID_OPTION:
            raise CompileError(
                f"NVRTC {nvrtc_version()} does not know the target {target} of kernel {name}; "
                f"choose other targets or install a newer nvidia-cuda-nvrtc: {log.strip()}"
            )
        if compiled != success:
            raise CompileError(f"NVRTC {nvrtc_version()} refused kernel {name} for {target}: {log.strip()}")
        if target.startswith("compute_"):
            data = _read(nvrtc, program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
            return CudaBinary(data, log, 0, 0, 0, 0)
        data = _read(nvrtc, program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
        return CudaBinary(data, log, *_parse_usage(log, name, target))
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _load_nvrtc():
    """cuda.bindings.nvrtc with its library found. Raises CompileError with what to install."""
    advice = "run `pip install nvidia-cuda-nvrtc-cu12 cuda-bindings`, or build for the CPU only with --target cpu"
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise CompileError(f"compiling for CUDA needs the Python package cuda-bindings ({error}); {advice}") from error
    try:
        result, _, _ = nvrtc.nvrtcVersion()
    except RuntimeError as error:  # the bindings load the library at the first call
        raise CompileError(f"compiling for CUDA needs NVRTC, which was not found; {advice}") from error
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"NVRTC does not work ({result.name}); {advice}")
    return nvrtc


def _read(nvrtc, program, get_size, get) -> bytes:
    """Bytes of a log, PTX or cubin."""
    result, size = get_size(program)
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"NVRTC lost a result: {result.name}")
    # The bindings write into a bytes object: a longer one is never Python's shared one-byte object.
    buffer = b" " * (size + 16)
    (result,) = get(program, buffer)
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"NVRTC lost a result: {result.name}")
    return buffer[:size]


def _parse_usage(log: str, name: str, target: str) -> tuple[int, int, int, int]:
    """(registers, spill bytes, stack bytes, static shared bytes) from the lines of ptxas -v."""
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    if not spills or not registers:
        raise CompileError(f"ptxas did not report the registers of kernel {name} for {target}: {log.strip()!r}")
    shared = re.search(r"(\d+) bytes smem", log)
    stack, stores, loads = map(int, spills.groups())
    return int(registers[1]), stores + loads, stack, int(shared[1]) if shared else 0
