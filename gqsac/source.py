"""Opens the model to compress: a Hugging Face folder, a hub id, or a GGUF file."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from gqsa_runtime.errors import GqsaError, InputError, ModelError, UnsupportedError

from gqsac.model_folder import read_json

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # of a folder; the first that are there are read
_LARGEST_WEIGHT = 65504
_FLOAT_TYPES = ("F64", "F32", "F16", "BF16")  # of a GGUF file
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Copied byte for byte into the compressed folder where the source has them.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


@dataclass
class Source:
    """A loaded model. name: for people. model: a transformers causal LM on the CPU, in eval mode.

    config: the config.json to write, without quantization_config. files: name -> bytes of the tokenizer
    and generation files to put beside it. tokenizer_json: the text of tokenizer.json. rounded: type -> share of the
    weights that a GGUF file holds in it, where it is a rounded one such as Q4_K.
    """

    name: str
    model: object
    config: dict
    files: dict[str, bytes] = field(default_factory=dict)
    rounded: dict[str, float] = field(default_factory=dict)

    @property
    def tokenizer_json(self) -> str:
        return self.files["tokenizer.json"].decode("utf-8")

    def fingerprint(self) -> str:
        """CRC-32 of config, tokenizer and every weight's name, shape and bytes, 8 hex digits.

        Raises ModelError that names the first tensor with a NaN, an infinity, or a weight beyond fp16.
        """
        import torch

        crc = zlib.crc32(json.dumps(self.config, sort_keys=True).encode())
        crc = zlib.crc32(self.files.get("tokenizer.json", b""), crc)
        for name, tensor in self.model.state_dict().items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ModelError(f"{self.name}: tensor {name} holds a NaN or an infinity; the source model is damaged")
            if tensor.is_floating_point() and tensor.ndim > 1 and tensor.abs().max() > _LARGEST_WEIGHT:
                raise ModelError(
                    f"{self.name}: the largest weight of {name} is {float(tensor.abs().max()):g} and fp16, in which "
                    f"scales and dense weights are stored, ends at {_LARGEST_WEIGHT}; is the source model damaged?"
                )
            crc = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(), crc)
            crc = zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy(), crc)
        return f"{crc:08x}"


def load_source(src) -> Source:
    """Loads weights, config and tokenizer of `src`: a folder, a hub id such as org/name, or a .gguf file.

    Weights keep the dtype they are stored in; GGUF of every type is dequantised to float16. Raises ModelError or
    InputError, in one sentence, for whatever is wrong with the source.
    """
    path = Path(src)
    if str(src).endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"{src} does not exist; expected a GGUF file")
        return _load_gguf(path)
    if path.is_dir():
        return _load_folder(path, str(src))
    if path.exists():
        raise ModelError(f"{src} is a file; expected a model folder, a hub id or a .gguf file")
    if not _HUB_ID.fullmatch(str(src)) or str(src).startswith("."):
        raise ModelError(f"{src} does not exist; expected a model folder, a hub id such as org/name, or a .gguf file")
    return _load_folder(_download(str(src)), str(src))


def _download(hub_id: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    try:
        names = HfApi().list_repo_files(hub_id)
        weights = "*.safetensors" if any(name.endswith(".safetensors") for name in names) else "pytorch_model*.bin*"
        wanted = [*_TOKENIZER_FILES, "config.json", weights, "*.index.json"]
        return Path(snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except Exception as error:  # the hub client raises its own, requests' and httpx's errors
        try:
            return Path(snapshot_download(hub_id, local_files_only=True))
        except Exception:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(
                f"{hub_id} is no folder here and could not be fetched from the hub ({reason}); "
                "check the name and the connection, or give a local folder"
            ) from error


def _load_folder(path: Path, name: str) -> Source:
    if not any(path.iterdir()):
        raise ModelError(f"{name} is an empty folder; expected config.json, *.safetensors and tokenizer.json")
    if not (path / "config.json").is_file():
        raise ModelError(f"{name} holds no config.json; expected a model folder in Hugging Face layout")
    config = read_json(path / "config.json")
    _check_config(config, name)
    if not any(any(path.glob(pattern)) for pattern in WEIGHTS):
        raise ModelError(f"{name} has a config.json but no weights (*.safetensors)")

    from transformers import AutoModelForCausalLM

    with _explained(name):
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    mismatched = sorted(info.get("mismatched_keys") or ())
    if mismatched:
        tensor, stored, expected = mismatched[0]
        raise ModelError(
            f"{name}: tensor {tensor} has shape {list(stored)}, config.json needs {list(expected)} "
            f"({len(mismatched)} differ in all); do config and weights belong together?"
        )
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise ModelError(
            f"{name}: the weights lack {missing[0]} ({len(missing)} missing in all); is the download complete?"
        )
    files = {file: (path / file).read_bytes() for file in _TOKENIZER_FILES if (path / file).is_file()}
    if "tokenizer.json" not in files:
        files.update(_tokenizer_files(name, path))
    return Source(Path(name).resolve().name, model.eval(), config, files)


def _load_gguf(path: Path) -> Source:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file: it does not start with 'GGUF'")
    import torch
    from transformers import AutoModelForCausalLM

    options = {}
    with contextlib.suppress(ImportError):  # newer versions may keep the blocks packed unless told not to
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    with _explained(str(path)):
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float16, **options)
    config = json.loads(model.config.to_json_string(use_diff=False))
    dropped = ("quantization_config", "name_or_path", "transformers_version")
    config = {key: value for key, value in config.items() if key not in dropped and not key.startswith("_")}
    config["architectures"] = [type(model).__name__]
    config["dtype"] = "float16"
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:  # transformers 4 knows it by these names
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    with _explained(str(path)):
        rounded = _rounded(path)
    files = _tokenizer_files(str(path), path.parent, gguf_file=path.name)
    if getattr(model, "generation_config", None) is not None:
        files["generation_config.json"] = model.generation_config.to_json_string().encode()
    return Source(path.stem, model.eval(), config, files, rounded)


def _rounded(path: Path) -> dict[str, float]:
    """See Source: by the types of a GGUF file's matrices, the most frequent first."""
    from gguf import GGUFReader

    counts = Counter()
    for tensor in GGUFReader(path).tensors:
        if len(tensor.shape) > 1:
            counts[tensor.tensor_type.name] += int(tensor.n_elements)
    total = sum(counts.values())
    return {name: n / total for name, n in counts.most_common() if name not in _FLOAT_TYPES}


