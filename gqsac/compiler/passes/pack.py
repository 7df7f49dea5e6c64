"""Pack: the device layout of every tensor, made one at a time when the bundle is written.

How weights are coded is their layout's business (gqsa_runtime.layouts); the checkpoint stays natural BSR.
The same layout serves CUDA and CPU kernels, so a file with many targets holds the weights once.
"""

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gqsa_runtime.format import MAX_NAME_BYTES
from gqsa_runtime.layouts import RECORDS
from gqsa_runtime.program import NUMPY_DTYPES

from gqsac.bsr import BsrStream
from gqsac.compiler import ir
from gqsac.compiler.passes.choose_layouts import Weights, module_of, plan_of
from gqsac.compiler.passes.measure_linears import StoredPart, StoredParts
from gqsac.errors import ModelError


@dataclass(frozen=True)
class PackedTensor:
    """One tensor of the file: its shape is known now, its bytes when `make` is called.

    source: what it is made from. Neighbours of one source share work, and are made one after another.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]
    source: str | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(NUMPY_DTYPES[self.dtype]).itemsize


@dataclass(frozen=True)
class LinearNames:
    """Tensor names of one linear: for each addend those of its layout's parts, in order; its bias or None."""

    parts: tuple[tuple[str, ...], ...]
    bias: str | None


@dataclass(frozen=True)
class Packing:
    """tensors in file order; names of what the operators read: linears by output value, vectors and
    tables by parameter name (all parts of its layout), rope tables by key."""

    tensors: tuple[PackedTensor, ...]
    linears: dict[str, LinearNames]
    vectors: dict[str, str]
    tables: dict[str, tuple[str, ...]]
    ropes: dict[tuple[str, str], str]


