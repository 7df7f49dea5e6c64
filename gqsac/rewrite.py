"""A checkpoint folder again, with its linears stored in another way and all else as it was."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gqsac.checkpoint import Checkpoint
from gqsac.compress.write import ShardWriter, dense_tensor, write_json


def partial_folder(out: Path) -> Path:
    """Where `rewrite` collects the files of `out`."""
    return out.parent / f"{out.name}.partial"


def rewrite(
    checkpoint: Checkpoint,
    out: Path,
    linears: Iterator[tuple[str, dict[str, np.ndarray]]],
    quantization_config: dict,
    dropped: tuple[str, ...],
) -> None:
    """Writes the folder `out`, whole or not at all; neither it nor its partial folder may be there.

    linears: (path, the tensors by their names after `PATH.`) of every compressed linear, taken one at a time. dropped:
    names of files that are not copied. Raises what `linears` raises, ModelError for a dense tensor that is damaged or
    does not fit.
    """
    folder = partial_folder(out)
    folder.mkdir(parents=True)
    try:
        writer = ShardWriter(folder)
        for module, tensors in linears:
            writer.add({f"{module}.{part}": array for part, array in tensors.items()})
        for name in checkpoint.dense_names():
            writer.add({name: dense_tensor(name, checkpoint.read(name))})
        writer.finish()
        write_json(folder / "config.json", {**checkpoint.config, "quantization_config": quantization_config})
        left = {"config.json", "model.safetensors.index.json", *dropped}
        for file in checkpoint.path.iterdir():
            if file.is_file() and file.suffix not in (".safetensors", ".png") and file.name not in left:
                shutil.copyfile(file, folder / file.name)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
