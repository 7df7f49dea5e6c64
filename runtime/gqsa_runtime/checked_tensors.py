"""A file's tensors for a device: read and checked ahead by several threads, before anything points into them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future

import numpy as np

from gqsa_runtime.device_cpu import default_threads
from gqsa_runtime.reader import ArtifactFile
from gqsa_runtime.stopwatch import Stopwatch
from gqsa_runtime.validate import ContentChecks

# One thread reads and hashes 1.5 to 2 GB/s, so eight feed any bus that a GPU has.
MAX_READERS = 8
# Of tensors that nobody has asked for yet: what is read while a GPU's context is made, and no more memory than that.
AHEAD_BYTES = 1 << 30


class CheckedTensors(Mapping[str, np.ndarray]):
    """A file's tensors: none is handed out whose digest is wrong, or whose numbers break a rule of its layout.

    names: those that will be asked for. Within a `with` block threads read and check them ahead in this order. Any
    tensor may be asked for at any time, from any thread, within the block or not; what is wrong with it is raised
    there. An array that is still in use is handed out again rather than read twice.
    progress: called with (bytes handed out so far, bytes of all names). clock: gets the stages "read" (and hash) and
    "check", of all threads, and "wait", until a tensor that was asked for is there.
    """

    def __init__(
        self,
        file: ArtifactFile,
        names: Iterable[str],
        progress: Callable[[int, int], None] | None = None,
        clock: Stopwatch | None = None,
    ):
        self._file, self._clock = file, clock or Stopwatch()
        self._checks = ContentChecks(file.program, file.tensors)
        self._alive: weakref.WeakValueDictionary[str, np.ndarray] = weakref.WeakValueDictionary()
        self._names = list(names)
        self._progress = progress
        self._told: set[str] = set()  # what progress has counted
        self._told_bytes, self._all_bytes = 0, sum(map(self.nbytes, self._names))
        # The rest belongs to the lock: what is read or being read and was not handed out yet.
        self._changed = threading.Condition()
        self._pending: dict[str, Future[np.ndarray]] = {}
        self._pending_bytes = 0
        self._next = 0  # of names: the first that no reader has looked at
        self._stopped = True
        self._readers: list[threading.Thread] = []

    def __enter__(self) -> CheckedTensors:
        self._stopped = False
        count = min(MAX_READERS, default_threads(), len(self._names))
        self._readers = [threading.Thread(target=self._read_ahead, name="gqsa-reader") for _ in range(count)]
        for reader in self._readers:
            reader.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for reader in self._readers:
            reader.join()
        self._pending.clear()

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._file.tensors:
            raise KeyError(name)
        with self._clock.stage("wait"):
            array = self._get(name)
        with self._changed:
            if self._pending.pop(name, None) is not None:
                self._pending_bytes -= array.nbytes
                self._changed.notify_all()
            self._told_bytes += 0 if name in self._told else array.nbytes
            self._told.add(name)
        if self._progress:
            self._progress(self._told_bytes, self._all_bytes)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.tensors)

    def __len__(self) -> int:
        return len(self._file.tensors)

    def nbytes(self, name: str) -> int:
        """Size of a tensor without reading it."""
        return self._file.tensors[name].size

    def _get(self, name: str) -> np.ndarray:
        """The tensor, which stays pending: a check may want it ahead of who asks for it."""
        with self._changed:
            array = self._alive.get(name)
            if array is not None:
                return array
            pending = self._pending.get(name)
            mine = pending is None
            future = self._claim(name) if pending is None else pending
        if mine:
            self._read(name, future)
        return future.result()

    def _claim(self, name: str) -> Future[np.ndarray]:
        """Makes the tensor pending; whoever calls this, with the lock, must `_read` it."""
        future: Future[np.ndarray] = Future()
        self._pending[name] = future
        self._pending_bytes += self.nbytes(name)
        return future

    def _read(self, name: str, future: Future[np.ndarray]) -> None:
        try:
            with self._clock.stage("read"):
                array = self._file.read(name)
            with self._clock.stage("check"):
                # Rules compare a tensor with others, but never in a circle: nobody waits for who waits for him.
                self._checks.check(name, array, self._get)
            array.flags.writeable = False
        except BaseException as error:  # for who asks for the tensor, whatever it is
            future.set_exception(error)
        else:
            with self._changed:
                self._alive[name] = array
            future.set_result(array)

    def _read_ahead(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._may_read())
                if self._stopped or self._next == len(self._names):
                    return
                name = self._names[self._next]
                self._next += 1
                if name in self._pending or name in self._told:
                    continue
                future = self._claim(name)
            self._read(name, future)

    def _may_read(self) -> bool:
        if self._next == len(self._names) or not self._pending:
            return True
        return self._pending_bytes + self.nbytes(self._names[self._next]) <= AHEAD_BYTES
