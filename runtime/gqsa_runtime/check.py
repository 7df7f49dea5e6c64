"""Whether a file runs here: which device would run it, why not otherwise, and how much memory it takes.

Everything is asked of the functions that `load.open_device` opens files by. The header is read, with the launch plan
in it, and nothing of the weights, the kernels' code and the tokenizer: `verify` reads those. Only where a signature is
asked for, every byte is hashed, too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from gqsa_runtime import load, memory
from gqsa_runtime.errors import DeviceError
from gqsa_runtime.memory import ContextCost
from gqsa_runtime.reader import ArtifactFile, naming
from gqsa_runtime.validate import validate


@dataclass(frozen=True)
class DeviceCheck:
    """What one device of this machine can do with a file, at whatever context.

    device: "cuda:N" or "cpu". usable: the device is there, and the file has kernels for it; reason: which ones, or why
    not. free_bytes: memory that a model may have there, beside what is left to others. largest_context: positions that
    fit in it, 0 where not even one does. Both are None where the device is not usable, or the system does not say.
    costs: memory by context, whether it fits or not; () where the file has no plan for such a device.
    """

    device: str
    usable: bool
    reason: str
    free_bytes: int | None
    largest_context: int | None
    costs: tuple[ContextCost, ...]


@dataclass(frozen=True)
class Check:
    """Whether `Model.open` with the same arguments opens a sound file here and now.

    path, name: of the file, and of the model in it. runs: the answer; reason: one sentence, which device and why, or
    what is missing, with what is needed, what is free and what would fit.
    device: that `open` takes, "cuda:N" or "cpu", or None where none has kernels. context: positions that it opens with,
    or, where they do not fit, those that it should have; needed_bytes: of memory for them; free_bytes and
    largest_context: as of the device. All four are None where no device is usable. context_reason: why a context that
    nobody asked for by its number, or None. max_context: positions that the model is made for.
    devices: what each device that was asked for can do, the one that `open` tries first at the head.
    """

    path: str
    name: str
    runs: bool
    reason: str
    device: str | None
    context: int | None
    needed_bytes: int | None
    free_bytes: int | None
    largest_context: int | None
    context_reason: str | None
    max_context: int
    devices: tuple[DeviceCheck, ...]


def check_file(
    path: str | os.PathLike[str],
    device: str = "auto",
    context: int | str | None = None,
    require_signature: str | os.PathLike[str] | bytes | None = None,
    signature: str | os.PathLike[str] | None = None,
) -> Check:
    """Whether `Model.open` with the same arguments would open a file here, on which device, and in how much memory.

    Reads the header and the launch plan alone, whatever the file's size; no weight, no kernel's code and no tokenizer.
    With require_signature every byte is hashed, too. Raises FormatError where those are not sound, SignatureError as
    `Model.open` does, InputError where there is no such file, for an unknown device, and for a context that the model
    is not made for.
    """
    asked, ordinal = load.parse_device(device)
    with ArtifactFile.open(path, require_signature, signature) as file, naming(path):
        validate(file.program, file.tensors)
        load.check_context(file.program, context)
        kinds = ("cuda", "cpu") if asked == "auto" else (asked,)
        devices = tuple(_check_device(file, kind, ordinal) for kind in kinds)
        chosen: DeviceCheck | None = None
        context_reason: str | None = None
        wanted = needed = free = fits = None
        try:
            kind, ordinal, reason = load.choose_device(file.program, device)
            chosen = devices[kinds.index(kind)]
            if not chosen.usable:  # its kernels are there, but its memory cannot be had
                raise DeviceError(chosen.reason)
            free, fits = chosen.free_bytes, chosen.largest_context
            wanted = load.wanted_context(file, kind, context, free)
            wanted, context_reason = load.choose_context(file, kind, context, free)
            runs = True
        except DeviceError as error:
            runs, reason = False, str(error)
        if wanted is not None:
            needed = memory.needed_bytes(file.program, file.tensors, kind, wanted)
    return Check(
        path=file.path,
        name=file.program.name,
        runs=runs,
        reason=reason,
        device=None if chosen is None else chosen.device,
        context=wanted,
        needed_bytes=needed,
        free_bytes=free,
        largest_context=fits,
        context_reason=context_reason,
        max_context=file.program.max_context,
        devices=devices,
    )


def _check_device(file: ArtifactFile, kind: str, ordinal: int) -> DeviceCheck:
    program, name = file.program, f"cuda:{ordinal}" if kind == "cuda" else "cpu"
    usable, reason = load.probe(kind, program, ordinal)
    free = fits = None
    if usable:
        try:
            with load.usable_bytes(kind, ordinal) as free:
                pass
        except DeviceError as error:
            usable, reason = False, str(error)
    if free is not None:
        fits = memory.largest_context(program, file.tensors, kind, free)
    costs = memory.context_costs(program, file.tensors, kind) if kind in program.plans else ()
    return DeviceCheck(name, usable, reason, free, fits, tuple(costs))
