"""What a model must compute: transformers, in fp32, on the dequantised weights of its folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from gqsa_runtime import Model
from gqsa_runtime.sampling import SamplingOptions, choose, first_draw, next_draw
from gqsa_runtime.sequence import Sequence
from transformers import AutoModelForCausalLM

import gqsac  # noqa: F401  lets transformers load compressed folders
from gqsac.checkpoint import Checkpoint
from gqsac.rounding import RoundedCheckpoint, Rounding, round_matrix


def load_reference(folder: Path) -> torch.nn.Module:
    """The folder's model in fp32, its compressed linears dequantised."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def load_rounded_reference(folder: Path, rounding: Rounding, head_bits: int = 16) -> torch.nn.Module:
    """An uncompressed folder's model in fp32 with the weights that `build --bits` stores for it."""
    checkpoint = RoundedCheckpoint(Checkpoint.open(folder), rounding)
    reference = load_reference(folder)
    rounded = set()
    if head_bits != 16:
        round_outer(reference, head_bits)
        outer = (reference.get_input_embeddings().weight, reference.get_output_embeddings().weight)
        rounded = {name for name, found in reference.named_parameters() if any(found is each for each in outer)}
    for path, module in reference.named_modules():
        if isinstance(module, torch.nn.Linear) and checkpoint.is_compressed(path):
            (stream,) = checkpoint.streams(path)
            module.weight.copy_(torch.from_numpy(stream.dequantize()))
            rounded.add(f"{path}.weight")
    for name, parameter in reference.named_parameters():
        if parameter.dim() == 2 and name not in rounded:  # dense matrices are stored as fp16
            parameter.copy_(parameter.half().float())
    return reference


@torch.no_grad()
def round_outer(reference: torch.nn.Module, bits: int = 8) -> torch.nn.Module:
    """The model with its embedding and head as a build that is not exact stores them."""
    for module in {reference.get_input_embeddings(), reference.get_output_embeddings()}:
        # A tied weight is rounded once.
        if not hasattr(module.weight, "is_rounded"):
            matrix = round_matrix(module.weight.detach().numpy(), bits, 64)
            module.weight.copy_(torch.from_numpy(matrix.dequantize()))
            module.weight.is_rounded = True
    return reference


@torch.no_grad()
def expected_logits(reference, tokens) -> np.ndarray:
    """f32 [n_tokens, vocab]."""
    return reference(torch.tensor([list(tokens)])).logits[0].numpy()


def expected_log_probs(reference, tokens) -> np.ndarray:
    """f32 [n_tokens - 1], of every token but the first."""
    log_probs = torch.log_softmax(torch.from_numpy(expected_logits(reference, tokens)[:-1]), dim=1)
    return log_probs.gather(1, torch.tensor(list(tokens[1:]))[:, None])[:, 0].numpy()


@torch.no_grad()
def expected_greedy(reference, tokens, n_tokens: int) -> list[int]:
    """The likeliest continuation, one token after another."""
    out = reference(torch.tensor([list(tokens)]), use_cache=True)
    made = []
    for _ in range(n_tokens):
        made.append(int(out.logits[0, -1].argmax()))
        out = reference(torch.tensor([[made[-1]]]), past_key_values=out.past_key_values, use_cache=True)
    return made


def greedy(model: Model, tokens, n_tokens: int) -> list[int]:
    """The same by a compiled model."""
    model.engine.reset()
    logits, made = model.engine.prefill(tokens), []
    for _ in range(n_tokens):
        made.append(int(logits.argmax()))
        logits = model.engine.decode(made[-1])
    return made


def check_draws(model: Model, tokens, n_tokens: int, **options) -> None:
    """The device draws from its logits what `sampling.choose` draws from them."""
    sequence, new, draw, made = Sequence(), list(tokens), first_draw(SamplingOptions(**options), seed=len(tokens)), []
    for _ in range(n_tokens):
        made.append(model.engine.extend_choosing(sequence, new, draw))
        assert made[-1] == choose(model.device.download("logits", model.program.vocab_size), draw)
        new, draw = made[-1:], next_draw(draw)
    assert len(set(made)) > n_tokens // 2
