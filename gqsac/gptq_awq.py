"""Model folders in the formats of GPTQ (AutoGPTQ, GPTQModel) and AWQ (AutoAWQ's `gemm`), as they are published.

A compressed linear MODULE of N outputs, K inputs, b bits and scale groups of Q inputs is, input-major,

    GPTQ   MODULE.qweight  int32 [K * b / 32, N]: levels, packed down the inputs, the first in the lowest bits
           MODULE.qzeros   int32 [K / Q, N * b / 32]: zeros, packed along the outputs, in format "gptq" less one, modulo
                           2^b, in "gptq_v2" as they are
           MODULE.g_idx    int32 [K]: the group of each input; with act-order any, otherwise k // Q. May be absent.
    AWQ    MODULE.qweight  int32 [K, N / 8]: 4-bit levels, packed along the outputs; of eight, the lowest bits hold
                           number 0, then 2, 4, 6, 1, 3, 5, 7
           MODULE.qzeros   int32 [K / Q, N / 8]: zeros, likewise
    both   MODULE.scales   float16 [K / Q, N]

A weight is `scale * (level - zero)`. https://github.com/ModelCloud/GPTQModel, https://github.com/casper-hansen/AutoAWQ
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from gqsa_runtime.errors import FormatError, UnsupportedError

from gqsac.bsr import GROUP_SIZES
from gqsac.checkpoint import Checkpoint
from gqsac.codec import MatrixHeader
from gqsac.compressed_tensors import from_words
from gqsac.quantized_matrix import ZERO_STEPS, QuantizedMatrix

GPTQ, AWQ = "gptq", "awq"
_BITS = {GPTQ: (2, 4, 8), AWQ: (4,)}
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of outputs 0 to 7 in a word
_PARTS = re.compile(r"(.+)\.(qweight|qzeros|scales|g_idx)")
_DTYPES = {"qweight": ("I32",), "qzeros": ("I32",), "scales": ("F16", "BF16", "F32"), "g_idx": ("I32", "I64")}


class GptqAwqCheckpoint(Checkpoint):
    """An open folder of one of the two; its linears come as matrices, and as streams where those can hold them."""

    def __init__(self, path: Path, config: dict, files: list[Path]):
        super().__init__(path, config, None, files)
        self._method, self._zeros_less_one = read_format(config["quantization_config"], str(path / "config.json"))
        for name in self._tensors:
            found = _PARTS.fullmatch(name)
            if found and f"{found[1]}.qweight" in self._tensors:
                self._parts.setdefault(found[1], []).append(found[2])
        if not self._parts:
            raise FormatError(f"{path}: config.json says {self._method}, but no linear is stored so; is it complete?")
        for module, parts in self._parts.items():
            stored = {part: self._tensors[f"{module}.{part}"] for part in parts}
            stored = {part: (tensor.dtype, tensor.shape) for part, tensor in stored.items()}
            self._headers[module] = header(stored, self._method, self._where(module))

    @property
    def compressed(self) -> bool:
        return True

    def pattern(self, module: str) -> tuple[np.ndarray, None]:
        known = self._header(module)
        self._check_order(module)
        return np.full(known.rows, known.widths[0], np.uint8), None

    def matrix(self, module: str) -> QuantizedMatrix:
        known = self._header(module)
        self._check_order(module)
        tensors = {part: self.read(f"{module}.{part}") for part in self._parts[module] if part != "g_idx"}
        return unpack(tensors, known, self._method, self._zeros_less_one, self._where(module))

    def _check_order(self, module: str) -> None:
        if "g_idx" not in self._parts[module]:
            return
        known = self._header(module)
        groups = self.read(f"{module}.g_idx")
        if not np.array_equal(groups, np.arange(known.columns) // known.quant_group_size):
            raise UnsupportedError(
                f"{self._where(module)}.g_idx is not in order (act-order, desc_act): columns that share a scale lie "
                "apart, which no gqsa matrix holds; take a checkpoint without act-order, or run `gqsac compress` on "
                "the uncompressed model"
            )


def read_format(raw: dict, where: str) -> tuple[str, bool]:
    """(method, whether zeros are stored less one) of a `quantization_config`. Raises UnsupportedError, which names
    `where`."""
    method = raw.get("quant_method")
    key = "checkpoint_format" if method == GPTQ else "version"
    layout = str(raw.get(key) or ("gptq" if method == GPTQ else "gemm")).lower()
    if layout not in (("gptq", "gptq_v2") if method == GPTQ else ("gemm",)):
        known = "gptq and gptq_v2 are" if method == GPTQ else "gemm is"
        raise UnsupportedError(
            f"{where}: {method} is stored as {key} {layout!r}; {known} read, so run `gqsac compress` on the "
            "uncompressed model"
        )
    return method, layout == "gptq"


def header(stored: dict[str, tuple[str, tuple[int, ...]]], method: str, where: str) -> MatrixHeader:
    """Checks types, shapes and counts. stored, where: as in gqsac.codec.header. Raises FormatError that names the
    tensor, UnsupportedError for a grid that a matrix cannot hold."""
    for name in ("qweight", "qzeros", "scales", *stored):
        if name not in stored:
            raise FormatError(f"{where}.{name} is missing; is the checkpoint complete?")
        dtype, shape = stored[name]
        if dtype not in _DTYPES[name]:
            raise FormatError(f"{where}.{name} is of type {dtype}, expected {' or '.join(_DTYPES[name])}")
        if len(shape) != (1 if name == "g_idx" else 2) or 0 in shape:
            raise FormatError(f"{where}.{name} has shape {list(shape)}, expected another number of dimensions")
    n_groups, rows = stored["scales"][1]
    words = stored["qzeros"][1][1] * 32
    bits = words // rows
    if words % rows or bits not in _BITS[method]:
        listed = ", ".join(map(str, _BITS[method]))
        raise UnsupportedError(f"{where}.qzeros has {words / rows:g} bits a zero, and of {method} {listed} are read")
    per_word = 32 // bits
    columns = stored["qweight"][1][0] * (per_word if method == GPTQ else 1)
    expected = {
        "qweight": (columns // per_word, rows) if method == GPTQ else (columns, rows // per_word),
        "qzeros": (n_groups, rows // per_word),
        "g_idx": (columns,),
    }
    for name, shape in expected.items():
        if name in stored and stored[name][1] != shape:
            raise FormatError(f"{where}.{name} has shape {list(stored[name][1])}, expected {list(shape)}")
    quant_group_size = columns // n_groups
    fitting = [size for size in GROUP_SIZES if quant_group_size % size == 0]
    if columns % n_groups or not fitting:
        raise UnsupportedError(
            f"{where}.scales has {n_groups} groups of {columns} columns, expected groups of a multiple of 8 columns"
        )
    group_size = max(fitting)
    return MatrixHeader(rows, columns, group_size, quant_group_size, (bits,), rows * columns // group_size)


def unpack(
    tensors: dict[str, np.ndarray], known: MatrixHeader, method: str, zeros_less_one: bool, where: str
) -> QuantizedMatrix:
    """A linear whose header has been checked. Raises FormatError, UnsupportedError for zeros that no matrix holds."""
    (bits,) = known.widths
    with np.errstate(over="ignore"):
        scales = tensors["scales"].astype(np.float16)
    if not np.isfinite(scales).all():
        raise FormatError(f"{where}.scales holds a NaN, an infinity, or what is beyond the range of float16")
    if method == GPTQ:
        levels = from_words(tensors["qweight"].T, bits)  # [N, K]
        zeros = from_words(tensors["qzeros"], bits)  # [K / Q, N]
        if zeros_less_one:
            zeros = (zeros + np.uint8(1)) & np.uint8((1 << bits) - 1)
    else:
        levels = _in_order(from_words(tensors["qweight"], bits)).T
        zeros = _in_order(from_words(tensors["qzeros"], bits))
    sixteenths = zeros.T.astype(np.int64) * ZERO_STEPS
    if (sixteenths % (1 << bits)).any():
        raise UnsupportedError(
            f"{where}.qzeros has 8-bit zeros that are no multiples of 16 levels, which no gqsa matrix holds; run "
            "`gqsac compress` on the uncompressed model"
        )
    return QuantizedMatrix(
        group_size=known.group_size,
        quant_group_size=known.quant_group_size,
        row_bits=np.full(known.rows, bits, np.uint8),
        levels=np.ascontiguousarray(levels),
        scales=np.ascontiguousarray(scales.T),
        zeros=np.ascontiguousarray(sixteenths >> bits).astype(np.uint8),
    )


def _in_order(interleaved: np.ndarray) -> np.ndarray:
    """AWQ's outputs [n, N] in their order."""
    return interleaved.reshape(len(interleaved), -1, 8)[..., _AWQ_PLACES].reshape(interleaved.shape)
