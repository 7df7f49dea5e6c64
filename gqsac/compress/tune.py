"""The end-to-end stages: `distill` trains everything against the uncompressed model, E2E-OQP scales alone.

E2E-OQP (GQSA, arXiv 2412.17560, section 3.4): masks and levels are frozen, and the scales learn on the
language-model loss, with as much distillation mixed in as asked for. `distill` is no part of the paper: all
weights of the linears (with straight-through rounding), scales, zeros, norms and biases learn to give the
uncompressed model's distribution of next tokens, while groups are removed gradually.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from gqsac.compress.allot_widths import Allotment
from gqsac.compress.blocks import linears_of
from gqsac.compress.captured import attend_without_masks, captures
from gqsac.compress.choose_masks import MaskChooser
from gqsac.compress.choose_widths import WidthChooser
from gqsac.compress.compiled import compile_blocks
from gqsac.compress.end_to_end import Training, micro_batch
from gqsac.compress.fake_quant import FrozenLinear, GroupLinear
from gqsac.compress.options import Options
from gqsac.compress.partial import PartialFolder
from gqsac.compress.row_costs import nearest_grids
from gqsac.compress.store import MASTER_TENSORS, from_matrix, from_stored, load_dense, stored_block, to_matrix, to_numpy
from gqsac.compress.trainable import (
    grouped,
    install,
    is_large,
    parameter_groups,
    prepare_large,
    recompute_blocks,
    set_master_dtype,
    trainable_linears,
)
from gqsac.compress.world import World, together
from gqsac.compress.write import dense_tensor

UNCOMPRESSED = "uncompressed"  # in place of a stage that has stored something


def prepare_training(
    stage: str,
    previous: str,
    model,
    block_path: str,
    tokens: np.ndarray,
    options: Options,
    device: torch.device,
    partial: PartialFolder,
    batch_tokens: int,
    allotment: Allotment | None = None,
    world: World = World(),
) -> Training:
    """The stage's student, made of `model` (the uncompressed one, which it takes over) and what `previous` stored.

    previous: a stage, or UNCOMPRESSED. allotment: of widths by row, if they are chosen under a budget.
    """
    share = 1.0 if stage == "distill" else options.distill
    teacher = None
    if captures(device) and world.size == 1:
        attend_without_masks(model, tokens.shape[1])
    if share > 0:
        teacher = _teacher(model, block_path, device, world)
    large = device.type == "cuda" and is_large(model)  # asked before the weights become levels
    model.requires_grad_(False)
    blocks = model.get_submodule(block_path)
    row_bits = allotment.row_bits(falling=True) if previous == UNCOMPRESSED else {}
    for index, block in enumerate(blocks):
        if previous == UNCOMPRESSED:
            name = f"{block_path}.{index}"
            modules = {
                path: _rounded_to_nearest(linear, row_bits[f"{name}.{path}"], options, device)
                for path, linear in linears_of(block, name, options.skip).items()
            }
            install(block, modules)
            block.float()
            continue
        stored = partial.load_block(previous, index)
        master = partial.load_block(f"{previous}-master", index) if stage == "distill" else None
        name = f"{block_path}.{index}"
        modules = {}
        for path, linear in linears_of(block, name, options.skip).items():
            if master is not None:
                tensors = [torch.from_numpy(master[f"{name}.{path}.{tensor}"]) for tensor in MASTER_TENSORS]
                modules[path] = GroupLinear(*tensors, linear.bias, options.zeros_between_levels)
            else:
                matrix = from_stored(f"{name}.{path}", stored, linear.weight.shape, options)
                modules[path] = FrozenLinear(from_matrix(matrix), linear.bias)
        install(block, modules)
        block.float()  # only now, so that no dense weights become f32
        load_dense(model, stored)
    model.float()
    outside = None if previous == UNCOMPRESSED else partial.load_block(f"{previous}-outside", 0)
    if outside is not None:
        load_dense(model, outside)
    model.to(device)
    linears = trainable_linears(model)
    batch = max(1, batch_tokens // tokens.shape[1] // world.size) * world.size
    others, embeddings, chooser = [], [], None
    if stage == "distill":
        set_master_dtype(linears, options.master_dtype)
        others = [parameter.requires_grad_(True) for parameter in vectors(model)]
        embeddings = [parameter.requires_grad_(True) for parameter in embeddings_of(model) if options.learn_embeddings]
        if previous == UNCOMPRESSED:
            contexts = torch.from_numpy(tokens)
            at_once = micro_batch(model, batch // world.size, tokens.shape[1], device, len(blocks) if large else 0)
            chooser = WidthChooser(model, linears, allotment, contexts, at_once, options.seed, blocks, world)
        elif allotment is None and options.removes_gradually("distill"):
            chooser = MaskChooser(linears, options, already_sparse=previous == "bqpo")
    if large:
        recompute_blocks(blocks)
    else:
        compile_blocks(blocks, device)
    groups = parameter_groups(linears, options.rates(stage), others, embeddings)
    if world.size > 1:
        rates = {id(parameter): group["peak"] for group in groups for parameter in group["params"]}
        names = {name: rates[id(p)] for name, p in model.named_parameters() if id(p) in rates}
        world.spread(model, blocks, device)
        groups = grouped((parameter, names[name]) for name, parameter in model.named_parameters() if name in names)
    steps = options.steps(stage)
    if steps is None and options.minutes is None:
        steps = max(1, 2 * len(tokens) // batch)  # two epochs, as in the paper
    return Training(
        name=stage,
        student=model,
        teacher=teacher,
        tokens=torch.from_numpy(tokens),
        groups=groups,
        share=share,
        batch=batch,
        steps=steps,
        seconds=options.seconds(stage),
        seed=options.seed,
        device=device,
        chooser=chooser,
        recomputed=len(blocks) if large else 0,
        world=world,
    )


def _rounded_to_nearest(linear: nn.Linear, row_bits: torch.Tensor, options: Options, device) -> GroupLinear:
    """A linear of nothing removed, each scale group on the grid nearest to it. row_bits: uint8 [rows]."""
    weight, columns = linear.weight.detach().to(device), linear.in_features
    row_bits = row_bits.to(device)
    (scales,), (zeros,) = nearest_grids([weight], [row_bits], [columns // options.quant_group_size])
    keep = torch.ones(len(weight), columns // options.unit, dtype=torch.bool, device=device)
    return GroupLinear(row_bits, weight, scales, zeros, keep, linear.bias, options.zeros_between_levels)


def _teacher(model, block_path: str, device: torch.device, world: World):
    """A frozen copy on the device: f32, run under autocast, or bf16 where f32 would be large."""
    teacher = copy.deepcopy(model).requires_grad_(False)
    prepare_large(teacher, nn.ModuleList(), device)
    teacher.to(device)
    compile_blocks(teacher.get_submodule(block_path), device)
    world.spread(teacher, teacher.get_submodule(block_path), device)
    return teacher


def vectors(model: nn.Module) -> list[nn.Parameter]:
    """Norm weights and biases: the parameters of one dimension."""
    return [parameter for parameter in model.parameters() if parameter.ndim == 1]


def embeddings_of(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the input embedding and of the output head, one where they are tied."""
    head, found = model.get_output_embeddings(), [model.get_input_embeddings().weight]
    return found if head is None or head.weight is found[0] else [*found, head.weight]


def store_trained(training: Training, block_path: str, dense: list[str], options: Options, partial: PartialFolder):
    """Writes what a finished stage has made: every block's tensors, and trained tensors outside the blocks."""
    model, first = training.student, training.world.rank == 0
    linears = trainable_linears(model)
    for index, block in enumerate(model.get_submodule(block_path)):
        name = f"{block_path}.{index}"
        inside = {path[len(name) + 1 :]: module for path, module in linears.items() if path.startswith(f"{name}.")}
        with together(block):
            if first:
                matrices = {path: to_matrix(module.export(), options.group_size) for path, module in inside.items()}
                partial.save_block(training.name, index, stored_block(name, block, matrices, dense))
    with together(model):
        learnt = {id(parameter) for parameter in embeddings_of(model)} if options.learn_embeddings else set()
        outside = {
            name: dense_tensor(name, to_numpy(parameter.clone()))
            for name, parameter in model.named_parameters()
            if name in dense
            and not name.startswith(f"{block_path}.")
            and (parameter.ndim == 1 or id(parameter) in learnt)
        }
        if first:
            partial.save_block(f"{training.name}-outside", 0, outside)
    training.world.meet()
