"""Bundle: writes the artifact. One pass over the weights; the file appears whole or not at all."""

import contextlib
import glob
import hashlib
import itertools
import math
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gqsa_runtime import format as fmt
from gqsa_runtime.program import NUMPY_DTYPES

from gqsac.compiler.passes.pack import PackedTensor
from gqsac.errors import DeviceError, InputError
from gqsac.locks import lock, scratch_folder, sweep

# Texts of a file: their keys by their names in Content, in the order in which they are written.
TEXTS = {
    "compiler_json": fmt.KEY_COMPILER,
    "facts_json": fmt.KEY_FACTS,
    "program_json": fmt.KEY_PROGRAM,
    "tokenizer_json": fmt.KEY_TOKENIZER,
    "chat_template": fmt.KEY_CHAT_TEMPLATE,
}
_MAKERS = max(1, min(4, len(os.sched_getaffinity(0))))  # threads that pack weights ahead of the writing


@dataclass(frozen=True)
class Content:
    """What goes into a .gqsa file. The texts are stored as they are, and the tensors in their order."""

    name: str
    program_json: str
    compiler_json: str
    facts_json: str | None
    tokenizer_json: str
    chat_template: str | None
    tensors: tuple[PackedTensor, ...]


def check_output(path: Path) -> None:
    """Raises InputError or DeviceError where a build could not put its file, before the work is done."""
    path = Path(path)
    if path.is_dir() or not path.name:
        raise InputError(f"-o is {path}, which is a folder; give the name of the file to make, such as model.gqsa")
    if not path.parent.is_dir():
        raise InputError(f"-o is {path}, but the folder {path.parent} does not exist; make it first")
    if path.exists():
        # Only what a build made may be replaced: not a device, and not the model's own weights.
        if not path.is_file():
            raise InputError(f"-o is {path}, which is not a regular file; choose another name")
        with path.open("rb") as file:
            start = file.read(len(fmt.GGUF_MAGIC))
        if start not in (b"", fmt.GGUF_MAGIC):
            raise InputError(f"-o is {path}, which exists and is not a .gqsa file; choose another name or remove it")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise DeviceError(f"-o is {path}, but the folder {path.parent.resolve()} cannot be written; choose another")


def bundle(
    path: Path,
    content: Content,
    check: Callable[[Path], None] = lambda path: None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> int:
    """Writes a .gqsa file and returns its size in bytes.

    The file is written beside `path` under a temporary name, synced and renamed. The digests stand
    last, so that weights stream through memory one tensor at a time. check: called with the finished
    file before it is renamed; what it raises leaves nothing behind. progress: called as
    ("write", done, total), bytes of tensors, after each. Raises DeviceError where the disk is full or not writable.
    """
    tensors = content.tensors
    path = Path(path)
    sweep(path.parent.glob(f".{glob.escape(path.name)}.*.partial"))  # of builds that were killed
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise DeviceError(f"cannot write in {path.parent.resolve()}: {error.strerror}; choose another -o") from error
    writer, held = None, lock(Path(temporary))
    try:
        writer, file = _begun(temporary, content)
        digests = np.zeros(_digests_shape(tensors), np.int8)
        digests[0] = _digest(Path(temporary).read_bytes())
        written, n_bytes = 0, sum(tensor.size for tensor in tensors)
        for row, (tensor, array) in enumerate(_made_ahead(tensors), start=1):
            if array.shape != tensor.shape or array.dtype != NUMPY_DTYPES[tensor.dtype]:
                raise AssertionError(
                    f"{tensor.name}: made {array.dtype} {array.shape}, planned {tensor.dtype} {tensor.shape}"
                )
            digests[row] = _digest(array)
            writer.write_tensor_data(array)
            written += array.nbytes
            progress("write", written, n_bytes)
        writer.write_tensor_data(digests)
        file.flush()
        os.fsync(file.fileno())
        writer.close()
        check(Path(temporary))
        size = os.path.getsize(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        return size
    except OSError as error:
        free = os.statvfs(path.parent)
        reason = error.strerror or "the disk is full"  # numpy's tofile gives no errno
        raise DeviceError(
            f"writing {path} failed: {reason} ({free.f_bavail * free.f_frsize / 1e6:.0f} MB free in "
            f"{path.parent.resolve()}); nothing was left behind, free some space or choose another -o"
        ) from error
    finally:
        _close(writer)
        if held is not None:
            os.close(held)
        Path(temporary).unlink(missing_ok=True)


def bundled_bytes(content: Content) -> int:
    """The size in bytes of the file that `bundle` would write; no weight is made."""
    with scratch_folder("gqsac-build-") as folder:
        writer, file = _begun(str(folder / "header"), content)
        start = file.tell()
        writer.close()
    sizes = [*(tensor.size for tensor in content.tensors), math.prod(_digests_shape(content.tensors))]
    return start + sum(-(-size // fmt.ALIGNMENT) * fmt.ALIGNMENT for size in sizes)


def _begun(path: str, content: Content):
    """The writer of a file whose header is written, and that file, open where its tensors are to follow."""
    writer = gguf.GGUFWriter(path, fmt.ARCHITECTURE)
    writer.add_custom_alignment(fmt.ALIGNMENT)
    writer.add_string(fmt.KEY_NAME, content.name)
    writer.add_uint32(fmt.KEY_FORMAT_VERSION, fmt.FORMAT_VERSION)
    for name, key in TEXTS.items():
        text = getattr(content, name)
        if text is not None:
            writer.add_string(key, text)
    for tensor in content.tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(NUMPY_DTYPES[tensor.dtype]), tensor.size)
    shape = _digests_shape(content.tensors)
    writer.add_tensor_info(fmt.DIGESTS_TENSOR, shape, np.dtype(np.int8), math.prod(shape))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (file,) = writer.fout
        writer.write_padding(file, file.tell())
        file.flush()
    except BaseException:
        _close(writer)
        raise
    return writer, file


def _digests_shape(tensors: Sequence[PackedTensor]) -> tuple[int, int]:
    """Of all that stands before the tensors, and of each."""
    return len(tensors) + 1, 32


def _made_ahead(tensors: Sequence[PackedTensor]) -> Iterator[tuple[PackedTensor, np.ndarray]]:
    """The tensors with their arrays, in order. Others are made meanwhile, few enough to keep memory small."""
    groups = [list(group) for _, group in itertools.groupby(tensors, key=lambda t: t.source or t.name)]
    with ThreadPoolExecutor(_MAKERS) as pool:
        pending = deque()
        try:
            for group in itertools.chain(groups, [None] * _MAKERS):
                if group is not None:
                    pending.append((group, pool.submit(lambda g: [np.ascontiguousarray(t.make()) for t in g], group)))
                if pending and (len(pending) > _MAKERS or group is None):
                    made, future = pending.popleft()
                    yield from zip(made, future.result(), strict=True)
        finally:
            pool.shutdown(cancel_futures=True)


def _close(writer: gguf.GGUFWriter | None) -> None:
    """Closes the writer's files, whatever state a failure left them in."""
    for file in (writer.fout if writer else None) or ():
        with contextlib.suppress(OSError):  # what is still buffered does not fit the disk either
            file.close()


def _digest(data) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(data).digest(), np.int8)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
