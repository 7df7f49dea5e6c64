"""The command `gqsac` as a user meets it: in this process where speed matters, or in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import gqsa_runtime.cli
from click.testing import CliRunner, Result
from gqsa_runtime.device_cpu import supported_targets

from gqsac import cli

# One target of this machine: each takes seconds to compile for. Kernels are tested on all that it runs.
TARGET = "x86_64_v3" if "x86_64_v3" in supported_targets() else "cpu"

ROOT = Path(__file__).resolve().parents[2]


class _Main(click.Command):
    """`gqsac.cli.main` as a command, so that CliRunner can catch its streams and its exit code."""

    def main(self, args=None, prog_name=None, **extra):
        gqsa_runtime.cli.main(cli.cli, args=list(args or ()), prog_name="gqsac")


def gqsac(*args, stdin: str | None = None) -> Result:
    """Runs the command in this process. An exception that would be a traceback fails the test."""
    result = CliRunner().invoke(_Main("gqsac"), [str(arg) for arg in args], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def succeed(*args, stdin: str | None = None) -> Result:
    """Runs the command in this process and expects exit code 0."""
    result = gqsac(*args, stdin=stdin)
    assert result.exit_code == 0, result.stderr
    return result


def refusal(result) -> str:
    """The one sentence of a failed command. Fails on anything else: a traceback, other output, another code.

    result: of `gqsac`, or a finished process with text streams.
    """
    code = result.exit_code if isinstance(result, Result) else result.returncode
    assert code == 1, f"exit code {code}: {result.stderr}"
    assert result.stdout == ""
    assert "Traceback" not in result.stderr and "Exception" not in result.stderr, result.stderr
    # Notes may stand before it, such as the one on rounding without data.
    *notes, error = result.stderr.strip().splitlines()
    assert error.startswith("error: ") and not any("error" in note.lower() for note in notes), result.stderr
    assert len(error) < 700, error
    return error.removeprefix("error: ")


def command(*args) -> list[str]:
    """The command line of `python -m gqsac`."""
    return [sys.executable, "-m", "gqsac", *map(str, args)]


def environment(**changes: str | Path) -> dict[str, str]:
    """This process's environment, with both packages importable and the changes made."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "runtime")])
    made = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return {**made, **{key: str(value) for key, value in changes.items()}}


def spawn(*args, stdin: str | None = None, preexec_fn=None, **changes) -> subprocess.CompletedProcess:
    """Runs the command in a process of its own. changes: of the environment."""
    return subprocess.run(
        command(*args), env=environment(**changes), input=stdin or "", capture_output=True, text=True, timeout=120,
        preexec_fn=preexec_fn,
    )  # fmt: skip
