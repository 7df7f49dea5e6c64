"""The files of a model folder in Hugging Face layout: weights, JSON and texts, read with clear errors."""

from __future__ import annotations

import json
from pathlib import Path

from gqsa_runtime.errors import FormatError, ModelError


def read_json(file: Path) -> dict:
    """A JSON object from a file. Raises FormatError where the file is not one."""
    try:
        value = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file} is not valid JSON ({error}); is the file damaged?") from error
    if not isinstance(value, dict):
        raise FormatError(f"{file} holds {type(value).__name__}, expected a JSON object")
    return value


def read_text(file: Path) -> str:
    """A UTF-8 text of the folder. Raises FormatError where it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{file} is not UTF-8 text (byte {error.start}); is the file damaged?") from error


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model folder. Raises ModelError if there are none, FormatError if one is missing."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise FormatError(f"{index} has no weight_map of tensor names to files; is the file damaged?")
        files = []
        for name in sorted(set(shards.values())):
            if Path(name).name != name or not (path / name).is_file():  # no way out of the folder
                raise FormatError(f"{path}: the shard {name!r} named in {index.name} is missing")
            files.append(path / name)
        return files
    single = path / "model.safetensors"
    files = [single] if single.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{path} has a config.json but no weights (*.safetensors)")
    return files
