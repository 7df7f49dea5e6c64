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
from gqsa_runtime.typecheck import printable
from gqsa_runtime.validate import validate

from gqsac.build_progress import BuildProgress  # noqa: F401  for who calls `compare` from the runtime's command
from gqsac.compiler.lift import plan_again
from gqsac.compiler.passes.compile import (
    CPU_TARGETS,
    CUDA_TARGETS,
    compile_all,
    default_cache_dir,
    families,
    family_of,
    toolchain,
)
from gqsac.compiler.passes.link import kind_of, link
from gqsac.compiler.relink import recorded_compiler, render_all, targets_of

_COMPILERS = {"cuda": "nvrtc", "cpu": "zig"}  # of each family


def offered(program: Program) -> Program:
    """The program as if it had binaries for every target that can be made here of its plans, without their code."""
    targets = [target for target in (*CUDA_TARGETS, *CPU_TARGETS) if family_of(target) in program.plans]
    return replace(program, binaries=tuple(Binary(target, kind_of(target), "", 0, "", {}) for target in targets))


def make(file: ArtifactFile, target: str) -> tuple[Binary, bytes]:
    """The kernels of a valid file's plan for one target: where they lie in the code, and the code.

    Raises FormatError for a plan that is not one which this compiler makes, DeviceError without a compiler.
    """
    family = family_of(target)
    sources = {family: _sources(file, family)}
    compiled = compile_all(sources, (target,), cache_dir=default_cache_dir())
    ((binary, code),) = link(compiled, (target,))
    return binary, code


def made_by(target: str) -> str:
    """What makes the kernels of a target here, such as "gqsac 0.1.0, zig 0.17.1"."""
    return _words(toolchain((target,)))


def compare(
    file: ArtifactFile, progress: Callable[[str, int, int], None] = lambda stage, done, total: None
) -> Comparison:
    """Compiles every kernel of a sound file anew, for all of its targets and without the cache, and compares the code.

    progress: called as ("compile", done, total). Raises GqsaError where a target cannot be compiled for, or a plan is
    not one that this compiler makes: then nothing was compared.
    """
    with naming(file.path):
        program = file.program
        validate(program, file.tensors)
        recorded = recorded_compiler(file)
        targets = targets_of(program)
        sources = {family: _sources(file, family) for family in families(targets)}
        here = toolchain(targets)
        linked = link(compile_all(sources, targets, progress=progress), targets)
        held = {binary.target: binary for binary in program.binaries}
        rows = []
        for made, code in linked:
            names = ("gqsac", _COMPILERS[family_of(made.target)])
            same_compiler = all(recorded.get(name) == here[name] for name in names)
            rows += _compare(held[made.target], file.code(held[made.target]), made, code, same_compiler)
        return Comparison(printable(_words(recorded)), _words(here), tuple(rows))


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


def _sources(file: ArtifactFile, family: str) -> dict[str, str]:
    specs, _ = plan_again(file.program, family, recorded_compiler(file))
    return render_all(specs, family)


def _words(compiler: dict) -> str:
    """A record of compilers as text; it may come from a file."""
    held = {name: compiler[name][:40] for name in ("gqsac", "nvrtc", "zig") if isinstance(compiler.get(name), str)}
    text = ", ".join(version if name == "zig" else f"{name} {version}" for name, version in held.items())
    return text if text.isprintable() else repr(text)
