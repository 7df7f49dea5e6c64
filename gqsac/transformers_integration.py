"""Lets transformers load compressed checkpoints: `AutoModelForCausalLM.from_pretrained("model/")`.

The result is a plain torch model with dequantised nn.Linear weights, for evaluation and comparison;
fast execution is the compiler's and the runtime's business. Works with transformers 4.57 and 5.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from gqsa_runtime.errors import FormatError
from safetensors import safe_open
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from gqsac import codec, stored_streams
from gqsac.model_folder import read_json
from gqsac.quantization_config import QUANT_METHOD, STREAMS_VERSION, QuantizationConfig


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


class _StoredLinear(nn.Module):
    """Stands in an nn.Linear's place while the weights load; `to_linear` makes the nn.Linear.

    parts: buffers of the stored shapes and dtypes, by their names after the linear's, for transformers to load into.
    """

    def __init__(self, linear: nn.Linear, parts: dict[str, tuple[tuple[int, ...], torch.dtype]]):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.part_names = tuple(parts)
        for name, (shape, dtype) in parts.items():
            *path, leaf = name.split(".")
            owner = self
            for step in path:
                if not hasattr(owner, step):
                    owner.add_module(step, nn.Module())
                owner = getattr(owner, step)
            owner.register_buffer(leaf, torch.empty(shape, dtype=dtype, device="meta"))
        self.register_parameter("bias", linear.bias)

    def parts(self) -> dict[str, torch.Tensor]:
        return {name: self.get_buffer(name) for name in self.part_names}

    def to_linear(self, weight: np.ndarray, dtype: torch.dtype) -> nn.Linear:
        """nn.Linear with a weight f32 [rows, columns], on the device of the parts."""
        device = self.get_buffer(self.part_names[0]).device
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(torch.from_numpy(weight).to(device=device, dtype=dtype), requires_grad=False)
        linear.bias = self.bias
        return linear


class GqsaQuantizer(HfQuantizer):
    """Reads stored tensors in place of weights, then puts plain linears back."""

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
        config = self.quantization_config.checked
        stored = _stored_parts(self._files, config)
        for name, (rows, columns) in config.shapes.items():
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
                raise FormatError(f"the tensors of the compressed linear {name} are missing in {self._files}")
            model.set_submodule(name, _StoredLinear(linear, stored[name]))
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        config = self.quantization_config.checked
        dtype = model.get_input_embeddings().weight.dtype
        for name, module in list(model.named_modules()):
            if isinstance(module, _StoredLinear):
                parts = {}
                for part, tensor in module.parts().items():
                    # transformers 4 casts float16 tensors as it loads them.
                    cast = tensor.is_floating_point() and tensor.dtype != torch.float16
                    parts[part] = (self._read(f"{name}.{part}") if cast else tensor).cpu().numpy()
                model.set_submodule(name, module.to_linear(_dequantize(config, name, parts), dtype))
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


def _stored_parts(files: list[str], config: QuantizationConfig) -> dict[str, dict]:
    """compressed module -> name of a tensor after the module's -> (shape, dtype), from the files' headers."""
    kind = stored_streams if config.format_version == STREAMS_VERSION else codec
    pattern = re.compile(rf"(.+)\.({kind.TENSORS.pattern})")
    parts: dict[str, dict] = {}
    for file in files:
        with safe_open(file, framework="pt") as handle:
            names = handle.keys()
            for name in names:
                found = pattern.fullmatch(name)
                if found and found[1] in config.shapes:
                    piece = handle.get_slice(name)
                    dtype = piece.get_dtype()
                    if dtype not in _TORCH_DTYPES:
                        raise FormatError(f"{file}: tensor {name} is of type {dtype}, which no compressed linear holds")
                    parts.setdefault(found[1], {})[found[2]] = (tuple(piece.get_shape()), _TORCH_DTYPES[dtype])
    return parts


def _dequantize(config: QuantizationConfig, module: str, parts: dict[str, np.ndarray]) -> np.ndarray:
    """f32 [rows, columns] of a compressed linear. Raises FormatError where its tensors do not fit together."""
    shape, sizes, where = config.shapes[module], config.group_sizes_of(module), f"tensor {module}"
    if config.format_version != STREAMS_VERSION:
        return codec.unpack(parts, shape, *sizes, where).dequantize()
    return sum(stream.dequantize() for stream in stored_streams.unpack(parts, shape, sizes[0], where))