def _check_config(config: dict, name: str) -> None:
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        if method == "gqsa":
            raise InputError(f"{name} is already compressed by gqsac; compress the model it was made from instead")
        ways = "start from the float16 or bfloat16 model"
        if method in ("gptq", "awq", "compressed-tensors"):
            ways += ", or give it to `gqsac build` as it is"
        raise UnsupportedError(f"{name} is already quantised (quant_method {method!r}); {ways}")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = config.get("model_type")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        import transformers

        raise UnsupportedError(
            f"{name}: model_type {model_type!r} is not a causal language model that transformers "
            f"{transformers.__version__} knows; expected e.g. llama, qwen2 or opt"
        )


def _tokenizer_files(name: str, folder: Path, **options) -> dict[str, bytes]:
    """Makes tokenizer.json (and the chat template) from what the source has: GGUF metadata or slow files."""
    from transformers import AutoTokenizer

    with _explained(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedError(
            f"{name}: its tokenizer has no fast form; put a tokenizer.json of the `tokenizers` library beside it"
        )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = getattr(tokenizer, key, None)
        if token is not None:
            settings[key] = str(token)
    files = {
        "tokenizer.json": tokenizer.backend_tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode(),
    }
    if isinstance(tokenizer.chat_template, str):
        files["chat_template.jinja"] = tokenizer.chat_template.encode()
    return files


@contextlib.contextmanager
def _explained(name: str, what: str = "model"):
    """Turns the many errors of transformers and the file readers into one sentence; quiets progress bars."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    quiet = contextlib.nullcontext()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        quiet = contextlib.redirect_stderr(io.StringIO())  # some bars do not ask; loggers keep the real stderr
    try:
        with quiet:
            yield
    except (GqsaError, MemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        text = text if len(text) <= 300 else text[:297] + "..."
        raise ModelError(f"{name}: transformers could not load the {what}: {text}") from error
    finally:
        if was_enabled:
            logging.enable_progress_bar()
