"""The kinds of mutants: how one is made from a seed, what is done with it, and what it may take."""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import SimpleNamespace
from unittest import mock

import numpy as np
from gqsa_runtime import device_cuda, inspect_
from gqsa_runtime.chat import ChatTemplate
from gqsa_runtime.check import check_file
from gqsa_runtime.reader import ArtifactFile
from gqsa_runtime.verify import verify_open

from tests.format import gguf_bytes, records_program, tiny
from tests.fuzz import mutate, renderer, templates, tokenizers

MB = 1 << 20
_SPAWNED = 25  # of so many templates one is rendered by a Python of its own, the others by forks
MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi, xoxo"}]


@dataclass(frozen=True)
class Kind:
    """make: bytes of a mutant. use: does with them what a runtime does. seconds: more is a hang.

    memory_bytes: by which a process may grow beside the mutant itself. time_share, count_share: of a run's time, or of
    its mutants, among all kinds.
    """

    make: Callable[[Random], bytes]
    use: Callable[[bytes], object]
    time_share: int
    count_share: int
    seconds: float = 2.0
    memory_bytes: int = 64 * MB


@functools.cache
def _bases() -> list[tuple[str, dict[str, np.ndarray]]]:
    """(program, tensors) of small sound files: groups with a word each on two families of targets, and records."""
    kernels = {kernel.name: (0, 10) for kernel in tiny.cuda_plan().kernels}
    cubin = tiny.binary("sm_90", "cubin", kernels, "binary.cuda", bytes(100))
    both = tiny.program(
        plans={"cpu": tiny.plan(), "cuda": tiny.cuda_plan()}, binaries=(*tiny.program().binaries, cubin)
    )
    return [
        (tiny.program().to_json(), tiny.tensors()),
        (both.to_json(), tiny.tensors() | {"binary.cuda": tiny.packed(bytes(100))}),
        (records_program.program().to_json(), records_program.tensors()),
    ]


def _file(program: str, arrays: dict[str, np.ndarray], **metadata) -> bytes:
    """A file whose digests are right whatever it holds. A chat template costs a process: it is a kind of its own."""
    pairs = {**_metadata_pairs(), "gqsa.program": program, "tokenizer.chat_template": None, **metadata}
    return gguf_bytes.gguf({key: value for key, value in pairs.items() if value is not None}, arrays)


@functools.cache
def _metadata_pairs() -> dict:
    return tiny.metadata()


def _changes(random: Random) -> int:
    return random.choice((1, 1, 1, 2, 3, 8))


def _plan(random: Random) -> bytes:
    program, arrays = random.choice(_bases())
    return _file(mutate.json_text(random, json.loads(program), _changes(random)), arrays)


