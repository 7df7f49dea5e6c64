"""Pack: the device layout of every tensor, made one at a time when the bundle is written.

Layouts are this module's and the kernels' business alone; the checkpoint stays natural BSR. The
same layout serves CUDA and CPU kernels, so a file with many targets holds the weights once.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gqsa_runtime.format import (
    GROUP_COLUMN_BITS,
    GROUP_SCALE_BITS,
    MAX_NAME_BYTES,
    ZERO_OF_8_BIT,
)

from gqsac.bsr import BsrStream
from gqsac.checkpoint import Checkpoint
from gqsac.compiler import ir
from gqsac.compiler.passes.group_patterns import Patterns, StreamPattern, cut_tasks, module_of
from gqsac.errors import ModelError

DTYPES = {"f32": np.float32, "f16": np.float16, "i32": np.int32, "i8": np.int8}


@dataclass(frozen=True)
class PackedTensor:
    """One tensor of the file: its shape is known now, its bytes when `make` is called."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(DTYPES[self.dtype]).itemsize


@dataclass(frozen=True)
class StreamNames:
    """Tensor names of one packed stream."""

    values: str
    groups: str
    crow_indices: str
    tasks: str


@dataclass(frozen=True)
class LinearNames:
    """Tensor names of one linear: its streams, or its dense weight; its bias or None."""

    streams: tuple[StreamNames, ...]
    weight: str | None
    bias: str | None


@dataclass(frozen=True)
class Packing:
    """tensors in file order; names of what the operators read: linears by output value, vectors and
    tables by (parameter name, offset added to it), rope tables by key."""

    tensors: tuple[PackedTensor, ...]
    linears: dict[str, LinearNames]
    vectors: dict[str, str]
    tables: dict[str, str]
    ropes: dict[str, str]


def pack(graph: ir.Graph, checkpoint: Checkpoint, patterns: Patterns) -> Packing:
    """Names, shapes and makers of all tensors, in the order in which the operators read them."""
    packer = _Packer(graph, checkpoint)
    for op in graph.ops:
        match op:
            case ir.Embedding():
                packer.table(op)
            case ir.Linear():
                packer.linear(op, patterns.streams[op.output])
            case ir.RMSNorm():
                packer.vector(op.weight, op.width, op.weight_offset)
            case ir.LayerNorm():
                packer.vector(op.weight, op.width)
                packer.layer_norm_bias(op)
    for key, rope in graph.ropes.items():
        packer.rope(key, rope)
    return Packing(tuple(packer.tensors.values()), packer.linears, packer.vectors, packer.tables, packer.ropes)


def pack_groups(stream: BsrStream, where: str) -> np.ndarray:
    """One int32 word per kept group [nnz]: fp16 scale, column, zero (see gqsa_runtime.format)."""
    if stream.bits == 8:
        if (stream.zeros != ZERO_OF_8_BIT).any():
            raise ModelError(f"{where}: an 8-bit group has a zero other than {ZERO_OF_8_BIT}; compress the model again")
        zeros = np.uint32(0)
    else:
        zeros = stream.zeros.astype(np.uint32)
    words = stream.scales.astype(np.float16).view(np.uint16).astype(np.uint32)
    words |= stream.col_indices.astype(np.uint32) << np.uint32(GROUP_SCALE_BITS)
    words |= zeros << np.uint32(GROUP_SCALE_BITS + GROUP_COLUMN_BITS)
    return words.view(np.int32)


def stack_streams(streams: list[BsrStream]) -> BsrStream:
    """The rows of several streams of equal columns, bits and group size, one below another."""
    first = streams[0]
    starts = np.cumsum([0] + [stream.nnz for stream in streams])
    if starts[-1] >= 2**31:
        raise ModelError("a linear has more than 2**31 kept groups")
    crow = [
        stream.crow_indices[1:].astype(np.int32) + np.int32(start)
        for stream, start in zip(streams, starts[:-1], strict=True)
    ]
    return BsrStream(
        rows=sum(stream.rows for stream in streams),
        columns=first.columns,
        group_size=first.group_size,
        bits=first.bits,
        crow_indices=np.concatenate([np.zeros(1, np.int32), *crow]),
        col_indices=np.concatenate([stream.col_indices for stream in streams]),
        values=np.concatenate([stream.values for stream in streams]),
        scales=np.concatenate([stream.scales for stream in streams]),
        zeros=np.concatenate([stream.zeros for stream in streams]),
    )


