"""Finds a model's decoder blocks and runs them one at a time on the calibration samples."""

from __future__ import annotations

import contextlib
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from gqsa_runtime.errors import ModelError, UnsupportedError
from torch import nn

from gqsac.compress.activations import empty_states
from gqsac.compress.trainable import autocast, is_large

_GPU_TOKENS = 8192  # that pass through a block at once on a GPU; a CPU gains nothing from more than a sample


def find_blocks(model) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder blocks: the one ModuleList of config.num_hidden_layers modules."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and count > 0
    ]
    if not found:
        raise UnsupportedError(f"{type(model).__name__} has no list of {count} decoder blocks; its layout is unknown")
    return found[0]  # the outermost: named_modules walks from the root


def linears_of(block: nn.Module, block_name: str, skip: tuple[str, ...]) -> dict[str, nn.Linear]:
    """Linears of a block to compress: path within the block -> module, in module order.

    skip: patterns (fnmatch) against the full path `block_name.path` or its last parts.
    """
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and not is_skipped(f"{block_name}.{name}", skip)
    }


def is_skipped(path: str, skip: tuple[str, ...]) -> bool:
    """Whether a pattern names the module: by full path, by its last parts, or with * and ?."""
    return any(fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}") for pattern in skip)


class _Captured(Exception):
    pass


class BlockRunner:
    """The calibration samples on their way through the blocks.

    hidden: [samples, seq_len, width], on the CPU, f32 or, for large models, bf16: the input of the next block, as
    the compressed blocks before it made it. reference: the same as the uncompressed blocks made it, if asked for.
    Each block is called with the keyword arguments that the model itself would give it. large: whether the model is;
    then blocks run under autocast too. folder: where to keep the activations that memory does not hold, see
    activations.py.
    """

    def __init__(
        self,
        model,
        blocks: nn.ModuleList,
        tokens: torch.Tensor,
        device: torch.device,
        reference: bool = False,
        folder: Path | None = None,
    ):
        self.device, self.large = device, is_large(model)
        _float_outside(model, blocks, device)
        with torch.no_grad():
            blocks[0].float().to(device)
            first, arguments, keywords = self._enter(model, blocks, tokens[:1])
            output = blocks[0](first, *arguments, **keywords)
            self._calls = self._record_calls(model, blocks, tokens[:1], isinstance(output, tuple))
            shape, dtype = (len(tokens), *first.shape[1:]), torch.bfloat16 if self.large else torch.float32
            self.hidden, *others = empty_states(2 if reference else 1, shape, dtype, folder)
            for i, row in enumerate(tokens):
                self.hidden[i] = self._enter(model, blocks, row[None])[0]
        self.reference = others[0].copy_(self.hidden) if reference else None
        self._finite = torch.tensor(True)
        _float_outside(model, blocks, torch.device("cpu"))  # it is not run again

    def call(self, index: int, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Output of block `index` for hidden states on the device, f32 or bf16 [batch, seq_len, width]; f32, or what
        autocast makes of it."""
        arguments, keywords = self._calls[index]
        output = block(hidden.float(), *arguments, **keywords)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def run(self, index: int, block: nn.Module, keep: bool, rows: slice = slice(None)) -> None:
        """One pass of the samples through block `index`. keep: make the outputs the new `hidden`."""
        self._finite = self._pass(index, block, self.hidden[rows], keep)

    @torch.no_grad()
    def run_reference(self, index: int, block: nn.Module) -> None:
        """Takes the uncompressed block's outputs as the new `reference`: block `index`'s targets."""
        self._pass(index, block, self.reference, True)

    def _pass(self, index, block, states, keep) -> torch.Tensor:
        """Whether all that was kept is finite, a bool on the device: to read all of it again would take long."""
        finite = torch.tensor(True, device=self.device)
        narrow = autocast(self.device) if self.large else contextlib.nullcontext()
        at_once = max(1, _GPU_TOKENS // states.shape[1]) if self.device.type == "cuda" else 1
        for part in states.split(at_once):
            with narrow:
                output = self.call(index, block, part.to(self.device))
            if keep:
                part.copy_(output)
                finite &= torch.isfinite(output).all()
        return finite

    def check(self, block_name: str) -> None:
        """Raises ModelError if the last pass that was kept made activations that are not finite."""
        if not self._finite:
            raise ModelError(f"the activations after {block_name} hold a NaN or an infinity; compression cannot go on")

    def _enter(self, model, blocks, tokens):
        """The first block's hidden states, other arguments and keywords, for one row of tokens."""
        caught = []

        def stop(*args, **kwargs):
            caught.append(_split(kwargs, args))
            raise _Captured

        blocks[0].forward = stop
        try:
            model(tokens.to(self.device), use_cache=False)
        except _Captured:
            pass
        finally:
            del blocks[0].forward
        return caught[0]

    def _record_calls(self, model, blocks, tokens, as_tuple: bool):
        """(arguments, keywords) of every block but for the hidden states: they may differ (sliding windows).

        The blocks hand their input on meanwhile, so this costs next to nothing.
        """
        calls = []

        def recorder(*args, **kwargs):
            hidden, arguments, keywords = _split(kwargs, args)
            calls.append((arguments, keywords))
            return (hidden,) if as_tuple else hidden

        for block in blocks:
            block.forward = recorder
        head = model.get_output_embeddings()
        if head is not None:
            head.forward = lambda x: x  # logits are not wanted, and its weights need not move or be f32
        try:
            model(tokens.to(self.device), use_cache=False)
        finally:
            for block in blocks:
                del block.forward
            if head is not None:
                del head.forward
        if len(calls) != len(blocks):
            raise UnsupportedError(
                f"{type(model).__name__} ran {len(calls)} of its {len(blocks)} blocks in turn; its layout is unknown"
            )
        return calls


def _split(kwargs: dict, args: tuple):
    kwargs = dict(kwargs)
    hidden = args[0] if args else kwargs.pop("hidden_states")
    return hidden, args[1:], kwargs


def _float_outside(model, blocks: nn.ModuleList, device: torch.device) -> None:
    """Casts everything but the blocks and the output head to f32 and moves it to the device."""
    inside = {id(tensor) for tensor in blocks.parameters()} | {id(tensor) for tensor in blocks.buffers()}
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        inside |= {id(tensor) for tensor in head.parameters()}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in inside:
            floating = tensor.is_floating_point()
            tensor.data = tensor.data.to(device=device, dtype=torch.float32 if floating else tensor.dtype)
