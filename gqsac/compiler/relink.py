"""Relink: the kernels of a finished .gqsa file made anew from its plan, for other targets or by a newer compiler.

A plan says of each kernel its operator and all of its constants, and that is all that rendering and compiling want. So
neither the checkpoint nor the graph is needed, and the weights stay as they are: their layout is the same for all
targets. The plan of a family of targets (CUDA, CPU) that a file was not built for is made from the one that it has, if
that is one which this compiler makes; otherwise such targets are refused.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gqsa_runtime import format as fmt
from gqsa_runtime.program import Plan, Program, Step
from gqsa_runtime.reader import ArtifactFile, naming
from gqsa_runtime.validate import validate

from gqsac import __version__
from gqsac.compiler.kernel_spec import KernelSpec, name_kernels
from gqsac.compiler.lift import plan_again
from gqsac.compiler.passes.bundle import TEXTS, Content, bundle, check_output
from gqsac.compiler.passes.compile import (
    CPU_TARGETS,
    CUDA_TARGETS,
    Compiled,
    check_targets,
    compile_all,
    default_cache_dir,
    families,
    toolchain,
)
from gqsac.compiler.passes.link import code_tensors, kind_of, link
from gqsac.compiler.passes.pack import PackedTensor
from gqsac.compiler.passes.render import render
from gqsac.compiler.passes.schedule import kernels
from gqsac.compiler.passes.verify import verify
from gqsac.errors import FormatError, InputError

# What `bundle` writes. A file of another writer may hold more, which would be lost.
_KEYS = {fmt.KEY_ARCHITECTURE, fmt.KEY_ALIGNMENT, fmt.KEY_NAME, fmt.KEY_FORMAT_VERSION, *TEXTS.values()}


@dataclass(frozen=True)
class Relinked:
    """What `relink` made. file_bytes: size of the file. n_compiled, n_cached: binaries. seconds: all of it took."""

    name: str
    targets: tuple[str, ...]
    file_bytes: int
    n_compiled: int
    n_cached: int
    seconds: float


def relink(
    path: str | os.PathLike,
    output: str | os.PathLike,
    targets: tuple[str, ...] = (),
    jobs: int = 0,
    cache: bool = True,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    require_signature: str | os.PathLike | bytes | None = None,
    signature: str | os.PathLike | None = None,
) -> Relinked:
    """Writes a .gqsa file with the weights, plans and texts of another and kernels that are made here and now.

    targets: as of a build, () for those of the file. jobs: compile threads, 0 for all cores. progress: called as
    (stage, done, total). With the file's own targets and the compiler that made it, the result is the same bytes.
    output may be the file itself. require_signature, signature: of that file, as in `gqsa_runtime.Model.open`; what is
    written has other bytes, and no signature. Raises GqsaError for a file or a target that will not do; writes nothing
    then.
    """
    started = time.perf_counter()
    check_output(output)
    chosen = check_targets(targets)
    with ArtifactFile.open(path, require_signature, signature) as file, naming(path):
        validate(file.program, file.tensors)
        chosen = chosen or targets_of(file.program)
        _check_nothing_lost(file)
        sources, plans = {}, {}
        for family in families(chosen):
            specs, plans[family] = _plan(file, family)
            sources[family] = render_all(specs, family)
        compiled = compile_all(sources, chosen, jobs, default_cache_dir() if cache else None, progress)
        content = _content(file, replace(file.program, plans=plans), compiled, chosen)
        size = bundle(Path(output), content, check=verify, progress=progress)
    cached = sum(item.cached for item in compiled)
    seconds = time.perf_counter() - started
    return Relinked(file.program.name, chosen, size, len(compiled) - cached, cached, seconds)


def plan_anew(plan: Plan, family: str) -> tuple[dict[str, KernelSpec], Plan]:
    """The kernels of a plan by name, and the plan with its kernels named and launched as this compiler does it.

    The plan must be valid. Raises UnsupportedError where a kernel cannot be launched on every target.
    """
    specs = {kernel.name: KernelSpec.make(kernel.op, **kernel.params) for kernel in plan.kernels}
    names = name_kernels(list(specs.values()))
    phases = {
        phase: tuple(Step(names[specs[step.kernel]], step.args) for step in steps)
        for phase, steps in plan.phases.items()
    }
    used = {phase: {specs[step.kernel] for step in steps} for phase, steps in plan.phases.items()}
    made = replace(plan, kernels=kernels(names, used, plan.prefill_chunk, family), phases=phases)
    return {name: spec for spec, name in names.items()}, made


def render_all(specs: Mapping[str, KernelSpec], family: str) -> dict[str, str]:
    """Kernel name -> source text."""
    return {name: render(family, spec, name) for name, spec in specs.items()}


def targets_of(program: Program) -> tuple[str, ...]:
    """The targets of a valid program in canonical order. Raises FormatError for one that cannot be made here."""
    for binary in program.binaries:
        if binary.target not in CUDA_TARGETS + CPU_TARGETS or binary.kind != kind_of(binary.target):
            raise FormatError(
                f"the file has a {binary.kind} for {binary.target!r}, which gqsac {__version__} does not make; its "
                f"targets are {', '.join(CUDA_TARGETS + CPU_TARGETS)}"
            )
    return check_targets(tuple(binary.target for binary in program.binaries))


def recorded_compiler(file: ArtifactFile) -> dict:
    """What the file says of the compiler that made it. Raises FormatError where it says nothing that can be read."""
    try:
        recorded = json.loads(file.text(fmt.KEY_COMPILER))
    except (ValueError, RecursionError):
        recorded = None
    if not isinstance(recorded, dict):
        raise FormatError(f"the metadata string {fmt.KEY_COMPILER!r} is no JSON object; build the file again")
    return recorded


def _plan(file: ArtifactFile, family: str) -> tuple[dict[str, KernelSpec], Plan]:
    """The plan of a family, which the file may have or not."""
    plans = file.program.plans
    if family in plans:
        return plan_anew(plans[family], family)
    (known,) = plans
    return plan_again(file.program, known, recorded_compiler(file), family)


def _check_nothing_lost(file: ArtifactFile) -> None:
    for key, value in file.metadata.items():
        if key not in _KEYS or value == "":
            raise InputError(
                f"{file.path} holds the metadata key {key!r}{'' if value else ' without a value'}, which gqsac never "
                "writes and relink would lose; build the file again with `gqsac build`"
            )


def _content(file: ArtifactFile, program: Program, compiled: list[Compiled], targets: tuple[str, ...]) -> Content:
    linked = link(compiled, targets)
    program = replace(program, binaries=tuple(binary for binary, _ in linked))
    code = code_tensors(linked)
    old_code = {binary.tensor for binary in file.program.binaries}
    weights = [
        PackedTensor(name, info.dtype, info.shape, lambda name=name: file.read(name))
        for name, info in file.tensors.items()
        if name not in old_code
    ]
    taken = {tensor.name for tensor in code} & {tensor.name for tensor in weights}
    if taken:
        raise InputError(f"{file.path} keeps weights in {min(taken)!r}, the place of kernels; build it again")
    return Content(
        name=file.text(fmt.KEY_NAME),
        program_json=program.to_json(),
        compiler_json=fmt.canonical_json({**recorded_compiler(file), **toolchain(targets)}),
        facts_json=file.text(fmt.KEY_FACTS) if fmt.KEY_FACTS in file.metadata else None,
        tokenizer_json=file.text(fmt.KEY_TOKENIZER),
        chat_template=file.text(fmt.KEY_CHAT_TEMPLATE) if fmt.KEY_CHAT_TEMPLATE in file.metadata else None,
        tensors=(*code, *weights),
    )
