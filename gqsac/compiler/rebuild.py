"""Rebuild: the kernels of a file that is not trusted, made here from its launch plan, to run them or to compare.

The runtime asks for it (`gqsa_runtime.rebuild`). What then runs is what the installed templates and compilers make of
the operators and constants in a plan that has passed every check; no code of the file is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

from gqsa_runtime.program import Binary, Program
from gqsa_runtime.reader import ArtifactFile, naming
from gqsa_runtime.rebuild import DIFFERENT, DIFFERENT_COMPILER, SAME, Comparison, KernelComparison
from gqsa_runtime.validate import validate

from gqsac import __version__
from gqsac.build_progress import BuildProgress  # noqa: F401  for who calls `compare` from the runtime's command
from gqsac.compiler.kernel_spec import KernelSpec
from gqsac.compiler.passes.compile import (
    CPU_TARGETS,
    CUDA_TARGETS,
    check_targets,
    compile_all,
    default_cache_dir,
    families,
    family_of,
    toolchain,
)
from gqsac.compiler.passes.link import kind_of, link
from gqsac.compiler.relink import plan_anew, recorded_compiler, render_all
from gqsac.errors import FormatError

_COMPILERS = {"cuda": "nvrtc", "cpu": "zig"}  # of each family


def offered(program: Program) -> Program:
    """The program as if it had binaries for every target that can be made here of its plans, without their code."""
    targets = [target for target in (*CUDA_TARGETS, *CPU_TARGETS) if family_of(target) in program.plans]
    return replace(program, binaries=tuple(Binary(target, kind_of(target), "", {}) for target in targets))


def make(program: Program, target: str) -> tuple[Binary, bytes]:
    """The kernels of a valid program's plan for one target: where they lie in the code, and the code.

    Raises FormatError for a plan whose kernels are not those that this compiler makes, DeviceError without a compiler.
    """
    family = family_of(target)
    sources = {family: render_all(_own_kernels(program, family), family)}
    compiled = compile_all(sources, (target,), cache_dir=default_cache_dir())
    (binary,), (code,) = link(compiled, (target,))
    return binary, code.make().tobytes()


def made_by(target: str) -> str:
    """What makes the kernels of a target here, such as "gqsac 0.1.0, zig 0.17.1"."""
    return _words(toolchain((target,)))


def compare(path: str, progress: Callable[[str, int, int], None] = lambda stage, done, total: None) -> Comparison:
    """Compiles every kernel of a sound file anew, for all of its targets and without the cache, and compares the code.

    progress: called as ("compile", done, total). Raises GqsaError where a target cannot be compiled for, or the plan's
    kernels are not those that this compiler makes: then nothing was compared.
    """
    with ArtifactFile.open(path) as file, naming(path):
        program = file.program
        validate(program, file.tensors)
        recorded = recorded_compiler(file)
        targets = check_targets(tuple(binary.target for binary in program.binaries))
        sources = {family: render_all(_own_kernels(program, family), family) for family in families(targets)}
        here = toolchain(targets)
        binaries, tensors = link(compile_all(sources, targets, progress=progress), targets)
        held = {binary.target: binary for binary in program.binaries}
        rows = []
        for made, tensor in zip(binaries, tensors, strict=True):
            names = ("gqsac", _COMPILERS[family_of(made.target)])
            same_compiler = all(recorded.get(name) == here[name] for name in names)
            rows += _compare(
                held[made.target], _code(file, held[made.target]), made, tensor.make().tobytes(), same_compiler
            )
        return Comparison(_words(recorded), _words(here), tuple(rows))


def _compare(held: Binary, held_code: bytes, made: Binary, code: bytes, same_compiler: bool) -> list[KernelComparison]:
    def row(name: str, theirs: bytes, ours: bytes) -> KernelComparison:
        verdict = SAME if theirs == ours else DIFFERENT if same_compiler else DIFFERENT_COMPILER
        digests = (hashlib.sha256(data).hexdigest() for data in (theirs, ours))
        return KernelComparison(made.target, name, verdict, *digests)

    rows = [
        row(name, held_code[held.kernels[name][0] :][: held.kernels[name][1]], code[offset : offset + size])
        for name, (offset, size) in made.kernels.items()
    ]
    # Nothing may hide between the kernels either.
    if all(one.verdict == SAME for one in rows) and (held.kernels != made.kernels or held_code != code):
        rows.append(row("(between kernels)", held_code, code))
    return rows


def _code(file: ArtifactFile, binary: Binary) -> bytes:
    return file.read(binary.tensor).tobytes()


def _own_kernels(program: Program, family: str) -> dict[str, KernelSpec]:
    """The kernels of a plan by name. Raises FormatError where this compiler would name or launch them otherwise."""
    plan = program.plans[family]
    specs, anew = plan_anew(plan, family)
    if anew != plan:
        other = next((kernel for kernel in plan.kernels if kernel not in anew.kernels), plan.kernels[0])
        raise FormatError(
            f"the launch plan for {family} is not one whose kernels gqsac {__version__} makes: it would name or launch "
            f"{other.name} otherwise; build the file again, or make its kernels anew with `gqsac relink FILE -o NEW`"
        )
    return specs


def _words(compiler: dict) -> str:
    """A record of compilers as text; it may come from a file."""
    found = [f"{name} {str(compiler[name])[:40]}" for name in ("gqsac", "nvrtc") if compiler.get(name)]
    found += [str(compiler["zig"])[:40]] if compiler.get("zig") else []
    text = ", ".join(found)
    return text if text.isprintable() else repr(text)
