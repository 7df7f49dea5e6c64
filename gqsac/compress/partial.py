"""The folder OUT.partial: what a compression has finished, so that it can go on after a kill.

It holds state.json (which model, which options), per stage one file of stored tensors per finished block
and facts for the report, and the state of an end-to-end stage under way.
Every file appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
from gqsa_runtime.errors import InputError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from gqsac.compress.write import sync, write_json
from gqsac.locks import lock
from gqsac.quantization_config import QUANT_METHOD

_STATE_UNDER_WAY = "state.json.tmp"
_PUBLISHED = "published"  # which folder was given the name OUT
_STATE = ".state"  # ending of what an end-to-end stage under way has saved
# Options of the end-to-end stages alone: until one of them has left something, they may change. The tokens of a step
# may until the next of them has saved a state, so that one whose steps are too large for the memory goes on with
# smaller ones.
_END_TO_END = ("batch_tokens", "e2e_steps", "train_samples", "train_tokens", "distill")
_IN_WORDS = {
    "calibration": "calibration text",
    "format_version": "version of the checkpoint format",
    "gqsac": "version of gqsac",
    "own_samples": "number of samples of the model's own text",
    "tokens": "calibration text (by its tokens)",
    "train_tokens": "training text (by its tokens)",
}


def _rank(key: str) -> tuple:
    """The model first, then options, and last the tokens, which change with them."""
    return key != "model", key in ("tokens", "train_tokens"), key


class PartialFolder:
    """Opens or makes OUT.partial for one compression.

    identity: flat dict of the source's fingerprint and all options that change the result. Raises
    InputError that names the first difference if the folder was begun with another identity. follows: whether another
    process of the same compression has opened it; this one then reads alone, and what it is given to save is left out.
    """

    def __init__(self, out: Path, identity: dict, follows: bool = False):
        self.path = out.parent / f"{out.name}.partial"
        self._out, self._lock, self._follows = out, None, follows
        if follows:
            return
        identity = json.loads(json.dumps(identity))  # as it will be read back
        state = self.path / "state.json"
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is in the way; move it, or choose another output folder")
        if state.is_file():
            self._compare(state, identity)
        elif self.path.is_dir() and any(file.name != _STATE_UNDER_WAY for file in self.path.iterdir()):
            raise InputError(  # it would be deleted in the end
                f"{self.path} is in the way and holds files of something else (there is no {state.name}); move it, or "
                "choose another output folder"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.path)
        if self._lock is None:
            raise InputError(
                f"another compression to {self._out} is under way (it holds {self.path}); wait for it, or choose "
                "another output folder"
            )
        temporary = self.path / _STATE_UNDER_WAY
        temporary.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, state)

    def _compare(self, state: Path, identity: dict) -> None:
        try:
            found = json.loads(state.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise InputError(f"{state} is damaged ({error}); delete {self.path} and start again") from error
        for key in sorted({*identity, *found} - set(self._free()), key=_rank):
            if found.get(key) != identity.get(key):
                raise InputError(
                    f"{self.path} holds a compression with another {_IN_WORDS.get(key, key)}: {found.get(key)!r} "
                    f"there, {identity.get(key)!r} now; use the same model and options to resume, or delete that folder"
                )

    def _free(self) -> tuple[str, ...]:
        """Options that may differ from those with which the folder was begun."""
        names = [file.name for file in self.path.iterdir()]
        if not any(name.startswith(("distill", "e2e-oqp")) for name in names):
            return _END_TO_END
        return () if any(name.endswith(_STATE) for name in names) else ("batch_tokens",)

    def _block(self, stage: str, index: int) -> Path:
        prefix = "" if stage == "one-shot" else f"{stage}-"
        return self.path / f"{prefix}block-{index:05d}.safetensors"

    def load_block(self, stage: str, index: int) -> dict[str, np.ndarray] | None:
        """Stored tensors of a block that a stage has finished; None if it has not or the file is damaged."""
        try:
            return load_file(str(self._block(stage, index)))
        except (OSError, SafetensorError):
            return None

    def save_block(self, stage: str, index: int, tensors: dict[str, np.ndarray]) -> None:
        """Keeps a block that a stage has finished."""
        if self._follows:
            return
        temporary = self._block(stage, index).with_suffix(".tmp")
        save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, str(temporary))
        sync(temporary)
        os.replace(temporary, self._block(stage, index))

    def checkpoint(self, stage: str) -> Path:
        """Where an end-to-end stage keeps its state."""
        return self.path / f"{stage}{_STATE}"

    def load_json(self, name: str) -> dict | None:
        """What `save_json` kept under that name; None if nothing was, or the file is damaged."""
        try:
            return json.loads((self.path / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def save_json(self, name: str, value: dict) -> None:
        """Keeps a JSON object."""
        if self._follows:
            return
        temporary = self.path / f"{name}.json.tmp"
        write_json(temporary, value)
        sync(temporary)
        os.replace(temporary, self.path / f"{name}.json")

    def new_model_folder(self) -> Path:
        """An empty folder for the finished checkpoint; what an earlier run left in it is removed."""
        folder = self.path / "model"
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        return folder

    def publish(self, folder: Path) -> None:
        """Moves the finished checkpoint to OUT in one step and removes the partial folder."""
        for file in folder.iterdir():
            sync(file)
        sync(folder)
        self.save_json(_PUBLISHED, {"inode": folder.stat().st_ino})
        os.rename(folder, self._out)
        sync(self._out.parent)
        _remove(self.path)

    def close(self) -> None:
        """Lets another compression have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def refuse_existing(out: Path) -> None:
    """Raises InputError where OUT exists. What a run left that was killed after it had published OUT is removed."""
    if not out.exists():
        return
    partial = out.parent / f"{out.name}.partial"
    try:
        published = json.loads((partial / f"{_PUBLISHED}.json").read_text(encoding="utf-8"))["inode"]
    except (OSError, ValueError, KeyError, TypeError):
        published = None
    if published == out.stat().st_ino or (partial.is_dir() and not any(partial.iterdir())):
        _remove(partial)
    if _is_compressed(out):
        raise InputError(
            f"{out} exists already and is a finished compression; build it with `gqsac build {out} -o MODEL.gqsa`, or "
            "choose another output folder"
        )
    raise InputError(f"{out} exists already; choose another output folder or delete it first")


def _remove(partial: Path) -> None:
    """Removes a folder that was published. What says so goes last, so that a kill in between leaves nothing unclear."""
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != f"{_PUBLISHED}.json":
            path.unlink()
    shutil.rmtree(partial)


def _is_compressed(folder: Path) -> bool:
    # It appears by one rename when all of it is written.
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config["quantization_config"]["quant_method"] == QUANT_METHOD
    except (OSError, ValueError, KeyError, TypeError):
        return False
