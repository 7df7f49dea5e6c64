"""Opens a device for a file: picks it, picks a context that fits, and hands over checked tensors."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gqsa_runtime import device_cpu, device_cuda, memory, rebuild
from gqsa_runtime.checked_tensors import CheckedTensors
from gqsa_runtime.engine import Device
from gqsa_runtime.errors import DeviceError, InputError
from gqsa_runtime.program import Binary, Program
from gqsa_runtime.reader import ArtifactFile
from gqsa_runtime.stopwatch import Stopwatch

AUTO = "auto"  # the context that free memory allows
DEFAULT_CONTEXT = 4096
MAX_THREADS = 1024


@dataclass(frozen=True)
class OpenedDevice:
    """family: key of Program.plans. device_reason: which device and why.

    context_reason: why a context that was not asked for by its number, or None.
    """

    device: Device
    family: str
    context: int
    device_reason: str
    context_reason: str | None


def open_device(
    file: ArtifactFile,
    device: str = "auto",
    context: int | str | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    clock: Stopwatch | None = None,
    kernels: str = rebuild.FILE,
) -> OpenedDevice:
    """Opens "auto", "cuda", "cuda:N" or "cpu" for a validated file; parameters as in `Model.open`.

    clock: gets the stages "device" (finding it and making its context), those of `CheckedTensors`, and those of the
    device, and where kernels are made anew, "compile".
    """
    rebuild.check_choice(kernels)
    compiler = rebuild.compiler() if kernels == rebuild.REBUILD else None
    program, clock = file.program, clock or Stopwatch()
    check_context(program, context)
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise InputError(f"the number of threads is {threads}, expected at least 1 and at most {MAX_THREADS}")
    with clock.stage("device"):
        program = compiler.offered(program) if compiler else program
        kind, ordinal, reason = choose_device(program, device)
    if kind == "cpu":  # before weights are read
        with usable_bytes(kind, ordinal) as free:
            chosen, context_reason = choose_context(file, kind, context, free)
    used = program.plans[kind].tensors(program.ropes)

    code: bytes | None = None
    if compiler:
        with clock.stage("compile"):
            target = _best_target(program, kind, ordinal)
            binary, code = compiler.make(file, target)
        program = dataclasses.replace(program, binaries=(binary,))
        reason += f"; kernels made anew by {compiler.made_by(target)}, no code of the file runs"

    def binaries(binary: Binary) -> bytes:
        return file.code(binary) if code is None else code

    with contextlib.ExitStack() as stack:
        # Reading begins first: making a GPU's context takes as long as much of the reading.
        names = [name for name in file.tensors if name in used]
        tensors = stack.enter_context(CheckedTensors(file, names, progress, clock))
        if kind == "cuda":
            with clock.stage("device"):
                free = stack.enter_context(usable_bytes(kind, ordinal))
            chosen, context_reason = choose_context(file, kind, context, free)
        opened = _open(kind, ordinal, program, tensors, binaries, chosen, threads, clock)
    return OpenedDevice(opened, kind, chosen, reason, context_reason)


def parse_device(device: str) -> tuple[str, int]:
    """("auto", "cuda" or "cpu", GPU ordinal). Raises InputError for another name."""
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and (kind != "cuda" or not number.isdecimal())):
        raise InputError(f"the device is {device!r}, expected auto, cpu, cuda or cuda:N")
    return kind, int(number) if number else 0


def choose_device(program: Program, device: str) -> tuple[str, int, str]:
    """("cuda" or "cpu", GPU ordinal, why). Raises InputError for another name, DeviceError for none usable."""
    kind, ordinal = parse_device(device)
    if kind != "auto":
        usable, why = probe(kind, program, ordinal)
        if not usable:
            raise DeviceError(why)
        return kind, ordinal, "cpu, as asked" if kind == "cpu" else f"{device}, as asked: {why}"
    usable, why_gpu = probe("cuda", program, 0)
    if usable:
        return "cuda", 0, f"cuda: {why_gpu}"
    usable, why_cpu = probe("cpu", program, 0)
    if usable:
        return "cpu", 0, f"cpu: {why_cpu}; no GPU: {why_gpu}"
    raise DeviceError(f"nothing here runs this file. GPU: {why_gpu}. CPU: {why_cpu}")


def probe(kind: str, program: Program, ordinal: int) -> tuple[bool, str]:
    """Whether a device of this machine can run the program, memory not regarded, and the reason in a few words."""
    return device_cuda.probe(program, ordinal) if kind == "cuda" else device_cpu.probe(program)


def _best_target(program: Program, kind: str, ordinal: int) -> str:
    """The target whose kernels a device would take."""
    if kind == "cuda":
        return device_cuda.choose_binary(program.binaries, device_cuda.Gpu(ordinal)).target
    return device_cpu.choose_binary(program.binaries).target


def check_context(program: Program, context: int | str | None) -> None:
    """Raises InputError for a context that the model is not made for, whatever the memory."""
    if context is None or context == AUTO:
        return
    if isinstance(context, bool) or not isinstance(context, int):
        raise InputError(f"the context is {context!r}, expected a number of tokens or {AUTO!r}")
    if not 1 <= context <= program.max_context:
        raise InputError(
            f"the context is {context}, but this model is made for 1 to {program.max_context}; "
            f"choose --context {program.max_context if context > 0 else min(program.max_context, DEFAULT_CONTEXT)}"
        )


@contextlib.contextmanager
def usable_bytes(kind: str, ordinal: int) -> Iterator[int | None]:
    """Memory that a model may have on a device, or None where the system does not say; see `device_cuda.free_bytes`."""
    if kind == "cuda":
        with device_cuda.free_bytes(ordinal) as on_gpu:
            yield on_gpu - memory.CUDA_HEADROOM_BYTES
    else:
        free = memory.free_cpu_bytes()
        yield None if free is None else free - memory.CPU_HEADROOM_BYTES


def wanted_context(file: ArtifactFile, family: str, context: int | str | None, free: int | None) -> int:
    """The positions that a context stands for, whether they fit or not. Parameters as of `choose_context`."""
    if context == AUTO and free is not None:
        return max(1, _largest_by_itself(file, family, free))
    return context if isinstance(context, int) else min(file.program.max_context, DEFAULT_CONTEXT)


def choose_context(
    file: ArtifactFile, family: str, context: int | str | None, free: int | None
) -> tuple[int, str | None]:
    """(positions, why where no number was asked for and met). context: as in `Model.open`; free: bytes, None: unknown.

    Raises DeviceError for a number that does not fit, and where not even one position does.
    """
    program, wanted = file.program, wanted_context(file, family, context, free)
    if free is None:
        unknown = f"context {wanted}: the system does not say how much memory is free; choose another with --context"
        return wanted, unknown if context == AUTO else None
    fits = memory.largest_context(program, file.tensors, family, free)
    if fits >= wanted:
        return wanted, _why(file, family, wanted, free) if context == AUTO else None
    needed_gb = memory.needed_bytes(program, file.tensors, family, wanted) / 1e9
    short = f"context {wanted} needs {needed_gb:.2f} GB and {max(free, 0) / 1e9:.2f} GB can be used"
    if fits < 1:
        raise DeviceError(f"{short}; not even one position fits: free memory, or use a smaller model")
    if context is not None:
        raise DeviceError(f"{short}; a context of {fits} fits: choose --context accordingly")
    return fits, f"context {fits}: {short}"


def _largest_by_itself(file: ArtifactFile, family: str, free: int) -> int:
    """The context that "auto" stands for: what fits the family's share of what the weights leave free."""
    fixed = memory.needed_bytes(file.program, file.tensors, family, 0)
    share = int(memory.AUTO_SHARE[family] * max(free - fixed, 0))
    return memory.largest_context(file.program, file.tensors, family, fixed + share)


def _why(file: ArtifactFile, family: str, context: int, free: int) -> str:
    program = file.program
    if context == program.max_context:
        return f"context {context}: all that the model is made for"
    left_gb = (free - memory.needed_bytes(program, file.tensors, family, 0)) / 1e9
    each_kb = memory.context_bytes(program, context) / context / 1e3
    share = memory.AUTO_SHARE[family]
    of = "" if share == 1 else f"{share:.0%} of "
    return (
        f"context {context}: what fits {of}the {left_gb:.2f} GB that weights and activations leave free, at "
        f"{each_kb:.1f} kB a position; the model is made for {program.max_context}"
    )


def _open(
    kind: str,
    ordinal: int,
    program: Program,
    tensors: CheckedTensors,
    binaries: Callable[[Binary], bytes],
    context: int,
    threads: int | None,
    clock: Stopwatch,
) -> Device:
    if kind == "cuda":
        return device_cuda.CudaDevice(program, tensors, binaries, context, ordinal, clock=clock)
    return device_cpu.CpuDevice(program, tensors, binaries, context, threads, clock=clock)