class _Packer:
    def __init__(self, graph: ir.Graph, checkpoint: Checkpoint):
        self.graph, self.checkpoint = graph, checkpoint
        self.tensors: dict[str, PackedTensor] = {}
        self.linears: dict[str, LinearNames] = {}
        self.vectors: dict[str, str] = {}
        self.tables: dict[str, str] = {}
        self.ropes: dict[str, str] = {}

    def add(self, name: str, dtype: str, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> str:
        name = _fit_name(name)
        self.tensors.setdefault(name, PackedTensor(name, dtype, shape, make))
        return name

    def stored(self, parameter: str) -> str:
        return self.graph.aliases.get(parameter, parameter)

    def check(self, parameter: str, shape: tuple[int, ...]) -> None:
        """From the header alone: what is missing or misshapen is refused before anything is compiled."""
        found = self.checkpoint.shape(self.stored(parameter))
        if found != shape:
            raise ModelError(f"{parameter}: the checkpoint holds shape {found}, the model's config needs {shape}")

    def check_streams(self, weight: str, rows: int, k: int) -> None:
        for header in self.checkpoint.stream_headers(module_of(self.stored(weight))):
            if (header.rows, header.columns) != (rows, k):
                found = f"{header.rows}x{header.columns}"
                raise ModelError(f"{weight}: the checkpoint holds {found}, the model's config needs {rows}x{k}")

    def read(self, parameter: str, shape: tuple[int, ...]) -> np.ndarray:
        self.check(parameter, shape)
        array = self.checkpoint.read(self.stored(parameter))
        if not np.isfinite(array).all():
            raise ModelError(f"{parameter}: the checkpoint holds NaN or infinite weights; convert the model again")
        return array

    def read_f16(self, parameter: str, shape: tuple[int, ...]) -> np.ndarray:
        array = self.read(parameter, shape)
        if array.dtype == np.float16:
            return array
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if not np.isfinite(half).all():
            raise ModelError(f"{parameter}: the largest weight is {np.abs(array).max():g} and fp16 ends at 65504")
        return half

    def table(self, op: ir.Embedding) -> None:
        shape = (op.rows, op.width)
        self.check(op.table, shape)
        self.tables[op.table] = self.add(
            _short(self.stored(op.table)), "f16", shape, lambda: self.read_f16(op.table, shape)
        )

    def vector(self, parameter: str, width: int, offset: float = 0.0) -> None:
        self.check(parameter, (width,))
        self.vectors[parameter] = self.add(
            _short(self.stored(parameter)),
            "f32",
            (width,),
            lambda: self.read(parameter, (width,)).astype(np.float32) + np.float32(offset),
        )

    def layer_norm_bias(self, op: ir.LayerNorm) -> None:
        if op.bias is not None:
            self.vector(op.bias, op.width)
        else:  # the kernel always adds one
            zeros = np.zeros(op.width, np.float32)
            self.vectors[f"{op.output}.no_bias"] = self.add(f"zeros.{op.width}", "f32", zeros.shape, lambda: zeros)

    def rope(self, key: str, rope: ir.RopeTable) -> None:
        inv_freq = np.asarray(rope.inv_freq, np.float32)
        self.ropes[key] = self.add(f"rope.{key}.inv_freq", "f32", inv_freq.shape, lambda: inv_freq)

    def linear(self, op: ir.Linear, patterns: tuple[StreamPattern, ...]) -> None:
        stem = _stacked_name([self.stored(weight) for weight in op.weights])
        for weight, own_bias, rows in zip(op.weights, op.biases, op.rows, strict=True):
            if patterns:
                self.check_streams(weight, rows, op.k)
            else:
                self.check(weight, (rows, op.k))
            if own_bias:
                self.check(own_bias, (rows,))
        bias = None
        if any(op.biases):
            bias = self.add(f"{stem}.bias", "f32", (op.width,), lambda: self._stack_biases(op))
        if patterns:
            streams = tuple(self._stream(op, stem, index, pattern) for index, pattern in enumerate(patterns))
            self.linears[op.output] = LinearNames(streams, None, bias)
        else:
            # A tied head shares the embedding's tensor by its stored name.
            name = _short(self.stored(op.weights[0])) if len(op.weights) == 1 else f"{stem}.weight"
            weight = self.add(name, "f16", (op.width, op.k), lambda: self._stack_weights(op))
            self.linears[op.output] = LinearNames((), weight, bias)

    def _stack_biases(self, op: ir.Linear) -> np.ndarray:
        parts = [
            self.read(bias, (rows,)).astype(np.float32) if bias else np.zeros(rows, np.float32)
            for bias, rows in zip(op.biases, op.rows, strict=True)
        ]
        return np.concatenate(parts)

    def _stack_weights(self, op: ir.Linear) -> np.ndarray:
        parts = [self.read_f16(weight, (rows, op.k)) for weight, rows in zip(op.weights, op.rows, strict=True)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _stream(self, op: ir.Linear, stem: str, index: int, pattern: StreamPattern) -> StreamNames:
        # The four tensors of a stream come one after another: read and stack it once for all four.
        memory: dict[str, BsrStream] = {}

        def stream(last: bool = False) -> BsrStream:
            if "stream" not in memory:
                parts = [self.checkpoint.streams(module_of(self.stored(weight)))[index] for weight in op.weights]
                memory["stream"] = stack_streams(parts)
            return memory.pop("stream") if last else memory["stream"]

        def add(part: str, dtype: str, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> str:
            return self.add(f"{stem}.{index}.{part}", dtype, shape, make)

        row_bytes = pattern.group_size * pattern.bits // 8
        nnz = max(pattern.nnz, 1)  # readers refuse empty tensors: a stream without groups stores one unused
        return StreamNames(
            values=add("values", "i8", (nnz, row_bytes), lambda: _at_least_one(stream().values.view(np.int8))),
            groups=add("groups", "i32", (nnz,), lambda: _at_least_one(pack_groups(stream(), op.name))),
            crow_indices=add("crow_indices", "i32", (op.width + 1,), lambda: stream().crow_indices),
            tasks=add(
                "tasks", "i32", (pattern.n_tasks + 1,), lambda: cut_tasks(stream(True).crow_indices, pattern.n_tasks)
            ),
        )


def _at_least_one(array: np.ndarray) -> np.ndarray:
    return array if len(array) else np.zeros((1, *array.shape[1:]), array.dtype)


def _short(parameter: str) -> str:
    return parameter.removeprefix("model.")


def _stacked_name(weights: list[str]) -> str:
    modules = [module_of(_short(weight)) for weight in weights]
    parent = modules[0].rpartition(".")[0]
    leaves = "+".join(module.rpartition(".")[2] for module in modules)
    return f"{parent}.{leaves}" if parent else leaves


def _fit_name(name: str) -> str:
    """Names of at most MAX_NAME_BYTES: a longer one keeps its end and gets a digest in front."""
    if len(name.encode()) <= MAX_NAME_BYTES:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:10]
    return f"{digest}.{name[-(MAX_NAME_BYTES - 11) :]}"
