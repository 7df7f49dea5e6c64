"""Opens any model for evaluation in PyTorch: compressed by gqsac or not."""

from pathlib import Path

from gqsac.checkpoint import Checkpoint
from gqsac.model_folder import read_json
from gqsac.source import load_source


def load_for_evaluation(source: str):
    """(transformers model in fp32 on the CPU, text of its tokenizer.json).

    source: a folder, a hub id or a .gguf file. A compressed folder gives the dequantised model.
    Raises ModelError where the source is missing or damaged.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = Path(source) / "config.json"
    if config.is_file() and read_json(config).get("quantization_config"):
        checkpoint = Checkpoint.open(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        return model.eval(), checkpoint.tokenizer_json()
    loaded = load_source(source)
    return loaded.model.float().eval(), loaded.tokenizer_json
