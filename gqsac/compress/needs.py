"""What each stage of a compression holds in memory at once, estimated from sizes alone.

Every figure is a lower bound: of the weights, and of training them, what is surely there together; of activations, a
share that every common block keeps. Measured peaks are one to two times as high.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from gqsac.compress import end_to_end, losses
from gqsac.compress.compiled import compiles
from gqsac.compress.options import Options
from gqsac.compress.trainable import is_large

# Bytes that the backward pass keeps for each token and each input and output feature of a linear. Counted in blocks
# of opt (3.1 in f32, 2.0 under autocast), llama (4.4, 3.0), qwen3 (5.1, 3.4), gemma2 (6.3, 4.6); less where compiled.
_GRAPH_BYTES = {"cpu": 3.0, "cuda": 2.0, "compiled": 1.0}
_ONE_SHOT_BYTES = 9  # of a weight in its block: itself, what it was rounded from, its level
_TRAINED = 4  # numbers of a weight that learns: master, gradient and two moments of AdamW


@dataclass(frozen=True)
class ModelSize:
    """What of a model decides how much memory its compression takes; counts of parameters but for the following.

    stored: bytes of a parameter in the source. outside: parameters that f32 is made of for calibration, all but
    blocks and an output head of its own. block: rows and columns of the linears to compress in the block with most of
    them. features: inputs and outputs of all compressed linears that a token passes, of experts one. blocks: their
    number. large: see trainable.py.
    """

    parameters: int
    stored: float
    outside: int
    block: tuple[tuple[int, int], ...]
    compressed: int
    features: int
    blocks: int
    width: int
    vocabulary: int
    large: bool

    @classmethod
    def of(cls, model, block_path: str, shapes: dict[str, tuple[int, int]]) -> ModelSize:
        """shapes: full path -> (rows, columns) of every linear to compress."""
        parameters = list(model.parameters())
        count = sum(parameter.numel() for parameter in parameters)
        blocks = model.get_submodule(block_path)
        embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings()
        outside = count - sum(parameter.numel() for parameter in blocks.parameters())
        if head is not None and head.weight is not embeddings:
            outside -= head.weight.numel()
        by_block: dict[str, list] = {}
        for path, shape in shapes.items():
            by_block.setdefault(path.removeprefix(f"{block_path}.").split(".")[0], []).append(shape)
        return cls(
            parameters=count,
            stored=sum(parameter.nbytes for parameter in parameters) / count,
            outside=outside,
            block=tuple(max(by_block.values(), key=_weights)),
            compressed=_weights(shapes.values()),
            features=sum(rows + columns for rows, columns in _passed(block_path, shapes)),
            blocks=len(blocks),
            width=embeddings.shape[1],
            vocabulary=len(embeddings),
            large=is_large(model),
        )


def _passed(block_path: str, shapes: dict[str, tuple[int, int]]):
    """Shapes of the linears through which every token goes: of numbered ones in a block, which may be experts, one."""
    found = {}
    for path, shape in shapes.items():
        block, _, inside = path.removeprefix(f"{block_path}.").partition(".")
        found[block, re.sub(r"\d+", "", inside)] = shape
    return found.values()


def _weights(shapes) -> int:
    return sum(rows * columns for rows, columns in shapes)


@dataclass(frozen=True)
class Need:
    """Bytes that a stage needs beside what is held already. gpu: 0 where there is none."""

    stage: str
    gpu: int
    ram: int


@dataclass(frozen=True)
class Free:
    """Bytes that can be had, None where the system does not say or there is no such memory. swap: beside `ram`."""

    gpu: int | None
    ram: int | None
    swap: int = 0


def needs(size: ModelSize, options: Options, device: torch.device, free: Free) -> list[Need]:
    """Of every stage, in order."""
    found = []
    starts_dense = options.training[:1] == ("distill",) and options.removes_gradually("distill")
    if options.by_rows or options.allocation == "global" and options.sparsity > 0 and not starts_dense:
        found.append(_allocation(size, options, device))
    found.append(_blockwise(size, options, device, free))
    return found + [
        _end_to_end(stage, size, options, device) for stage in options.training if stage in ("distill", "e2e-oqp")
    ]


def _allocation(size: ModelSize, options: Options, device: torch.device) -> Need:
    narrow = device.type == "cuda" and size.large
    weights = (2 if narrow else 4) * size.parameters
    scores = 4 * size.compressed // options.group_size
    work = scores + _graph(size, options.seq_len, device) + _logits(size, options.seq_len, device, teacher=False)
    return _placed("the allocation of the sparsity", device, weights + work, weights)


def _blockwise(size: ModelSize, options: Options, device: torch.device, free: Free) -> Need:
    trains = "bqpo" in options.training
    stage, weight = "bqpo" if trains else "one-shot", _ONE_SHOT_BYTES
    if trains:
        weight += _TRAINED * _master_bytes(options)
    linears = _weights(size.block)
    hessians = 8 * sum(columns**2 for columns in {columns for _, columns in size.block})  # with their inverses
    states = states_bytes(size, options) if states_in_memory(size, options, free) else 0
    if device.type == "cuda":
        return Need(stage, max(4 * (size.outside + linears), weight * linears + hessians), states)
    return Need(stage, 0, states + _made_f32(size) + int((weight - size.stored) * linears) + hessians)


def _master_bytes(options: Options) -> int:
    return 2 if options.master_dtype == "bfloat16" else 4


def _made_f32(size: ModelSize) -> int:
    return int((4 - min(4, size.stored)) * size.outside)


def states_bytes(size: ModelSize, options: Options) -> int:
    """Bytes of all samples' activations, see BlockRunner."""
    copies = 2 if "bqpo" in options.training else 1
    return copies * options.samples * options.seq_len * size.width * (2 if size.large else 4)


