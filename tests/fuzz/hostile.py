"""Whole files whose plan, indices, widths or masks were changed, with digests made anew: as near to sound as can be.

Unlike the mutants of kinds.py they are made of files that run, code and all, and many are accepted: what is asked of
them is that nothing they hold leads a kernel out of its memory. The code stays as it is, since no reader can judge it;
launches (blocks, threads, shared memory), which are part of what a kernel is compiled for, are a kind of their own.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from gqsa_runtime import format as gqsa
from gqsa_runtime.layouts.records import ALIGNMENT, TILES
from gqsa_runtime.reader import ArtifactFile

from tests.format import gguf_bytes
from tests.fuzz import mutate

_HEADER, _MASK = 16, 32  # bytes of a record
_WIDTH, _N_TILES, _MASKED = 8, 9, 10  # their places in its header


@dataclass
class Parts:
    """All that a file holds. program: parsed; family: whose plan and tensors are to be changed."""

    metadata: dict
    program: dict
    tensors: dict[str, np.ndarray]
    family: str

    @classmethod
    def read(cls, path: str | Path, family: str) -> Parts:
        """The parts of a sound file. Raises GqsaError."""
        with ArtifactFile.open(path) as file:
            tensors = {name: file.read(name) for name in file.tensors}
            return cls(dict(file.metadata), json.loads(file.text(gqsa.KEY_PROGRAM)), tensors, family)

    def file(self) -> bytes:
        """The file of these parts."""
        pairs = {**self.metadata, gqsa.KEY_PROGRAM: json.dumps(self.program)}
        return gguf_bytes.gguf(pairs, self.tensors)

    @property
    def plan(self) -> dict:
        return self.program["plans"][self.family]

    def steps(self) -> list[dict]:
        return [step for steps in self.plan["phases"].values() for step in steps]

    def used(self, ending: str = "", dtype: type | None = None) -> list[str]:
        """Names of the plan's tensors that end so and have the type."""
        names = {arg["name"] for step in self.steps() for arg in step["args"] if arg["kind"] == "tensor"}
        return sorted(name for name in names if name.endswith(ending) and dtype in (None, self.tensors[name].dtype))


def mutant(random: Random, parts: Parts) -> tuple[str, bytes]:
    """(kind, bytes) of a changed copy. kind: a key of CHANGES that applies to such a file."""
    made = Parts(parts.metadata, copy.deepcopy(parts.program), dict(parts.tensors), parts.family)
    missing = {"launches"} if parts.family == "cpu" else set()
    if not parts.used(".records"):
        missing |= {"widths", "masks"}
    kind = random.choice([kind for kind in CHANGES if kind not in missing])
    # Of a plan that was changed anywhere little can be known.
    for _ in range(1 if kind == "plan" else random.choice((1, 1, 1, 2, 3))):
        CHANGES[kind](random, made)
    return kind, made.file()


def _json(random: Random, parts: Parts) -> None:
    """Anything in the plan but its launches."""
    launches = [kernel.pop("launches") for kernel in parts.plan["kernels"]]
    plan = parts.program["plans"][parts.family] = mutate.json_value(random, parts.plan, 1)
    kernels = plan.get("kernels")
    for kernel, held in zip(kernels if isinstance(kernels, list) else (), launches, strict=False):
        if isinstance(kernel, dict):
            kernel["launches"] = held


def _constants(random: Random, parts: Parts) -> None:
    """A number of a kernel's constants, a buffer's size or place, the arena's size, a chunk."""
    kernel, buffer = random.choice(parts.plan["kernels"]), random.choice(parts.plan["buffers"])
    where = random.choice((parts.plan, kernel["params"], kernel["params"], buffer))
    keys = [key for key, value in where.items() if type(value) in (int, float)]
    if keys:
        _change_number(random, where, random.choice(keys))


def _launches(random: Random, parts: Parts) -> None:
    """A launch's blocks, threads or bytes of shared memory."""
    launches = [launch for kernel in parts.plan["kernels"] for launch in kernel["launches"].values()]
    launch = random.choice(launches)
    where, key = random.choice([(launch, "block"), (launch, "shared_bytes"), (launch["grid"], 0), (launch["grid"], 1)])
    _change_number(random, where, key)


