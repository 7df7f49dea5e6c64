"""Model folders in the format `pack-quantized` of compressed-tensors, which llm-compressor makes and vLLM serves.

A compressed linear MODULE of R rows and K columns, b (4 or 8) bits and scale groups of Q columns (or whole rows) is

    MODULE.weight_packed      int32 [R, K * b / 32]: levels, the first in the lowest bits
    MODULE.weight_scale       float16 or bfloat16 [R, K / Q]
    MODULE.weight_shape       int64 [2]: R, K
    MODULE.weight_zero_point  int32 [ceil(R * b / 32), K / Q]: zeros, packed like levels but down the rows; absent where
                              all are the middle level

A weight is `scale * (level - zero)`. https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gqsa_runtime.errors import FormatError, InputError, ModelError, UnsupportedError

from gqsac.bsr import GROUP_SIZES, pack_values, unpack_values
from gqsac.checkpoint import Checkpoint
from gqsac.codec import MatrixHeader
from gqsac.quantized_matrix import ZERO_STEPS, QuantizedMatrix
from gqsac.rewrite import partial_folder, rewrite

QUANT_METHOD = "compressed-tensors"
_FORMAT = "pack-quantized"
_BITS = (4, 8)
_DROPPED = ("report.json",)  # by an export
_PARTS = re.compile(r"(.+)\.(weight_packed|weight_scale|weight_shape|weight_zero_point|weight_g_idx)")


@dataclass(frozen=True)
class Scheme:
    """How linears are quantised. group_size: columns that share a scale, None for all of a row.
    targets: "Linear", paths of modules, or "re:" and a pattern of them."""

    bits: int
    group_size: int | None
    symmetric: bool
    targets: tuple[str, ...]

    def names(self, module: str) -> bool:
        """Whether the scheme is for the linear at that path by its name."""
        return any(
            re.match(target[3:], module) if target.startswith("re:") else target == module for target in self.targets
        )


class PackedCheckpoint(Checkpoint):
    """An open folder of that format; its linears come as matrices, and as streams where those can hold them."""

    def __init__(self, path: Path, config: dict, files: list[Path]):
        super().__init__(path, config, None, files)
        schemes = read_schemes(config["quantization_config"], str(path / "config.json"))
        for name in self._tensors:
            found = _PARTS.fullmatch(name)
            if found:
                self._parts.setdefault(found[1], []).append(found[2])
        for module, parts in self._parts.items():
            # A name goes before the class of all linears.
            fitting = [scheme for scheme in schemes if scheme.names(module)]
            fitting += [scheme for scheme in schemes if "Linear" in scheme.targets]
            if not fitting:
                raise FormatError(f"{path}: config.json gives no scheme for the compressed linear {module}")
            stored = {part: self._tensors[f"{module}.{part}"] for part in parts}
            stored = {part: (tensor.dtype, tensor.shape) for part, tensor in stored.items()}
            self._headers[module] = header(stored, fitting[0], self._where(module))

    @property
    def compressed(self) -> bool:
        return True

    def pattern(self, module: str) -> tuple[np.ndarray, np.ndarray | None]:
        matrix = self.matrix(module)
        return matrix.row_bits, matrix.keep

    def matrix(self, module: str) -> QuantizedMatrix:
        known = self._header(module)
        tensors = {part: self.read(f"{module}.{part}") for part in self._parts[module]}
        return unpack(tensors, known, self._where(module))


def read_schemes(raw: dict, where: str) -> tuple[Scheme, ...]:
    """The schemes of a `quantization_config`, in the order in which they are tried.

    Raises FormatError that names `where` and the bad entry, UnsupportedError for what is no `pack-quantized` of 4 or 8
    bits.
    """
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise FormatError(f"{where}: config_groups of quantization_config is no object of objects")
    schemes = []
    for name, group in groups.items():
        form = group.get("format") or raw.get("format")
        if form != _FORMAT or group.get("input_activations"):
            found = "its activations are quantised" if form == _FORMAT else f"it is stored as {form!r}"
            raise UnsupportedError(
                f"{where}: of {name}, {found}; {_FORMAT!r} with quantised weights alone is read, so run "
                "`gqsac compress` on the uncompressed model"
            )
        weights, targets = group.get("weights"), group.get("targets")
        if not isinstance(weights, dict) or not isinstance(targets, list) or not all(type(t) is str for t in targets):
            raise FormatError(f"{where}: {name} has no weights or no list of targets")
        _check_patterns(targets, f"{where}: {name}")
        bits, strategy, size = weights.get("num_bits"), weights.get("strategy"), weights.get("group_size")
        if bits not in _BITS or weights.get("type", "int") != "int" or weights.get("actorder") in ("group", True):
            raise UnsupportedError(
                f"{where}: {name} has weights of {bits!r} bits, type {weights.get('type')!r}, actorder "
                f"{weights.get('actorder')!r}; whole numbers of 4 or 8 bits whose columns keep their order are read"
            )
        strategy = strategy or ("group" if size else "channel")
        if strategy not in ("group", "channel") or (strategy == "group" and (type(size) is not int or size < 8)):
            raise UnsupportedError(
                f"{where}: {name} has scales by {strategy!r} of {size!r} columns; groups of at least 8, and "
                "channels, are read"
            )
        schemes.append(
            Scheme(bits, size if strategy == "group" else None, bool(weights.get("symmetric", True)), tuple(targets))
        )
    return tuple(schemes)


def _check_patterns(targets: list[str], where: str) -> None:
    for target in targets:
        try:
            re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
        except re.error as error:
            raise FormatError(f"{where} has the target {target!r}, which is no pattern ({error})") from error


def header(stored: dict[str, tuple[str, tuple[int, ...]]], scheme: Scheme, where: str) -> MatrixHeader:
    """Checks types, shapes and counts. stored, where: as in gqsac.codec.header. Raises FormatError that names the
    tensor, UnsupportedError for columns out of order."""
    dtypes = {"weight_packed": ("I32",), "weight_scale": ("F16", "BF16", "F32"), "weight_shape": ("I64", "I32")}
    if not scheme.symmetric:
        dtypes["weight_zero_point"] = ("I32",)
    for name in stored:
        if name not in dtypes:
            raise UnsupportedError(f"{where}.{name} is there, which its scheme has no use for; it is not read")
    for name, allowed in dtypes.items():
        if name not in stored:
            raise FormatError(f"{where}.{name} is missing; is the checkpoint complete?")
        dtype, shape = stored[name]
        if dtype not in allowed:
            raise FormatError(f"{where}.{name} is of type {dtype}, expected {' or '.join(allowed)}")
        if len(shape) != (1 if name == "weight_shape" else 2):
            raise FormatError(f"{where}.{name} has shape {list(shape)}, expected another number of dimensions")
    rows, columns = stored["weight_packed"][1][0], stored["weight_packed"][1][1] * 32 // scheme.bits
    quant_group_size = scheme.group_size or columns
    expected = {
        "weight_scale": (rows, columns // quant_group_size),
        "weight_shape": (2,),
        "weight_zero_point": (-(-rows * scheme.bits // 32), columns // quant_group_size),
    }
    if not rows or not columns or columns % quant_group_size:
        raise FormatError(f"{where}.weight_packed has {rows} x {columns} levels, expected groups of {quant_group_size}")
    for name, shape in expected.items():
        if name in stored and stored[name][1] != shape:
            raise FormatError(f"{where}.{name} has shape {list(stored[name][1])}, expected {list(shape)}")
    fitting = [size for size in GROUP_SIZES if quant_group_size % size == 0]
    if not fitting:
        raise UnsupportedError(f"{where}.weight_scale is for {quant_group_size} columns, expected a multiple of 8")
    return MatrixHeader(rows, columns, max(fitting), quant_group_size, (scheme.bits,), rows * columns // max(fitting))


def unpack(tensors: dict[str, np.ndarray], known: MatrixHeader, where: str) -> QuantizedMatrix:
    """A linear whose header has been checked. Raises FormatError, UnsupportedError for zeros that no matrix holds."""
    rows, (bits,) = known.rows, known.widths
    if tensors["weight_shape"].tolist() != [rows, known.columns]:
        raise FormatError(
            f"{where}.weight_shape is {tensors['weight_shape'].tolist()}, expected {[rows, known.columns]}"
        )
    with np.errstate(over="ignore"):
        scales = tensors["weight_scale"].astype(np.float16)
    if not np.isfinite(scales).all():
        raise FormatError(f"{where}.weight_scale holds a NaN, an infinity, or what is beyond the range of float16")
    zeros = np.full(scales.shape, ZERO_STEPS // 2, np.uint8)
    if "weight_zero_point" in tensors:
        levels = from_words(tensors["weight_zero_point"].T, bits, rows).T.astype(np.int64) * ZERO_STEPS
        if (levels % (1 << bits)).any():
            raise UnsupportedError(f"{where}.weight_zero_point has 8-bit zeros that are no multiples of 16 levels")
        zeros = (levels >> bits).astype(np.uint8)
    return QuantizedMatrix(
        group_size=known.group_size,
        quant_group_size=known.quant_group_size,
        row_bits=np.full(rows, bits, np.uint8),
        levels=from_words(tensors["weight_packed"], bits, known.columns),
        scales=scales,
        zeros=np.ascontiguousarray(zeros),
    )


def pack(matrix: QuantizedMatrix, symmetric: bool) -> dict[str, np.ndarray]:
    """The tensors of a matrix, by their names after `MODULE.`. symmetric: without zeros, all being the middle level.

    Raises ValueError, a clause that says why, where the format cannot hold the matrix.
    """
    bits = int(matrix.row_bits[0])
    if bits not in _BITS or (matrix.row_bits != bits).any():
        widths = " and ".join(map(str, np.unique(matrix.row_bits)))
        raise ValueError(f"its rows have {widths} bits, and the format holds 4 or 8 for all rows")
    if matrix.keep is not None and not matrix.keep.all():
        raise ValueError("groups of it are removed, which the format cannot say")
    if matrix.columns * bits % 32:
        raise ValueError(f"its {matrix.columns} columns do not fill whole words")
    tensors = {
        "weight_packed": _to_words(matrix.levels, bits),
        "weight_scale": matrix.scales,
        "weight_shape": np.array([matrix.rows, matrix.columns], np.int64),
    }
    if not symmetric:
        zeros = (matrix.zeros.astype(np.int64) << bits) // ZERO_STEPS
        tensors["weight_zero_point"] = np.ascontiguousarray(_to_words(zeros.T.astype(np.uint8), bits).T)
    return tensors


def export(checkpoint: Checkpoint, out: Path) -> Path:
    """Writes a compressed checkpoint to the folder `out` in this format, whole or not at all. Returns the path.

    Raises ModelError that names the linear where the format cannot hold it, InputError if `out` exists.
    """
    out = Path(out)
    if out.exists():
        raise InputError(f"{out} exists already; choose another output folder or delete it first")
    modules = checkpoint.modules()
    if not modules:
        raise ModelError(f"{checkpoint.path} is not compressed; run `gqsac compress` on it first")
    known = {module: checkpoint.matrix_header(module) for module in modules}
    # One scheme for all, as vLLM wants it of linears that it runs as one.
    sizes = {(header.widths, header.quant_group_size) for header in known.values()}
    sizes_of_first = known[modules[0]].widths, known[modules[0]].quant_group_size
    if len(sizes) > 1:
        other = next(m for m in modules if (known[m].widths, known[m].quant_group_size) != sizes_of_first)
        raise ModelError(
            f"{checkpoint.path}: {other} and {modules[0]} differ in width or in columns that share a scale, and "
            "one of each is exported; compress all linears alike"
        )
    symmetric = all((checkpoint.matrix(module).zeros == ZERO_STEPS // 2).all() for module in modules)
    # Whatever else may be a linear; a tied head is not stored.
    dense = (name for name in checkpoint.dense_names() if name.endswith(".weight"))
    matrices = (name for name in dense if len(checkpoint.shape(name)) == 2)
    ignored = sorted({"lm_head", *(name.removesuffix(".weight") for name in matrices)})
    (width, *_), quant_group_size = sizes_of_first
    config = _config(width, quant_group_size, symmetric, ignored)
    shutil.rmtree(partial_folder(out), ignore_errors=True)
    rewrite(checkpoint, out, _packed(checkpoint, symmetric), config, _DROPPED)
    return out


def _packed(checkpoint: Checkpoint, symmetric: bool) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    for module in checkpoint.modules():
        try:
            tensors = pack(checkpoint.matrix(module), symmetric)
        except ValueError as error:
            raise ModelError(f"{checkpoint.path}: {module} cannot be stored as {QUANT_METHOD}: {error}") from error
        yield module, tensors


def _config(bits: int, group_size: int, symmetric: bool, ignored: list[str]) -> dict:
    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group_size,
        "dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax", "observer_kwargs": {},
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": QUANT_METHOD,
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _to_words(levels: np.ndarray, bits: int) -> np.ndarray:
    """uint8 levels [n, m] as int32 [n, ceil(m * bits / 32)], the first in the lowest bits."""
    per_word = 32 // bits
    padded = np.pad(levels, ((0, 0), (0, -levels.shape[1] % per_word)))
    return np.ascontiguousarray(pack_values(padded, bits)).view("<i4")


def from_words(words: np.ndarray, bits: int, count: int | None = None) -> np.ndarray:
    """The first `count` levels, or all, of each row of int32 words [n, m], uint8 [n, count]; the lowest bits first."""
    packed = np.ascontiguousarray(words.astype("<i4")).view(np.uint8)
    return np.ascontiguousarray(unpack_values(packed, bits, words.shape[1] * 32 // bits)[:, :count])
