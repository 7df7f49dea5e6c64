"""Opens a device for a file: picks it, picks a context that fits, and hands over checked tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from gqsa_runtime import device_cpu, device_cuda, memory
from gqsa_runtime.checked_tensors import CheckedTensors
from gqsa_runtime.engine import Device
from gqsa_runtime.errors import DeviceError, InputError
from gqsa_runtime.program import Program
from gqsa_runtime.reader import ArtifactFile
from gqsa_runtime.stopwatch import Stopwatch

DEFAULT_CONTEXT = 4096
MAX_THREADS = 1024


@dataclass(frozen=True)
class OpenedDevice:
    """family: key of Program.plans. device_reason: which device and why.

    context_reason: why a context other than asked, or None.
    """

    device: Device
    family: str
    context: int
    device_reason: str
    context_reason: str | None


def open_device(
    file: ArtifactFile,
    device: str = "auto",
    context: int | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    clock: Stopwatch | None = None,
) -> OpenedDevice:
    """Opens "auto", "cuda", "cuda:N" or "cpu" for a validated file; parameters as in `Model.open`.

    clock: gets the stages "device" (finding it and making its context), those of `CheckedTensors`, and those of the
    device.
    """
    program, clock = file.program, clock or Stopwatch()
    if context is not None and not 1 <= context <= program.max_context:
        raise InputError(
            f"the context is {context}, but this model is made for 1 to {program.max_context}; "
            f"choose --context {program.max_context if context > 0 else min(program.max_context, DEFAULT_CONTEXT)}"
        )
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise InputError(f"the number of threads is {threads}, expected at least 1 and at most {MAX_THREADS}")
    with clock.stage("device"):
        kind, ordinal, reason = choose_device(program, device)
        free = memory.free_cpu_bytes() if kind == "cpu" else None  # before weights are read into it
    used = program.plans[kind].tensors(program.ropes)

    def binaries(binary) -> bytes:
        return file.read(binary.tensor).tobytes()

    with contextlib.ExitStack() as stack:
        # Reading begins first: making a GPU's context takes as long as much of the reading.
        names = [name for name in file.tensors if name in used]
        tensors = stack.enter_context(CheckedTensors(file, names, progress, clock))
        if kind == "cuda":
            with clock.stage("device"):
                free = stack.enter_context(device_cuda.free_bytes(ordinal)) - memory.CUDA_HEADROOM_BYTES
        elif free is not None:
            free -= memory.CPU_HEADROOM_BYTES
        chosen, context_reason = _choose_context(file, kind, context, free)
        opened = _open(kind, ordinal, program, tensors, binaries, chosen, threads, clock)
    return OpenedDevice(opened, kind, chosen, reason, context_reason)


def choose_device(program: Program, device: str) -> tuple[str, int, str]:
    """("cuda" or "cpu", GPU ordinal, why). Raises InputError for another name, DeviceError for none usable."""
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and (kind != "cuda" or not number.isdecimal())):
        raise InputError(f"the device is {device!r}, expected auto, cpu, cuda or cuda:N")
    ordinal = int(number) if number else 0
    if kind != "auto":
        usable, why = _probe(kind, program, ordinal)
        if not usable:
            raise DeviceError(why)
        return kind, ordinal, "cpu, as asked" if kind == "cpu" else f"{device}, as asked: {why}"
    usable, why_gpu = _probe("cuda", program, 0)
    if usable:
        return "cuda", 0, f"cuda: {why_gpu}"
    usable, why_cpu = _probe("cpu", program, 0)
    if usable:
        return "cpu", 0, f"cpu: {why_cpu}; no GPU: {why_gpu}"
    raise DeviceError(f"nothing here runs this file. GPU: {why_gpu}. CPU: {why_cpu}")


def _probe(kind: str, program: Program, ordinal: int) -> tuple[bool, str]:
    return device_cuda.probe(program, ordinal) if kind == "cuda" else device_cpu.probe(program)


def _choose_context(file: ArtifactFile, family: str, context: int | None, free: int | None) -> tuple[int, str | None]:
    program = file.program
    wanted = min(program.max_context, DEFAULT_CONTEXT) if context is None else context
    fits = wanted if free is None else memory.largest_context(program, file.tensors, family, free)
    if fits >= wanted:
        return wanted, None
    needed_gb = memory.needed_bytes(program, file.tensors, family, wanted) / 1e9
    short = f"context {wanted} needs {needed_gb:.2f} GB and {max(free, 0) / 1e9:.2f} GB can be used"
    if fits < 1:
        raise DeviceError(f"{short}; not even one position fits: free memory, or use a smaller model")
    if context is not None:
        raise DeviceError(f"{short}; a context of {fits} fits: choose --context accordingly")
    return fits, f"context {fits}: {short}"


def _open(kind, ordinal, program, tensors, binaries, context, threads, clock) -> Device:
    if kind == "cuda":
        return device_cuda.CudaDevice(program, tensors, binaries, context, ordinal, clock=clock)
    return device_cpu.CpuDevice(program, tensors, binaries, context, threads, clock=clock)
