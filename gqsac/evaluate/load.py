"""Opens any model for evaluation: compiled, or in PyTorch, compressed by gqsac or not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gqsa_runtime.errors import InputError

from gqsac.checkpoint import Checkpoint
from gqsac.evaluate.scoring import Scorer
from gqsac.model_folder import read_json
from gqsac.source import load_source


def is_artifact(source: str) -> bool:
    """Whether a source is meant as a .gqsa file, rather than a folder, a hub id or a .gguf file."""
    return str(source).endswith(".gqsa") or (Path(source).is_file() and not str(source).endswith(".gguf"))


def load_for_evaluation(source: str):
    """(transformers model in fp32 on the CPU, text of its tokenizer.json).

    source: a folder, a hub id or a .gguf file. A compressed folder gives the dequantised model.
    Raises ModelError where the source is missing or damaged.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    config = Path(source) / "config.json"
    if config.is_file() and read_json(config).get("quantization_config"):
        checkpoint = Checkpoint.open(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        return model.eval(), checkpoint.tokenizer_json()
    loaded = load_source(source)
    return loaded.model.float().eval(), loaded.tokenizer_json


def open_scorer(
    source: str,
    device: str = "auto",
    context: int | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **opening: Any,
) -> Scorer:
    """Opens a .gqsa file with the runtime, any other source with PyTorch in fp32.

    device: auto, cpu, cuda or cuda:N. context: tokens that fit at once. threads: of the CPU. progress: called
    with (bytes read, bytes in all) while a .gqsa file loads. opening: what else `gqsa_runtime.Model.open` is to be told
    of such a file. Raises the errors of `gqsa_runtime.Model.open` and `load_for_evaluation`.
    """
    if threads is not None and threads < 1:
        raise InputError(f"the number of threads is {threads}, expected at least 1")
    if is_artifact(source):
        from gqsa_runtime.model import Model

        from gqsac.evaluate.score_runtime import RuntimeScorer

        return RuntimeScorer(Model.open(source, device, context, threads, progress, **opening))
    import torch
    from gqsa_runtime.tokenizer import Tokenizer

    from gqsac.evaluate.score_torch import TorchScorer, torch_device

    torch_device(device)  # before a long load
    if threads is not None:
        torch.set_num_threads(threads)
    model, tokenizer_json = load_for_evaluation(source)
    return TorchScorer(model, Tokenizer(tokenizer_json), device, context)
