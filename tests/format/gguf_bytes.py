"""A GGUF writer of its own, by struct-packing, that can also write what a sound writer never would."""

import hashlib
import struct

import numpy as np

ALIGNMENT = 64
TYPE_IDS = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.int8): 24, np.dtype(np.int16): 25,
            np.dtype(np.int32): 26}  # fmt: skip
DIGESTS = "gqsa.digests"


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(item) -> bytes:
    """A metadata value with its type: bool, int (uint32), str, or raw bytes as they are."""
    if isinstance(item, bytes):
        return item
    if isinstance(item, bool):
        return struct.pack("<IB", 7, item)
    if isinstance(item, int):
        return struct.pack("<II", 4, item)
    return struct.pack("<I", 8) + string(item)


def pad(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % ALIGNMENT)


def tensor_info(name, shape, type_id, offset) -> bytes:
    dims = b"".join(struct.pack("<Q", n) for n in reversed(shape))
    return string(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", type_id, offset)


def header(pairs, infos, magic=b"GGUF", version=3, n_tensors=None, n_pairs=None) -> bytes:
    """pairs: (key, value) list. infos: packed tensor_info list."""
    counts = (len(infos) if n_tensors is None else n_tensors, len(pairs) if n_pairs is None else n_pairs)
    body = b"".join(string(key) + value(item) for key, item in pairs) + b"".join(infos)
    return pad(magic + struct.pack("<IQQ", version, *counts) + body)


def gguf(pairs, tensors: dict[str, np.ndarray], digests: bool = True, **header_options) -> bytes:
    """A whole file. pairs: metadata, a dict or (key, value) list. digests: append a right digest table."""
    pairs = list(pairs.items()) if isinstance(pairs, dict) else list(pairs)
    tensors = dict(tensors)
    if digests:
        tensors[DIGESTS] = np.zeros((len(tensors) + 1, 32), np.int8)
    infos, offset = [], 0
    for name, array in tensors.items():
        infos.append(tensor_info(name, array.shape, TYPE_IDS[array.dtype], offset))
        offset += len(pad(array.tobytes()))
    head = header(pairs, infos, **header_options)
    if digests:
        others = [array.tobytes() for name, array in tensors.items() if name != DIGESTS]
        rows = [hashlib.sha256(data).digest() for data in (head, *others)]
        tensors[DIGESTS] = np.frombuffer(b"".join(rows), np.int8).reshape(-1, 32)
    return head + b"".join(pad(array.tobytes()) for array in tensors.values())
