"""Reads model folders in Hugging Face layout, compressed by gqsac or not, one tensor at a time.

A compressed linear MODULE has, in place of `MODULE.weight`, for each stream i the tensors
`MODULE.streams.<i>.{crow_indices, col_indices, values, scales, zeros}` (see gqsac.bsr.BsrStream).
Nothing is trusted: a damaged or hostile checkpoint gives a FormatError that names the tensor.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gqsa_runtime.errors import FormatError, ModelError
from gqsa_runtime.layouts.group_words import ZERO_OF_8_BIT
from safetensors import SafetensorError, safe_open

from gqsac.bsr import BITS, BsrStream
from gqsac.model_folder import read_json, read_text, weight_files
from gqsac.quantization_config import QuantizationConfig

STREAM_TENSORS = ("crow_indices", "col_indices", "values", "scales", "zeros")
_DTYPES = {
    "crow_indices": ("I32",),
    "col_indices": ("I16", "I32"),
    "values": ("U8",),
    "scales": ("F16",),
    "zeros": ("U8",),
}
_DENSE_DTYPES = ("F16", "F32", "F64", "BF16", "U8", "I8", "I16", "I32", "I64", "BOOL")


@dataclass(frozen=True)
class _Stored:
    """Where a tensor is and what its header says."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it, e.g. F16


@dataclass(frozen=True)
class StreamHeader:
    """What a stream is, without its contents. rows, columns: of the linear. nnz: kept groups."""

    rows: int
    columns: int
    group_size: int
    bits: int
    nnz: int


