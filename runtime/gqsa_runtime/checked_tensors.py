"""A file's tensors for a device: read when asked for, and checked before anything points into them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from gqsa_runtime.memory import weight_bytes
from gqsa_runtime.reader import ArtifactFile
from gqsa_runtime.validate import ContentChecks


class CheckedTensors(Mapping):
    """A file's tensors, read when asked for: digest verified, index tensors checked.

    An array that is still in use is handed out again rather than read twice.
    progress: called with (bytes read so far, bytes of all tensors that a device of the family reads).
    """

    def __init__(self, file: ArtifactFile, family: str, progress: Callable[[int, int], None] | None = None):
        self._file = file
        self._checks = ContentChecks(file.program, file.tensors)
        self._alive: weakref.WeakValueDictionary[str, np.ndarray] = weakref.WeakValueDictionary()
        self._progress = progress
        self._told: set[str] = set()  # what progress has counted: a check may read a tensor ahead of its turn
        self._read_bytes, self._all_bytes = 0, weight_bytes(file.program, file.tensors, family)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._file.tensors:
            raise KeyError(name)
        array = self._alive.get(name)
        if array is None:
            array = self._file.read(name)
            self._checks.check(name, array, self.__getitem__)
            array.flags.writeable = False
            self._alive[name] = array
            self._read_bytes += 0 if name in self._told else array.nbytes
            self._told.add(name)
            if self._progress:
                self._progress(self._read_bytes, self._all_bytes)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.tensors)

    def __len__(self) -> int:
        return len(self._file.tensors)

    def nbytes(self, name: str) -> int:
        """Size of a tensor without reading it."""
        return self._file.tensors[name].size
