"""Kernels made anew by the package gqsac where the code in a file is not to be trusted: what passes between the two."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from gqsa_runtime.errors import DeviceError, InputError

if TYPE_CHECKING:
    from gqsa_runtime.program import Binary, Program
    from gqsa_runtime.reader import ArtifactFile

FILE, REBUILD = "file", "rebuild"  # where the machine code of a model comes from
SAME, DIFFERENT, DIFFERENT_COMPILER = "same", "different", "different compiler"


@dataclass(frozen=True)
class KernelComparison:
    """One kernel's machine code in a file and as made here. kernel: its name, "" for all of a shared object.

    verdict: "same", "different", or "different compiler" where they differ and the file says that another version of
    gqsac or of the compiler made it. in_file, made_here: SHA-256 of the code.
    """

    target: str
    kernel: str
    verdict: str
    in_file: str
    made_here: str


@dataclass(frozen=True)
class Comparison:
    """All kernels of a file. recorded, installed: compilers and versions, of the file as it says, and here."""

    recorded: str
    installed: str
    kernels: tuple[KernelComparison, ...]

    @property
    def same(self) -> bool:
        """Whether all of the file's machine code is what is made here."""
        return not self.n_differing

    @property
    def n_differing(self) -> int:
        """Kernels whose code is not the same."""
        return sum(kernel.verdict != SAME for kernel in self.kernels)


class Compiler(Protocol):
    """What the module `gqsac.compiler.rebuild` offers; each function says more there."""

    def BuildProgress(self) -> AbstractContextManager[Callable[[str, int, int], None]]:  # noqa: N802  a class there
        """Progress bars for `compare`."""

    def offered(self, program: Program) -> Program:
        """The program as if it had binaries for every target that can be made here of its plans."""

    def make(self, file: ArtifactFile, target: str) -> tuple[Binary, bytes]:
        """The kernels of a valid file's plan for one target: where they lie in the code, and the code."""

    def made_by(self, target: str) -> str:
        """What makes the kernels of a target here."""

    def compare(self, file: ArtifactFile, progress: Callable[[str, int, int], None]) -> Comparison:
        """Compiles every kernel of a sound file anew and compares the code."""


def compiler() -> Compiler:
    """The module `gqsac.compiler.rebuild`. Raises DeviceError where gqsac is not installed."""
    try:
        return cast(Compiler, importlib.import_module("gqsac.compiler.rebuild"))
    except ImportError as error:
        raise DeviceError(
            f"making kernels anew needs the compiler, the package gqsac ({error}); install it with `pip install .` in "
            "a checkout of gqsac"
        ) from error


def check_choice(kernels: str) -> None:
    """Raises InputError for a source of kernels that there is not."""
    if kernels not in (FILE, REBUILD):
        raise InputError(f"kernels is {kernels!r}, expected {FILE!r} or {REBUILD!r}")