def _arrays(random: Random) -> bytes:
    program, arrays = random.choice(_bases())
    arrays = {name: array.copy() for name, array in arrays.items()}
    for _ in range(_changes(random)):
        name = random.choice(list(arrays))
        array = arrays.pop(name)
        kind = random.randrange(10)
        if kind < 6 and array.size:
            flat = array.reshape(-1)
            place = random.randrange(flat.size)
            if array.dtype.kind == "i":
                flat[place] = np.array(random.choice(mutate.INTEGERS) & (1 << 63) - 1).astype(array.dtype)
            else:
                flat[place] = random.choice((np.nan, np.inf, -np.inf, 0, 1e4))
        elif kind == 6:
            array = array.reshape(-1)[: random.randrange(array.size + 1)]
        elif kind == 7:
            array = array.reshape(-1, *random.choice(([], [1], [1, 1])))
        elif kind == 8:
            array = np.frombuffer(
                array.tobytes()[: array.nbytes // 4 * 4], random.choice((np.int8, np.int32, np.float16))
            ).copy()
        else:
            name = random.choice(("x", name + "x", random.choice(list(arrays) or ["x"])))
        arrays[name] = array
    return _file(program, arrays)


def _metadata(random: Random) -> bytes:
    program, arrays = _bases()[0]
    values = (
        *mutate.STRINGS,
        0,
        1,
        2,
        3,
        64,
        (1 << 32) - 1,
        True,
        None,
        b"",
        b"\x08\0\0\0\xff",
        b"\x09\0\0\0" + bytes(16),
    )
    changes = {}
    for _ in range(_changes(random)):
        key = random.choice((*_metadata_pairs(), *mutate.STRINGS))
        value = random.choice(values)
        changes[key] = value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
    changes.setdefault("tokenizer.chat_template", None)
    return _file(program, arrays, **{key.encode("utf-8", "replace").decode(): value for key, value in changes.items()})


def _sound(random: Random) -> bytes:
    return _sound_files()[random.randrange(len(_bases()))]


@functools.cache
def _sound_files() -> list[bytes]:
    return [_file(*base) for base in _bases()]


def _bytes(random: Random) -> bytes:
    return mutate.data(random, _sound(random), _changes(random))


def _prefix(random: Random) -> bytes:
    sound = _sound(random)
    return sound[: random.randrange(len(sound))]


def _tokenizer(random: Random) -> bytes:
    family = random.choice(list(tokenizers.FAMILIES))
    raw = tokenizers.FAMILIES[family]()
    kind = random.random()
    if kind < 0.1:
        return mutate.data(random, json.dumps(raw).encode(), _changes(random))
    if kind < 0.3:  # a component of another family
        other = tokenizers.FAMILIES[random.choice(list(tokenizers.FAMILIES))]()
        name = random.choice(("normalizer", "pre_tokenizer", "post_processor", "decoder", "model", "added_tokens"))
        raw[name] = other[name]
        return mutate.json_text(random, raw, random.choice((0, 1, 2))).encode()
    if kind < 0.7:  # what stands around the vocabulary
        parts = {name: value for name, value in raw.items() if name != "model"}
        model = {name: value for name, value in raw["model"].items() if name not in ("vocab", "merges")}
        made = mutate.json_value(random, {"parts": parts, "model": model}, _changes(random))
        parts, model = made.get("parts"), made.get("model")
        if isinstance(parts, dict) and isinstance(model, dict):
            words = {name: value for name, value in raw["model"].items() if name in ("vocab", "merges")}
            return json.dumps({**parts, "model": {**model, **words}}).encode()
    return mutate.json_text(random, raw, _changes(random)).encode()


def _template(random: Random) -> bytes:
    return templates.mutant(random).encode("utf-8", "replace")


def _use_file(data: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".gqsa", dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as file:
        file.write(data)
        file.flush()
        return use_path(file.name)


def use_path(path: str | Path) -> str:
    """Does with a file what a reader does that runs nothing of it."""
    with renderer.forked(), _a_gpu(), ArtifactFile.open(path) as artifact:
        found = verify_open(artifact)
        shown = [inspect_.render(inspect_.describe(artifact, None))]
        shown += [inspect_.table(rows) for rows in (inspect_.kernel_rows(artifact), inspect_.tensor_rows(artifact))]
        assert all(line.isprintable() for text in shown for line in text.split("\n")), shown
        check_file(path)
    return f"{found}"


@contextlib.contextmanager
def _a_gpu() -> Iterator[None]:
    """`check` finds one GPU, the same on every machine: to ask a real one takes longer than all the rest."""
    gpu = SimpleNamespace(name="a GPU", arch="sm_90", major=9, minor=0, driver_version=13000)

    @contextlib.contextmanager
    def free_bytes(ordinal: int) -> Iterator[int]:
        yield 1 << 30

    with mock.patch.multiple(device_cuda, Gpu=lambda ordinal=0: gpu, free_bytes=free_bytes):
        yield


def _use_tokenizer(data: bytes) -> str:
    return tokenizers.use(data.decode("utf-8", "replace"))


def _use_template(data: bytes) -> str:
    with contextlib.nullcontext() if zlib.crc32(data) % _SPAWNED == 0 else renderer.forked():
        return f"{len(ChatTemplate(data.decode(), '<s>', '</s>').render(MESSAGES))} characters"


KINDS = {
    "plan": Kind(_plan, _use_file, time_share=5, count_share=24),
    "arrays": Kind(_arrays, _use_file, time_share=3, count_share=20),
    "metadata": Kind(_metadata, _use_file, time_share=1, count_share=9),
    "bytes": Kind(_bytes, _use_file, time_share=3, count_share=16),
    "prefix": Kind(_prefix, _use_file, time_share=1, count_share=4),
    "tokenizer": Kind(_tokenizer, _use_tokenizer, time_share=6, count_share=24),
    # The process that renders is another, with limits of its own: a second of processor time, 300 MB, 3 s in all.
    "template": Kind(_template, _use_template, time_share=4, count_share=3, seconds=4.0),
}
