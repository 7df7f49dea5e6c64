"""Reads model folders in Hugging Face layout, compressed by gqsac or not, one tensor at a time.

A compressed linear MODULE has other tensors in place of `MODULE.weight`: in format version 2 those of gqsac.codec,
in version 1 BSR streams, see gqsac.stored_streams.
Nothing is trusted: a damaged or hostile checkpoint gives a FormatError that names the tensor.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gqsa_runtime.errors import FormatError, ModelError
from gqsa_runtime.layouts.group_words import ZERO_OF_8_BIT
from safetensors import SafetensorError, safe_open

from gqsac import codec, stored_streams
from gqsac.bsr import BsrStream
from gqsac.codec import MatrixHeader
from gqsac.model_folder import read_json, read_text, weight_files
from gqsac.quantization_config import STREAMS_VERSION, QuantizationConfig
from gqsac.quantized_matrix import QuantizedMatrix
from gqsac.stored_streams import StreamHeader

_DENSE_DTYPES = ("F16", "F32", "F64", "BF16", "U8", "I8", "I16", "I32", "I64", "BOOL")


@dataclass(frozen=True)
class _Stored:
    """Where a tensor is and what its header says."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it, e.g. F16


class Checkpoint:
    """An open model folder. Make one with `Checkpoint.open`, which also reads compressed-tensors' `pack-quantized`,
    GPTQ and AWQ.

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
        # Compressed linears: module -> names of its tensors, and what their headers say.
        self._parts: dict[str, list[str]] = {}
        self._headers: dict[str, MatrixHeader | tuple[StreamHeader, ...]] = {}
        if quantization is not None:
            self._index()

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
        if isinstance(raw, dict) and raw.get("quant_method") == "compressed-tensors":
            from gqsac.compressed_tensors import PackedCheckpoint  # which is a Checkpoint

            return PackedCheckpoint(path, config, weight_files(path))
        if isinstance(raw, dict) and raw.get("quant_method") in ("gptq", "awq"):
            from gqsac.gptq_awq import GptqAwqCheckpoint

            return GptqAwqCheckpoint(path, config, weight_files(path))
        quantization = None if raw is None else QuantizationConfig.from_dict(raw, str(path / "config.json"))
        return cls(path, config, quantization, weight_files(path))

    def names(self) -> list[str]:
        """All tensor names as stored, sorted; those of compressed linears among them."""
        return sorted(self._tensors)

    def modules(self) -> list[str]:
        """Paths of the compressed linears, sorted."""
        return sorted(self._headers)

    def dense_names(self) -> list[str]:
        """Names of the stored tensors that belong to no compressed linear, sorted."""
        parts = {name for module in self.modules() for name in self.parts_of(module)}
        return sorted(set(self._tensors) - parts)

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

    @property
    def compressed(self) -> bool:
        """Whether the folder says that it holds compressed linears."""
        return self.quantization is not None

    def parts_of(self, module: str) -> list[str]:
        """Names of the tensors that a compressed linear is stored as."""
        self._header(module)
        return [f"{module}.{part}" for part in self._parts[module]]

    def is_compressed(self, module: str) -> bool:
        """Whether the linear at this path is stored compressed."""
        return module in self._headers

    def is_one_matrix(self, module: str) -> bool:
        """Whether a compressed linear is one QuantizedMatrix, not the sum of several version 1 streams."""
        known = self._header(module)
        return isinstance(known, MatrixHeader) or len(known) == 1

    def matrix_header(self, module: str) -> MatrixHeader:
        """Shape, group sizes, widths and number of kept groups of a compressed linear, from the files' headers alone.

        Of a version 1 linear the scale groups are its groups. Raises ModelError if it is the sum of several streams.
        """
        known = self._header(module)
        if isinstance(known, MatrixHeader):
            return known
        self._check_one_stream(module, known)
        (stream,) = known
        sizes = stream.group_size, stream.group_size
        return MatrixHeader(stream.rows, stream.columns, *sizes, (stream.bits,), stream.nnz)

    def matrix(self, module: str) -> QuantizedMatrix:
        """A compressed linear's weights, every count and value checked. Raises FormatError, and ModelError if a
        version 1 linear is the sum of several streams."""
        known = self._header(module)
        if isinstance(known, MatrixHeader):
            sizes = known.group_size, known.quant_group_size
            return codec.unpack(self._contents(module), (known.rows, known.columns), *sizes, self._where(module))
        self._check_one_stream(module, known)
        return QuantizedMatrix.from_stream(*self.streams(module))

    def pattern(self, module: str) -> tuple[np.ndarray, np.ndarray | None]:
        """(row_bits, keep) of a compressed linear's QuantizedMatrix; of a version 2 linear no level is read for it."""
        known = self._header(module)
        if not isinstance(known, MatrixHeader):
            matrix = self.matrix(module)
            return matrix.row_bits, matrix.keep
        contents = self._contents(module, ("row_bits", "keep"))
        return codec.pattern(contents, known, self._where(module))

    def stream_headers(self, module: str) -> tuple[StreamHeader, ...]:
        """Shape, width and number of kept groups of each stream, from the files' headers alone.

        Raises ModelError if the linear is no sum of BSR streams: if its rows have several widths, or its groups
        several scales.
        """
        known = self._header(module)
        if not isinstance(known, MatrixHeader):
            return known
        if len(known.widths) > 1:
            widths = " and ".join(map(str, known.widths))
            raise ModelError(
                f"{self.path}: {module} has rows of {widths} bits, and a BSR stream has one width; "
                "compress it with one width for all rows"
            )
        if known.quant_group_size % known.group_size:
            raise ModelError(
                f"{self.path}: {module} has several scales in a group of {known.group_size} columns, one for every "
                f"{known.quant_group_size}, and a BSR stream has one; compress it with a smaller group size"
            )
        return (StreamHeader(known.rows, known.columns, known.group_size, known.widths[0], known.nnz),)

    def streams(self, module: str) -> tuple[BsrStream, ...]:
        """The linear's weights as BSR streams, every index, count and value checked. Raises FormatError, and
        ModelError as `stream_headers` does and for zeros that are no levels, or not 128 at 8 bits."""
        known = self._header(module)
        if not isinstance(known, MatrixHeader):
            shape, group_size = self.quantization.shapes[module], self.quantization.group_size
            return stored_streams.unpack(self._contents(module), shape, group_size, self._where(module))
        self.stream_headers(module)  # what they refuse is refused before anything is read
        try:
            stream = self.matrix(module).to_stream()
        except ValueError as error:
            raise ModelError(f"{self.path}: {module} is not stored as a BSR stream can hold it: {error}") from error
        if stream.bits == 8 and (stream.zeros != ZERO_OF_8_BIT).any():
            raise ModelError(
                f"{self.path}: {module} has 8-bit rows with zeros other than {ZERO_OF_8_BIT}, and 8-bit streams "
                "are symmetric; compress it with this gqsac"
            )
        return (stream,)

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

    def _where(self, module: str) -> str:
        return f"{self.path}: tensor {module}"

    def _index(self) -> None:
        of_streams = self.quantization.format_version == STREAMS_VERSION
        kind = (stored_streams if of_streams else codec).TENSORS
        for name in self._tensors:
            found = re.fullmatch(rf"(.+)\.({kind.pattern})", name)
            if found and found[1] in self.quantization.shapes:
                self._parts.setdefault(found[1], []).append(found[2])
            elif found and found[2].startswith(("streams.", "levels.")):  # "scales" alone may be anyone's
                raise FormatError(f"{self.path}: config.json gives no shape for the compressed linear {found[1]}")
        for module, shape in self.quantization.shapes.items():
            if module not in self._parts:
                raise FormatError(f"{self.path}: the tensors of the compressed linear {module} are missing")
            stored = {part: self._tensors[f"{module}.{part}"] for part in self._parts[module]}
            stored = {part: (tensor.dtype, tensor.shape) for part, tensor in stored.items()}
            sizes, where = self.quantization.group_sizes_of(module), self._where(module)
            if of_streams:
                self._headers[module] = stored_streams.headers(stored, shape, sizes[0], where)
            else:
                self._headers[module] = codec.header(stored, shape, *sizes, where)

    def _header(self, module: str) -> MatrixHeader | tuple[StreamHeader, ...]:
        if module not in self._headers:
            raise ModelError(f"{self.path}: {module} is not a compressed linear of this checkpoint")
        return self._headers[module]

    def _contents(self, module: str, only: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
        """A compressed linear's tensors, or those of some names, by their names after `MODULE.`."""
        tensors = {}
        for part in self._parts[module]:
            if only is not None and part not in only:
                continue
            name = f"{module}.{part}"
            with _opened(self._tensors[name].file) as handle:
                tensors[part] = handle.get_tensor(name)
        return tensors

    def _check_one_stream(self, module: str, streams: tuple[StreamHeader, ...]) -> None:
        if len(streams) > 1:
            raise ModelError(
                f"{self.path}: {module} is the sum of {len(streams)} streams, and one is expected; "
                "compress the model again with this gqsac"
            )


@contextlib.contextmanager
def _opened(file: Path, framework: str = "numpy"):
    """An open safetensors file. Raises FormatError where it is damaged."""
    try:
        with safe_open(str(file), framework=framework) as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{file} is damaged or cut off ({error}); download or compress the model again") from error