def pack(graph: ir.Graph, weights: Weights, stored_parts: StoredParts) -> Packing:
    """Names, shapes and makers of all tensors, in the order in which the operators read them."""
    packer = _Packer(weights)
    for op in graph.ops:
        match op:
            case ir.Embedding():
                packer.table(op, stored_parts.tables.get(op.table))
            case ir.Linear():
                if op.norm is not None:
                    packer.norm(op.norm)
                packer.linear(op, stored_parts.linears[op.output])
            case ir.RMSNorm() | ir.LayerNorm():
                packer.norm(op)
    for key, rope in graph.ropes.items():
        packer.rope(key, rope)
    return Packing(tuple(packer.tensors.values()), packer.linears, packer.vectors, packer.tables, packer.ropes)


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
    def __init__(self, weights: Weights):
        self.weights, self.checkpoint = weights, weights.checkpoint
        self.tensors: dict[str, PackedTensor] = {}
        self.linears: dict[str, LinearNames] = {}
        self.vectors: dict[str, str] = {}
        self.tables: dict[str, tuple[str, ...]] = {}
        self.ropes: dict[tuple[str, str], str] = {}

    def add(
        self, name: str, dtype: str, shape: tuple[int, ...], make: Callable[[], np.ndarray], source: str | None = None
    ) -> str:
        name = _fit_name(name)
        self.tensors.setdefault(name, PackedTensor(name, dtype, shape, make, source))
        return name

    def stored(self, parameter: str) -> str:
        return self.weights.stored(parameter)

    def check(self, parameter: str, shape: tuple[int, ...]) -> None:
        """From the header alone: what is missing or misshapen is refused before anything is compiled."""
        found = self.checkpoint.shape(self.stored(parameter))
        if found != shape:
            raise ModelError(f"{parameter}: the checkpoint holds shape {found}, the model's config needs {shape}")

    def check_compressed(self, weight: str, rows: int, k: int) -> None:
        module = module_of(self.stored(weight))
        one = self.checkpoint.is_one_matrix(module)
        for header in (self.checkpoint.matrix_header(module),) if one else self.checkpoint.stream_headers(module):
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

    def table(self, op: ir.Embedding, part: StoredPart | None) -> None:
        shape = (op.rows, op.width)
        self.check(op.table, shape)
        if part is not None:
            self.tables[op.table] = self._records(op.name, (op.table,), part, op.rows, op.width, False)
            return
        name = self.add(_short(self.stored(op.table)), "f16", shape, lambda: self.read_f16(op.table, shape))
        self.tables[op.table] = (name,)

    def norm(self, op: ir.RMSNorm | ir.LayerNorm) -> None:
        if isinstance(op, ir.RMSNorm):
            self.vector(op.weight, op.width, op.weight_offset)
        else:
            self.vector(op.weight, op.width)
            self.layer_norm_bias(op)

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
        for values, kind in ((rope.inv_freq, "inv_freq"), (rope.long_inv_freq, "long_inv_freq")):
            if values is not None:
                array = np.asarray(values, np.float32)
                self.ropes[key, kind] = self.add(f"rope.{key}.{kind}", "f32", array.shape, lambda array=array: array)

    def linear(self, op: ir.Linear, parts: tuple[StoredPart, ...]) -> None:
        stem = _stacked_name([self.stored(weight) for weight in op.weights])
        for weight, own_bias, rows in zip(op.weights, op.biases, op.rows, strict=True):
            if self.weights.is_compressed(weight):
                self.check_compressed(weight, rows, op.k)
            else:
                self.check(weight, (rows, op.k))
            if own_bias:
                self.check(own_bias, (rows,))
        bias = None
        if any(op.biases):
            bias = self.add(f"{stem}.bias", "f32", (op.n_rows,), lambda: self._stack_biases(op))
        if parts[0].layout is RECORDS:
            names = (self._records(op.name, op.weights, parts[0], op.n_rows, op.k, op.gated),)
        else:
            names = tuple(self._part(op, stem, index, part) for index, part in enumerate(parts))
        self.linears[op.output] = LinearNames(names, bias)

    def _stack_biases(self, op: ir.Linear) -> np.ndarray:
        parts = [
            self.read(bias, (rows,)).astype(np.float32) if bias else np.zeros(rows, np.float32)
            for bias, rows in zip(op.biases, op.rows, strict=True)
        ]
        return np.concatenate(parts)

    def _stack_weights(self, op: ir.Linear) -> np.ndarray:
        parts = [self.read_f16(weight, (rows, op.k)) for weight, rows in zip(op.weights, op.rows, strict=True)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _part(self, op: ir.Linear, stem: str, index: int, part: StoredPart) -> tuple[str, ...]:
        """Adds the tensors of one addend of a linear; returns their names."""

        def name(tensor: str) -> str:
            if part.layout.compressed:
                return f"{stem}.{index}.{tensor}"
            # A tied head shares the embedding's tensor by its stored name.
            return _short(self.stored(op.weights[0])) if len(op.weights) == 1 else f"{stem}.{tensor}"

        def read() -> object:
            return self._stack(op, index) if part.layout.compressed else self._stack_weights(op)

        return self._parts(op.name, stem, part, {"rows": op.width, "k": op.k}, name, read)

    def _records(
        self, where: str, weights: tuple[str, ...], part: StoredPart, rows: int, k: int, paired: bool
    ) -> tuple[str, ...]:
        """Adds the tensors of weights in records, once for all who read them; returns their names."""
        stem = _stacked_name([self.stored(weight) for weight in weights])

        def read() -> object:
            with _naming(where):
                matrix = self.weights.matrix(weights)
                return matrix, plan_of(matrix, paired)

        return self._parts(where, stem, part, {"rows": rows, "k": k}, lambda tensor: f"{stem}.{tensor}", read)

    def _parts(
        self,
        where: str,
        stem: str,
        part: StoredPart,
        sizes: dict[str, int],
        name: Callable[[str], str],
        read: Callable[[], object],
    ) -> tuple[str, ...]:
        """Adds the tensors of a layout's parts; returns their names. where: begins messages. name: of a part's tensor.
        read: makes what the layout packs."""
        params = {**sizes, **part.constants}
        shapes = part.layout.shapes(params, part.n_groups)
        # They are written one after another: the weights are read and stacked once for all of them.
        memory: dict[str, object] = {}
        last = part.layout.parts[-1].name

        def make(tensor: str) -> np.ndarray:
            if "source" not in memory:
                memory["source"] = read()
            source = memory.pop("source") if tensor == last else memory["source"]
            with _naming(where):
                return part.layout.pack(tensor, source, params)

        return tuple(
            self.add(name(tensor.name), tensor.dtype, shapes[tensor.name], lambda t=tensor.name: make(t), stem)
            for tensor in part.layout.parts
        )

    def _stack(self, op: ir.Linear, index: int) -> BsrStream:
        return stack_streams([self.checkpoint.streams(module_of(self.stored(weight)))[index] for weight in op.weights])


@contextlib.contextmanager
def _naming(where: str):
    """ModelErrors within say where."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error


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