def states_in_memory(size: ModelSize, options: Options, free: Free) -> bool:
    """Whether they are held in memory: larger ones are files, see activations.py."""
    return free.ram is None or states_bytes(size, options) <= (free.ram - _made_f32(size)) // 2


def _end_to_end(stage: str, size: ModelSize, options: Options, device: torch.device) -> Need:
    gpu = device.type == "cuda"
    teacher = 0
    if stage == "distill" or options.distill > 0:
        teacher = (2 if gpu and size.large else 4) * size.parameters
    dense = 4 * (size.parameters - size.compressed)
    scales = size.compressed // (options.quant_group_size or options.group_size)
    if stage == "distill":  # weights with two moments, gradients; scales and zeros alike, initial scales; masks
        each = _master_bytes(options)
        student, gradients = 3 * each * size.compressed + 28 * scales, each * size.compressed
    else:  # levels; scales with two moments, initial scales, zeros
        student, gradients = size.compressed + 17 * scales, 4 * scales
    student += dense + size.compressed // options.unit
    if stage == "distill" and options.learn_embeddings:  # their gradients and two moments
        student += 12 * size.vocabulary * size.width
    recomputed = size.blocks * size.width if gpu and size.large else 0
    at_once = end_to_end.samples_at_once(options.seq_len, size.vocabulary, device, recomputed)
    batch = max(1, options.batch_tokens // options.seq_len)
    tokens = min(batch, at_once) * options.seq_len
    kept = _graph(size, tokens, device) + _logits(size, tokens, device, teacher=teacher > 0)
    training = teacher + student + max(kept, gradients)
    loaded = 4 * size.parameters if not (gpu and size.large) else int(size.stored * size.parameters)
    need = _placed(stage, device, max(training, teacher + loaded if not gpu else 0), loaded)
    freed = int(size.stored * size.compressed)  # the blocks that were compressed one by one are gone by now
    return replace(need, ram=max(0, need.ram - freed))


def _graph(size: ModelSize, tokens: int, device: torch.device) -> int:
    """Bytes of activations that a backward pass over so many tokens finds."""
    gpu = device.type == "cuda"
    if gpu and size.large:  # blocks are run again, so only their inputs are kept, and one block's insides
        return tokens * (4 * size.blocks * size.width + 2 * size.features // size.blocks)
    kind = "compiled" if compiles(device) else device.type
    return int(_GRAPH_BYTES[kind] * tokens * size.features)


def _logits(size: ModelSize, tokens: int, device: torch.device, teacher: bool) -> int:
    """Bytes of logits, their gradient and the teacher's logits, and of what the loss makes of some rows in f32."""
    elements = tokens * size.vocabulary
    each, held = 2 if device.type == "cuda" else 4, 3 if teacher else 2
    in_f32 = 1 if compiles(device) else held
    return elements * each * held + 4 * in_f32 * min(elements, losses.LOGITS_AT_ONCE)


def _placed(stage: str, device: torch.device, work: int, loaded: int) -> Need:
    """A stage that does `work` on the device with weights that are read into the CPU's memory first."""
    return Need(stage, work, loaded) if device.type == "cuda" else Need(stage, 0, work)
