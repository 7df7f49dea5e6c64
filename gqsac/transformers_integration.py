"""Lets transformers load compressed checkpoints: `AutoModelForCausalLM.from_pretrained("model/")`.

The result is a plain torch model with dequantised nn.Linear weights, for evaluation and comparison;
fast execution is the compiler's and the runtime's business. Works with transformers 4.57 and 5.
"""

from __future__ import annotations

from pathlib import Path

import torch
from gqsa_runtime.errors import FormatError
from safetensors import safe_open
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from gqsac.bsr import BsrStream
from gqsac.model_folder import read_json
from gqsac.quantization_config import QUANT_METHOD, QuantizationConfig


class GqsaConfig(QuantizationConfigMixin):
    """What transformers holds of a checkpoint's quantization_config. `checked` is the config itself."""

    def __init__(self, **raw):
        self.quant_method = QUANT_METHOD
        self.checked = QuantizationConfig.from_dict(raw)

    def to_dict(self) -> dict:
        return self.checked.to_dict()

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config


class _StoredStream(nn.Module):
    """Buffers of a stream's stored shapes and dtypes, for transformers to load into."""

    def __init__(self, pieces: dict[str, tuple[tuple[int, ...], torch.dtype]]):
        super().__init__()
        for name, (shape, dtype) in pieces.items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))


class _StoredLinear(nn.Module):
    """Stands in an nn.Linear's place while the weights load; `to_linear` makes the nn.Linear."""

    def __init__(self, linear: nn.Linear, streams: list[dict]):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.streams = nn.ModuleList(_StoredStream(pieces) for pieces in streams)
        self.register_parameter("bias", linear.bias)

    def to_linear(self, group_size: int, dtype: torch.dtype, scales: list[torch.Tensor]) -> nn.Linear:
        """nn.Linear with the sum of the dequantised streams. scales: the streams' f16 scales."""
        device = self.streams[0].values.device
        weight = torch.zeros(self.out_features, self.in_features)
        for stream, stream_scales in zip(self.streams, scales, strict=True):
            bsr = BsrStream(
                rows=self.out_features,
                columns=self.in_features,
                group_size=group_size,
                bits=stream.values.shape[1] * 8 // group_size,
                crow_indices=stream.crow_indices.cpu().numpy(),
                col_indices=stream.col_indices.cpu().numpy(),
                values=stream.values.cpu().numpy(),
                scales=stream_scales.cpu().numpy(),
                zeros=stream.zeros.cpu().numpy(),
            )
            weight += torch.from_numpy(bsr.dequantize())
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight.to(device=device, dtype=dtype), requires_grad=False)
        linear.bias = self.bias
        return linear


class GqsaQuantizer(HfQuantizer):
    """Reads BSR streams in place of weights, then puts plain linears back."""

    requires_calibration = True  # compressing is `gqsac compress`, not a from_pretrained option

    def __init__(self, quantization_config, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self._dtype = None
        self._files: list[str] = []

    def update_dtype(self, dtype):
        self._dtype = dtype
        return dtype

    update_torch_dtype = update_dtype  # its name in transformers 4

    def _convert_model_for_quantization(self, model):
        """Nothing: this swaps in other methods' mixture-of-experts modules, and needs accelerate for it."""

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        self._files = [str(file) for file in checkpoint_files or _cached_files(model.config)]
        stored = _stored_streams(self._files)
        for name, (rows, columns) in self.quantization_config.checked.shapes.items():
            try:
                linear = model.get_submodule(name)
            except AttributeError:
                linear = None
            if not isinstance(linear, nn.Linear) or (linear.out_features, linear.in_features) != (rows, columns):
                raise FormatError(
                    f"config.json says that {name} is a linear of {rows} x {columns}, but the model "
                    f"{type(model).__name__} has {linear} there"
                )
            if name not in stored:
                raise FormatError(f"the streams of the compressed linear {name} are missing in {self._files}")
            model.set_submodule(name, _StoredLinear(linear, stored[name]))
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        group_size = self.quantization_config.checked.group_size
        dtype = model.get_input_embeddings().weight.dtype
        for name, module in list(model.named_modules()):
            if isinstance(module, _StoredLinear):
                scales = [stream.scales for stream in module.streams]
                if any(scale.dtype != torch.float16 for scale in scales):  # transformers 4 casts them as it loads
                    scales = [self._read(f"{name}.streams.{i}.scales") for i in range(len(scales))]
                model.set_submodule(name, module.to_linear(group_size, dtype, scales))
        self.remove_quantization_config(model)
        model.config._is_quantized = False
        return model

    def _read(self, name: str) -> torch.Tensor:
        for file in self._files:
            with safe_open(file, framework="pt") as handle:
                names = handle.keys()
                if name in names:
                    return handle.get_tensor(name)
        raise FormatError(f"tensor {name} is missing in {self._files}")

    def remove_quantization_config(self, model):
        """Makes the model an ordinary one that can be saved, moved and cast."""
        for owner, attribute in ((model, "hf_quantizer"), (model, "quantization_method")):
            if hasattr(owner, attribute):
                delattr(owner, attribute)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.is_quantized = False

    def is_serializable(self, safe_serialization=None):
        return True

    @property
    def is_trainable(self):
        return False


def register() -> None:
    """Makes `quant_method` "gqsa" known to transformers; a second call changes nothing."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = GqsaConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = GqsaQuantizer


def _cached_files(config) -> list[str]:
    """The weight files that from_pretrained has found, for transformers 4, which does not name them."""
    where = {"path_or_repo_id": config._name_or_path, "revision": getattr(config, "_commit_hash", None) or "main"}
    index = cached_file(filename="model.safetensors.index.json", _raise_exceptions_for_missing_entries=False, **where)
    if index is None:
        return [cached_file(filename="model.safetensors", **where)]
    shards = read_json(Path(index))["weight_map"].values()
    return [cached_file(filename=shard, **where) for shard in sorted(set(shards))]


_TORCH_DTYPES = {"I32": torch.int32, "I16": torch.int16, "U8": torch.uint8, "F16": torch.float16}


def _stored_streams(files: list[str]) -> dict[str, list[dict]]:
    """module -> per stream, tensor -> (shape, dtype), from the headers of the safetensors files."""
    found: dict[str, dict[int, dict]] = {}
    for file in files:
        with safe_open(file, framework="pt") as handle:
            names = handle.keys()
            for name in names:
                module, mark, rest = name.rpartition(".streams.")
                number, _, tensor = rest.partition(".")
                if mark and number.isdecimal():
                    piece = handle.get_slice(name)
                    dtype = piece.get_dtype()
                    if dtype not in _TORCH_DTYPES:
                        raise FormatError(f"{file}: tensor {name} is of type {dtype}, which no stream holds")
                    entry = (tuple(piece.get_shape()), _TORCH_DTYPES[dtype])
                    found.setdefault(module, {}).setdefault(int(number), {})[tensor] = entry
    return {module: [streams[number] for number in sorted(streams)] for module, streams in found.items()}
