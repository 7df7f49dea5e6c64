"""Locks on files and folders that are under way, which the system lets go when their process ends, however it ends.

So what a killed process left can be told from what another one is still making.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # Windows: nothing is locked there, and nothing swept
    fcntl = None

_ATTEMPTS = 10  # at a scratch folder that is not swept before it is locked


def lock(path: Path) -> int | None:
    """A descriptor that holds the lock of a file or folder until it is closed, or None where another one holds it."""
    if fcntl is None:
        return os.open(os.devnull, os.O_RDONLY)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def sweep(paths: Iterable[Path]) -> None:
    """Removes the files and folders of this user that no living process holds."""
    for path in paths if fcntl else ():
        with contextlib.suppress(OSError):  # someone else removes it, too
            descriptor = lock(path) if path.stat().st_uid == os.getuid() else None
            if descriptor is not None:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
                os.close(descriptor)


@contextlib.contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """A temporary folder for the length of a `with` block. Those that killed processes left are removed first."""
    sweep(Path(tempfile.gettempdir()).glob(f"{prefix}*"))
    for attempt in itertools.count():
        with tempfile.TemporaryDirectory(prefix=prefix) as name:
            descriptor = lock(Path(name))
            try:
                # Another process may sweep it between the two lines above. Where nothing can be locked nobody sweeps.
                if attempt < _ATTEMPTS and (descriptor is None or not os.path.isdir(name)):
                    continue
                yield Path(name)
                return
            finally:
                if descriptor is not None:
                    os.close(descriptor)
