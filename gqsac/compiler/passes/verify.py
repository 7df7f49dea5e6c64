"""Verify: opens the written file with the runtime's own reader and checks every digest and argument."""

from pathlib import Path

from gqsa_runtime.verify import verify_file


def verify(path: Path) -> None:
    """Raises FormatError if the runtime would refuse the file: a bug of the compiler or a bad disk."""
    verify_file(path)