class Checkpoint:
    """An open model folder. Make one with `Checkpoint.open`.

    config: the parsed config.json. quantization: of a compressed checkpoint, else None.
    """

    def __init__(self, path: Path, config: dict, quantization: QuantizationConfig | None, files: list[Path]):
        self.path = path
        self.config = config
        self.quantization = quantization
        # Files are opened anew for each read: one that stays open stays mapped, and its pages, once
        # read, count as this process's memory.
        self._tensors: dict[str, _Stored] = {}
        for file in files:
            with _opened(file) as handle:
                names = handle.keys()
                for name in names:
                    if name in self._tensors:
                        raise FormatError(
                            f"{file}: tensor {name} stands in two files of the folder; remove one of them"
                        )
                    piece = handle.get_slice(name)
                    self._tensors[name] = _Stored(file, tuple(piece.get_shape()), piece.get_dtype())
        self._streams: dict[str, dict[int, set[str]]] = {}  # module -> stream -> its tensors
        if quantization is not None:
            self._index_streams()

    @classmethod
    def open(cls, path) -> Checkpoint:
        """Opens a folder with config.json and safetensors weights (one file, or shards with an index).

        Raises ModelError where the folder is missing or holds no model, FormatError where it is damaged.
        """
        path = Path(path)
        if not path.is_dir():
            if path.suffix == ".gguf" and path.exists():
                raise ModelError(
                    f"{path} is a GGUF file, which is not compressed yet; run `gqsac compress {path} -o OUT` first, "
                    "then `gqsac build OUT`"
                )
            what = "is not a folder" if path.exists() else "does not exist"
            raise ModelError(f"{path} {what}; expected a model folder with config.json and *.safetensors")
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} holds no config.json; expected a model folder in Hugging Face layout")
        config = read_json(path / "config.json")
        raw = config.get("quantization_config")
        quantization = None if raw is None else QuantizationConfig.from_dict(raw, str(path / "config.json"))
        return cls(path, config, quantization, weight_files(path))

    def names(self) -> list[str]:
        """All tensor names as stored, sorted; a compressed linear's streams among them."""
        return sorted(self._tensors)

    def modules(self) -> list[str]:
        """Paths of the compressed linears, sorted."""
        return sorted(self._streams)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor, from the header alone. Raises ModelError if there is none of that name."""
        return self._stored(name).shape

    def read(self, name: str) -> np.ndarray:
        """A stored tensor as it is, except that bf16 becomes f32. Raises ModelError if there is none."""
        stored = self._stored(name)
        if stored.dtype not in _DENSE_DTYPES:
            raise ModelError(
                f"{self.path}: tensor {name} is of type {stored.dtype}, expected float16, bfloat16 or float32"
            )
        if stored.dtype != "BF16":
            with _opened(stored.file) as handle:
                return handle.get_tensor(name)
        import torch  # numpy has no bfloat16

        with _opened(stored.file, "pt") as handle:
            return handle.get_tensor(name).to(torch.float32).numpy()

    def is_compressed(self, module: str) -> bool:
        """Whether the linear at this path is stored as BSR streams."""
        return module in self._streams

    def stream_headers(self, module: str) -> tuple[StreamHeader, ...]:
        """Shape, bits and number of kept groups of each stream, from the files' headers alone."""
        rows, columns = self._shape_of(module)
        headers = []
        for i in range(len(self._streams_of(module))):
            bits = self._bits(module, i)  # first: it checks that values has two dimensions
            nnz = self.shape(f"{module}.streams.{i}.values")[0]
            headers.append(StreamHeader(rows, columns, self.quantization.group_size, bits, nnz))
        return tuple(headers)

    def streams(self, module: str) -> tuple[BsrStream, ...]:
        """The linear's weights. Every index, count and dtype has been checked. Raises FormatError."""
        return tuple(self._stream(module, i) for i in range(len(self._streams_of(module))))

    def tokenizer_json(self) -> str:
        """Text of tokenizer.json. Raises ModelError if the folder has none."""
        file = self.path / "tokenizer.json"
        if not file.is_file():
            raise ModelError(
                f"{self.path} holds no tokenizer.json; save the model's fast tokenizer there "
                "(transformers: tokenizer.save_pretrained)"
            )
        return read_text(file)

    def chat_template(self) -> str | None:
        """The Jinja chat template, from chat_template.jinja, chat_template.json or tokenizer_config.json."""
        if (self.path / "chat_template.jinja").is_file():
            return read_text(self.path / "chat_template.jinja")
        for file in ("chat_template.json", "tokenizer_config.json"):
            if (self.path / file).is_file():
                template = read_json(self.path / file).get("chat_template")
                if isinstance(template, list):  # several named ones: the default speaks for the model
                    template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
                if isinstance(template, str):
                    return template
        return None

    @property
    def generation_config(self) -> dict:
        """The parsed generation_config.json, {} if the folder has none."""
        file = self.path / "generation_config.json"
        return read_json(file) if file.is_file() else {}

    def _stored(self, name: str) -> _Stored:
        if name not in self._tensors:
            raise ModelError(f"{self.path} holds no tensor {name}; is the checkpoint complete?")
        return self._tensors[name]

    def _index_streams(self) -> None:
        for name in self._tensors:
            module, mark, rest = name.rpartition(".streams.")
            number, _, tensor = rest.partition(".")
            if mark and number.isdecimal() and tensor in STREAM_TENSORS:
                self._streams.setdefault(module, {}).setdefault(int(number), set()).add(tensor)
        for module, streams in self._streams.items():
            if module not in self.quantization.shapes:
                raise FormatError(f"{self.path}: config.json gives no shape for the compressed linear {module}")
            if sorted(streams) != list(range(len(streams))):
                raise FormatError(f"{self.path}: {module} has streams {sorted(streams)}, expected 0, 1, … without gaps")
            for number, tensors in streams.items():
                for tensor in STREAM_TENSORS:
                    if tensor not in tensors:
                        raise FormatError(f"{self.path}: tensor {module}.streams.{number}.{tensor} is missing")
        for module in self.quantization.shapes:
            if module not in self._streams:
                raise FormatError(f"{self.path}: the streams of the compressed linear {module} are missing")

    def _streams_of(self, module: str) -> dict[int, set[str]]:
        if module not in self._streams:
            raise ModelError(f"{self.path}: {module} is not a compressed linear of this checkpoint")
        return self._streams[module]

    def _shape_of(self, module: str) -> tuple[int, int]:
        self._streams_of(module)
        return self.quantization.shapes[module]

    def _checked(self, module: str, number: int, tensor: str, ndim: int) -> np.ndarray:
        name = f"{module}.streams.{number}.{tensor}"
        stored = self._stored(name)
        if stored.dtype not in _DTYPES[tensor]:
            expected = " or ".join(_DTYPES[tensor])
            raise FormatError(f"{self.path}: tensor {name} is of type {stored.dtype}, expected {expected}")
        if len(stored.shape) != ndim:
            raise FormatError(f"{self.path}: tensor {name} has shape {list(stored.shape)}, expected {ndim} dimensions")
        with _opened(stored.file) as handle:
            return handle.get_tensor(name)

    def _crow_indices(self, module: str, number: int) -> np.ndarray:
        rows, columns = self._shape_of(module)
        crow = self._checked(module, number, "crow_indices", 1)
        name = f"{self.path}: tensor {module}.streams.{number}.crow_indices"
        if len(crow) != rows + 1:
            raise FormatError(f"{name} has {len(crow)} entries, expected rows + 1 = {rows + 1}")
        counts = np.diff(crow.astype(np.int64))
        if crow[0] != 0 or (counts < 0).any() or (counts > columns // self.quantization.group_size).any():
            raise FormatError(
                f"{name} is not a list of row starts: expected 0 first, then rises of 0 to "
                f"{columns // self.quantization.group_size}"
            )
        nnz = self.shape(f"{module}.streams.{number}.col_indices")
        if nnz != (int(crow[-1]),):
            raise FormatError(f"{name} ends at {crow[-1]}, but col_indices has shape {list(nnz)}")
        return crow

    def _bits(self, module: str, number: int) -> int:
        name = f"{module}.streams.{number}.values"
        shape, group_size = self.shape(name), self.quantization.group_size
        for bits in BITS:
            if len(shape) == 2 and shape[1] * 8 == group_size * bits:
                return bits
        raise FormatError(
            f"{self.path}: tensor {name} has shape {list(shape)}, expected [nnz, bytes of a group of {group_size} "
            f"at {', '.join(map(str, BITS))} bits]"
        )

    def _stream(self, module: str, number: int) -> BsrStream:
        rows, columns = self._shape_of(module)
        group_size, bits = self.quantization.group_size, self._bits(module, number)
        crow = self._crow_indices(module, number)
        where = f"{self.path}: tensor {module}.streams.{number}"
        col = self._checked(module, number, "col_indices", 1).astype(np.int32)
        if len(col) and (col.min() < 0 or col.max() >= columns // group_size):
            raise FormatError(f"{where}.col_indices leaves the range 0 to {columns // group_size - 1}")
        rising = np.diff(col) > 0
        starts = crow[1:-1]
        rising[starts[(starts > 0) & (starts < len(col))] - 1] = True  # a new row may start lower
        if not rising.all():
            raise FormatError(f"{where}.col_indices is not ascending within row {_row_of(crow, rising.argmin() + 1)}")
        values = self._checked(module, number, "values", 2)
        scales = self._checked(module, number, "scales", 1)
        zeros = self._checked(module, number, "zeros", 1)
        for tensor, array in (("values", values), ("scales", scales), ("zeros", zeros)):
            if len(array) != len(col):
                raise FormatError(f"{where}.{tensor} has {len(array)} entries, expected one per group: {len(col)}")
        if not np.isfinite(scales).all():
            raise FormatError(f"{where}.scales holds a NaN or an infinity")
        if bits == 8 and (zeros != ZERO_OF_8_BIT).any():
            raise FormatError(f"{where}.zeros is not {ZERO_OF_8_BIT} throughout, as 8-bit groups must be")
        if len(zeros) and zeros.max() >= 1 << bits:
            raise FormatError(f"{where}.zeros reaches {zeros.max()}, expected at most {(1 << bits) - 1}")
        return BsrStream(rows, columns, group_size, bits, crow, col, values, scales, zeros)


@contextlib.contextmanager
def _opened(file: Path, framework: str = "numpy"):
    """An open safetensors file. Raises FormatError where it is damaged."""
    try:
        with safe_open(str(file), framework=framework) as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{file} is damaged or cut off ({error}); download or compress the model again") from error


def _row_of(crow: np.ndarray, group: int) -> int:
    return int(np.searchsorted(crow, group, side="right")) - 1
