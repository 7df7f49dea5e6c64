"""The stages that go block by block: one-shot, and BQPO, which starts from it.

Blocks run one at a time, so memory holds the model as it is stored, one block with its Hessians and optimiser
state, and the calibration samples' activations (on the CPU).
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

import numpy as np
import torch
from gqsa_runtime.errors import GqsaError

from gqsac.compress.blocks import BlockRunner, linears_of
from gqsac.compress.bqpo import BlockTrainer
from gqsac.compress.hessian import collect_hessians
from gqsac.compress.one_shot import quantize_block, siblings_of
from gqsac.compress.options import Options
from gqsac.compress.partial import PartialFolder
from gqsac.compress.store import MASTER_TENSORS, load_linears, stored_block, to_matrix, to_numpy
from gqsac.compress.trainable import autocast, install


@dataclass
class BlockwiseStage:
    """One pass over all blocks. name: "one-shot", "bqpo", or "start" (see `_Run._blockwise` in run.py).

    rates: full path of each linear -> share of its units to remove. row_bits: full path -> widths, uint8 [rows].
    keep_master: also store what a distillation
    stage goes on from. seconds: of training at most, for all blocks, or None.
    """

    name: str
    model: object
    block_path: str
    blocks: torch.nn.ModuleList
    tokens: torch.Tensor
    rates: dict[str, float]
    row_bits: dict[str, torch.Tensor]
    dense: list[str]
    options: Options
    device: torch.device
    partial: PartialFolder
    keep_master: bool
    seconds: float | None

    def run(self, on_block=lambda index, note: None) -> list[dict]:
        """Compresses every block that is not finished yet. Per block: what the report says of it.

        "block_seconds" and, of them, "pass_seconds", in which the samples pass through the block, are of this run;
        "seconds" are of the training, in whichever run it was. Raises errors that begin with the block's name.
        """
        trains = self.name == "bqpo"
        runner = BlockRunner(self.model, self.blocks, self.tokens, self.device, trains, self.partial.path)
        facts = []
        for index, block in enumerate(self.blocks):
            name = f"{self.block_path}.{index}"
            began, self._pass_seconds = time.monotonic(), 0.0
            block.float().to(self.device)
            linears = linears_of(block, name, self.options.skip)
            stored = self.partial.load_block(self.name, index)
            fact = self.partial.load_json(f"{self.name}-{index:05d}")
            if self.keep_master and self.partial.load_block(f"{self.name}-master", index) is None:
                stored = None
            if stored is None or fact is None:
                try:
                    stored, fact = self._compress(runner, index, block, linears)
                except GqsaError as error:
                    raise type(error)(f"{name}: {error}") from error
                fact["resumed"] = False
            else:
                fact["resumed"] = True
                if trains:
                    with self._passing(), autocast(self.device):
                        runner.run_reference(index, block)
            facts.append(fact)
            load_linears(name, linears, stored, self.options)
            if index + 1 < len(self.blocks):
                with self._passing():
                    runner.run(index, block, keep=True)
                runner.check(name)
            block.to("meta")  # its memory is not needed any more
            fact["block_seconds"] = round(time.monotonic() - began, 3)
            fact["pass_seconds"] = round(self._pass_seconds, 3)
            on_block(index, f"error {fact['after']:.4f}" if trains else "")
        return facts

    @contextlib.contextmanager
    def _passing(self):
        began = time.monotonic()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._pass_seconds += time.monotonic() - began

    def _compress(self, runner, index, block, linears) -> tuple[dict[str, np.ndarray], dict]:
        name, options = f"{self.block_path}.{index}", self.options
        with self._passing():
            hessians = collect_hessians(linears, lambda: runner.run(index, block, keep=False), runner.large)
        siblings = siblings_of(hessians, options)
        del hessians
        rates = {path: self.rates[f"{name}.{path}"] for path in linears}
        row_bits = {path: self.row_bits[f"{name}.{path}"] for path in linears}
        fact = {"block": name}
        if self.name == "bqpo":
            with self._passing(), autocast(self.device):
                runner.run_reference(index, block)
            trainer = BlockTrainer(index, block, linears, runner, siblings, rates, row_bits, options)
            result = trainer.train(None if self.seconds is None else self.seconds / len(self.blocks))
            install(block, linears)  # the plain ones again, for the stored weights
            quantized = result.linears
            fact |= {
                "before": result.before,
                "after": result.after,
                "kept": result.kept,
                "epochs": result.epochs,
                "seconds": round(result.seconds, 2),
                "curve": [round(loss, 6) for loss in result.curve],
                "rates": list(options.rates("bqpo")),
            }
        else:
            weights = {path: linear.weight.detach() for path, linear in linears.items()}
            quantized = quantize_block(weights, siblings, rates, row_bits, options)
        matrices = {path: to_matrix(quantized[path], options.group_size) for path in linears}
        stored = stored_block(name, block, matrices, self.dense)
        if self.keep_master:
            master = {}
            for path, part in quantized.items():
                for tensor in MASTER_TENSORS:
                    master[f"{name}.{path}.{tensor}"] = to_numpy(getattr(part, tensor))
            self.partial.save_block(f"{self.name}-master", index, master)
        self.partial.save_json(f"{self.name}-{index:05d}", fact)
        self.partial.save_block(self.name, index, stored)
        return stored, fact