def _change_number(random: Random, where: dict | list, key: str | int) -> None:
    old = where[key]
    where[key] = random.choice((old + 1, old - 1, old * 2, old // 2, old + 16, random.choice(mutate.INTEGERS)))


def _steps(random: Random, parts: Parts) -> None:
    """Steps of a phase dropped, doubled, exchanged, or given another's kernel or argument."""
    steps = random.choice([steps for steps in parts.plan["phases"].values() if steps])
    one, other = random.randrange(len(steps)), random.randrange(len(steps))
    kind = random.randrange(6)
    if kind == 0 and len(steps) > 1:
        del steps[one]
    elif kind == 1:
        steps.insert(other, copy.deepcopy(steps[one]))
    elif kind == 2:
        steps[one], steps[other] = steps[other], steps[one]
    elif kind == 3:
        steps[one]["kernel"] = random.choice(parts.plan["kernels"])["name"]
    else:
        arguments = steps[one]["args"]
        place = random.randrange(len(arguments))
        source = random.choice(parts.steps())["args"]
        arguments[place] = copy.deepcopy(random.choice((random.choice(source), source[place % len(source)])))


def _indices(random: Random, parts: Parts) -> None:
    """A value of an index tensor set, moved by one, or exchanged with another."""
    names = [name for name in parts.used(dtype=np.int32) if parts.tensors[name].size]
    if not names:
        return
    flat = _own(parts, random.choice(names)).reshape(-1)
    one, other = random.randrange(flat.size), random.randrange(flat.size)
    kind = random.randrange(4)
    if kind == 0:
        flat[one] = np.int64(random.choice(mutate.INTEGERS) & (1 << 32) - 1).astype(np.int32)
    elif kind == 1:
        flat[one] += np.int32(random.choice((1, -1, 16)))
    elif kind == 2:
        flat[one], flat[other] = flat[other], flat[one]
    else:
        flat[one] = flat[other]


def _widths(random: Random, parts: Parts) -> None:
    """Width, number of tiles, a tile's number or the mask's flag of a record."""
    record, _ = _record(random, parts)
    kind = random.randrange(4)
    if kind == 0:
        record[_WIDTH] = random.choice((0, 1, 2, 3, 4, 5, 8, 9, 16, 255))
    elif kind == 1:
        record[_N_TILES] = random.choice((0, 1, 2, 3, TILES, TILES + 1, 255))
    elif kind == 2:
        record[_MASKED] = random.choice((0, 1, 2, 255))
    else:
        record[: 2 * TILES].view(np.uint16)[random.randrange(TILES)] = random.choice((0, 1, 2, 3, 7, 255, 65535))


def _masks(random: Random, parts: Parts) -> None:
    """Bits of a record's mask turned over: one, or one each way, so that the number of kept groups stays."""
    record, n_bytes = _record(random, parts, masked=True)
    if n_bytes < _HEADER + _MASK:
        return
    mask = record[_HEADER : _HEADER + _MASK]
    bits = np.unpackbits(mask, bitorder="little")
    places = [random.randrange(bits.size)]
    if random.random() < 0.7:
        others = np.flatnonzero(bits != bits[places[0]])
        within = others[others < 64 * int(record[_N_TILES])]
        places += [int(random.choice(within))] if within.size else []
    bits[places] ^= 1
    mask[:] = np.packbits(bits, bitorder="little")


def _numbers(random: Random, parts: Parts) -> None:
    """Bytes of weights, scales, zeros and norms."""
    names = [name for name in parts.used() if parts.tensors[name].dtype != np.int32 and parts.tensors[name].size]
    raw = _own(parts, random.choice(names)).reshape(-1).view(np.uint8)
    place = random.randrange(raw.size)
    end = place + random.choice((1, 2, 16, 256))
    raw[place:end] = random.choice((0, 0x7C, 0x7F, 0xFF, random.randrange(256)))


def _record(random: Random, parts: Parts, masked: bool = False) -> tuple[np.ndarray, int]:
    """(uint8 bytes of a record, to be changed in place; their number). masked: one with a mask, if there is one."""

    def starts_of(name: str) -> np.ndarray:
        return ALIGNMENT * parts.tensors[name.removesuffix("records") + "starts"].reshape(-1).astype(np.int64)

    # Bare records have no headers to be changed.
    name = random.choice([name for name in parts.used(".records") if starts_of(name).size])
    data, starts = _own(parts, name).reshape(-1).view(np.uint8), starts_of(name)
    chosen = np.arange(len(starts) - 1)
    if masked and data[starts[:-1] + _MASKED].any():
        chosen = np.flatnonzero(data[starts[:-1] + _MASKED])
    index = int(random.choice(chosen))
    return data[starts[index] : starts[index + 1]], int(starts[index + 1] - starts[index])


def _own(parts: Parts, name: str) -> np.ndarray:
    parts.tensors[name] = parts.tensors[name].copy()
    return parts.tensors[name]


CHANGES: dict[str, Callable[[Random, Parts], None]] = {
    "plan": _json,
    "constants": _constants,
    "launches": _launches,
    "steps": _steps,
    "indices": _indices,
    "widths": _widths,
    "masks": _masks,
    "numbers": _numbers,
}
