"""Compresses a model: its stages in order, then the checkpoint. `compress` is the table of contents of the method.

    one-shot   block by block: Hessian, saliency, select, quantise; no training
    bqpo       block by block: weights, scales, zeros and masks learn each block's outputs (starts from one-shot)
    distill    end to end: everything learns the uncompressed model's distribution (not in the paper)
    e2e-oqp    end to end: scales learn the language-model loss

GQSA: arXiv 2412.17560. What every stage has finished is kept in OUT.partial, so that a run can go on after a kill.
"""

from __future__ import annotations

import copy
import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import gqsac
from gqsac.compress.allot_widths import Allotment
from gqsac.compress.blocks import find_blocks
from gqsac.compress.blockwise import BlockwiseStage
from gqsac.compress.calibrate import BUILT_IN
from gqsac.compress.compiled import compiles
from gqsac.compress.end_to_end import state_file, train
from gqsac.compress.failures import LOADING, explained
from gqsac.compress.measure import measured
from gqsac.compress.memory import check_loading, check_memory
from gqsac.compress.options import Options, checked, target_in_words, with_scale_groups
from gqsac.compress.partial import PartialFolder, refuse_existing
from gqsac.compress.prepare import choose_device, compressed_shapes, sample_length, source_tokens
from gqsac.compress.progress import Meter, block_bar, step_bar
from gqsac.compress.report import rounded_in_words, sizes, stored_counts, write_report
from gqsac.compress.self_text import PREFIX, mixed, own_samples, sampled_windows, tokens_asked_for
from gqsac.compress.sensitivity import allocate
from gqsac.compress.store import dense_names, from_stored, load_dense, load_linears, to_numpy
from gqsac.compress.tune import UNCOMPRESSED, prepare_training, store_trained
from gqsac.compress.world import World
from gqsac.compress.write import ShardWriter, dense_tensor, write_json
from gqsac.quantization_config import FORMAT_VERSION, QuantizationConfig
from gqsac.source import Source, load_source

_COPIED_BELOW = 1 << 30  # parameters
_BATCH_TOKENS = {"cuda": 16384, "cpu": 2048}


def compress(
    src,
    out,
    *,
    calibration=None,
    device: str = "auto",
    progress: bool = True,
    after_stage: Callable | None = None,
    own_text: str | Path | None = None,
    **options,
) -> dict:
    """Writes the compressed checkpoint of `src` to the folder `out` and returns a report for people and tools.

    src: model folder, hub id or .gguf file, or a gqsac.source.Source, which is left as it is.
    calibration: UTF-8 text file or files, None for the built-in text; "self:200k" among them asks for so many tokens
    that the model writes itself, see self_text.py.
    device: "auto", "cpu", "cuda". progress: show it on stderr: bars on a terminal, otherwise a line a minute at most.
    after_stage: called with a stage's name and a function that makes the dequantised model (f32, on the CPU) as that
    stage left it. own_text: a folder in which the text that the model writes is kept for other runs. The options, see
    compress/options.py for the defaults:

    Without any of bits, sparsity, pattern, group sizes, allocation, removal and targets: target_bpw 4.5.
    bits: 2, 3, 4 or 8 (symmetric); otherwise 4 by default. target_bpw: in their place, bits per weight of the
    compressed linears as `gqsac build` counts them (compiler/stacks.py), at most: widths are chosen row by row and
    nothing is removed. target_size, target_memory: the same in bytes: of the whole file that `gqsac build` writes, or
    of the memory that a run needs at `context` positions (by default 4096 or the model's), head, embeddings, scales,
    norms, kernels and KV cache counted. targets: of that build, by default all that it has by default.
    widths: that rows may then have, some of 1, 2, 3, 4, 8. group_size: 8, 16, 32, 64 or 128 columns that are removed
    together. quant_group_size: columns that share a scale and a zero, a multiple of group_size. sparsity: share of all
    groups to remove, 0 to below 1. pattern: "1xG", or "2:4" for two of every four weights. allocation: "row", "layer"
    or "global", see select.py; by default "global" with training, else "row". removal: "at-once", training keeps the
    mask that one-shot chose, or "gradual", training removes groups itself and chooses them anew; by default gradual
    in a distill that no bqpo precedes. skip: patterns of linears to leave dense, such as "down_proj" or
    "model.layers.0.*"; output head and embeddings always stay dense. damping: added to the Hessian's diagonal,
    relative to its mean.
    samples, seq_len: how many windows of how many tokens (1024, or the model's context if shorter) calibrate and
    train blocks. stages: some of "one-shot", "bqpo", "distill", "e2e-oqp", in that order. epochs: of BQPO.
    e2e_steps: of every end-to-end stage or, in a tuple, of each; by default two epochs. minutes: of training at most,
    of every training stage or, in a tuple, of each.
    train_samples: windows for the end-to-end stages. batch_tokens: tokens a step there. distill: share of
    distillation in the loss of E2E-OQP. master_dtype: "float32", or "bfloat16" for half the memory, of the weights that
    learn in bqpo and distill. weight_lr, scale_lr: learning rates in place of options.RATES.

    A run that was stopped goes on where it was when called again with the same arguments, and makes the same
    weights; with `minutes` they depend on the machine's speed. Of several processes that torchrun has started, see
    world.py, the first returns the report and the others an empty one. Raises InputError, ModelError and their kin.
    """
    unknown = set(options) - set(Options.__dataclass_fields__)
    if unknown:
        raise TypeError(f"compress() has no option {sorted(unknown)[0]!r}")
    chosen = checked(Options(**{key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}))
    out = Path(out)
    refuse_existing(out)
    texts = [calibration] if isinstance(calibration, (str, Path)) else list(calibration or [])
    where, run = choose_device(device), None
    world = World.of(where)
    where = world.device(where)
    world.check(chosen)
    if not isinstance(src, Source):
        check_loading(src)
    try:
        run = _Run(src, out, texts, chosen, where, progress, after_stage, own_text, world)
        return run.all()
    except (RuntimeError, MemoryError) as error:
        if run is None:
            failure = explained(error, LOADING, chosen)
        else:
            failure = explained(error, run.stage, run.options, run.begun)
        if failure is None:
            raise
        raise failure from error
    finally:
        if run is not None:
            run.close()


class _Run:
    """One compression, from the source to the finished folder."""

    def __init__(
        self, src, out, texts, options: Options, device, progress, after_stage=None, own_text=None, world=World()
    ):
        self._src, self._out, self._options, self._device = src, out, options, device
        self._progress, self._after_stage = progress, after_stage
        self._world = world
        if world.rank > 0:
            self._progress, self._after_stage = False, None
        self._own_text = None if own_text is None else Path(own_text)
        self._started = time.monotonic()
        files, self._own_tokens = tokens_asked_for(texts)
        names = [f"{PREFIX}{self._own_tokens:,} tokens"] * bool(self._own_tokens) + [Path(file).name for file in files]
        self._described = ", ".join(names) or BUILT_IN
        source = src if isinstance(src, Source) else load_source(src)
        self._parameters = sum(parameter.numel() for parameter in source.model.parameters())
        small = self._parameters < _COPIED_BELOW
        self._original = source.model if small or isinstance(src, Source) else None
        self._source, self._model = source, copy.deepcopy(source.model) if self._original else source.model
        self._block_path, blocks = find_blocks(source.model)
        self._count = len(blocks)
        self._shapes = compressed_shapes(source, self._block_path, blocks, options)
        options = self._options = with_scale_groups(options, (columns for _, columns in self._shapes.values()))
        self._allotment = None
        if options.by_rows:
            self._allotment = Allotment.of(source, self._shapes, options, progress)
            options = self._options = replace(options, target_bpw=self._allotment.target)
        seq_len = sample_length(source, options.seq_len)
        trains = bool(options.end_to_end) and options.train_samples != options.samples
        wanted = {"calibration": options.samples} | ({"training": options.train_samples} if trains else {})
        own = self._own = own_samples(wanted, self._own_tokens, seq_len, bool(files))
        read = self._read = {
            purpose: source_tokens(source, files, count - own[purpose], seq_len, options.seed, purpose)
            for purpose, count in wanted.items()
            if count > own[purpose]
        }
        self._batch_tokens = options.batch_tokens or _BATCH_TOKENS[device.type]
        # As this machine and model complete them, and the stage under way: for what is said of failures.
        self.options = replace(options, seq_len=seq_len, batch_tokens=self._batch_tokens)
        self.stage = "calibration"
        check_memory(source.model, self._block_path, self._shapes, self.options, device, out)
        self._identity = options.identity() | {
            "seq_len": seq_len,
            "batch_tokens": self._batch_tokens,
            "calibration": self._described,
        }
        digests = {"tokens": _digest(read, "calibration"), "train_tokens": _digest(read, *wanted)}
        if self._own_tokens:
            digests["own_samples"] = max(own.values())
        identity = {"model": source.fingerprint(), **digests, "gqsac": gqsac.__version__, **self._identity}
        identity["format_version"] = FORMAT_VERSION  # finished blocks are kept as the checkpoint stores them
        self._dense = dense_names(source.model)
        self._stages: dict[str, dict] = {}  # name -> facts for the report
        with world.first_alone():
            self._partial = PartialFolder(out, identity, follows=world.rank > 0)

    def close(self) -> None:
        """Lets another run go on with what this one left."""
        self._partial.close()

    def _fresh_model(self):
        """The uncompressed model, anew; large ones are read again rather than held twice."""
        return load_source(self._src).model if self._original is None else copy.deepcopy(self._original)

    @property
    def begun(self) -> bool:
        """Whether the stage under way has saved a state to go on from."""
        return self._partial.checkpoint(self.stage).exists()

    def all(self) -> dict:
        """The samples, every stage, then the checkpoint. The report."""
        if self._progress:
            print(f"target: {target_in_words(self._options)}", file=sys.stderr, flush=True)
            if self._source.rounded:
                print(f"warning: {rounded_in_words(self._source.rounded)}", file=sys.stderr, flush=True)
        with self._world.first_alone():
            self._tokens, self._train_tokens = self._samples()
        with self._world.first_alone():
            last = self._blockwise()
        for stage in self._options.training:
            if stage != "bqpo":
                last = self._end_to_end(stage, last)
        return self._write(last) if self._world.rank == 0 else {}

    def _samples(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens to calibrate and to train on end to end, int64 [samples, seq_len] each."""
        windows = self._read
        if self._own_tokens:
            self.stage, meter = "sampling", Meter(self._device)
            count = max(self._own.values())
            if self._own_text is not None:  # all that was asked for, whatever this run needs
                count = max(count, -(-self._own_tokens // self.options.seq_len))
            written = sampled_windows(
                self._source, self._fresh_model, count, self.options.seq_len, self._options.seed,
                self._device, self._partial, self._own_text, self._progress,
            )  # fmt: skip
            windows = {
                purpose: mixed(written[:count], self._read.get(purpose), self._options.seed)
                for purpose, count in self._own.items()
            }
            self._stages["sampling"] = meter.facts()
        return windows["calibration"], windows.get("training", windows["calibration"])

    def _blockwise(self) -> str:
        """Runs the stage that goes block by block. Its name: "start" is a one-shot pass that removes nothing,
        from which `distill` begins, since it removes groups itself. UNCOMPRESSED where there is none: from widths that
        `distill` brings down, it begins with the weights as they are."""
        training = self._options.training
        starts_dense = training[:1] == ("distill",) and self._options.removes_gradually("distill")
        name = "bqpo" if "bqpo" in training else "start" if starts_dense else "one-shot"
        self.stage = "allocation"
        rates = self._rates() if name != "start" else dict.fromkeys(self._shapes, 0.0)
        row_bits = self._row_bits(falling=name == "start")
        if name == "start" and self._allotment is not None and self._allotment.falls:
            self._model.get_submodule(self._block_path).to("meta")  # its memory is not needed any more
            return UNCOMPRESSED
        self.stage = "one-shot" if name == "start" else name
        if self._world.rank > 0:
            return name  # the first process has done it
        meter = Meter(self._device)
        stage = BlockwiseStage(
            name=name,
            model=self._model,
            block_path=self._block_path,
            blocks=self._model.get_submodule(self._block_path),
            tokens=torch.from_numpy(self._tokens),
            rates=rates,
            row_bits=row_bits,
            dense=self._dense,
            options=self._options,
            device=self._device,
            partial=self._partial,
            keep_master="distill" in training,
            seconds=self._options.seconds(name) if name == "bqpo" else None,
        )
        with block_bar(f"{name} (calibrating on {self._described})", self._count, self._progress, meter) as on_block:
            facts = stage.run(on_block)
        self._finish(name, {"blocks": facts, **meter.facts()})
        return name

    def _rates(self) -> dict[str, float]:
        """Share of the units to remove of each linear."""
        if self._options.allocation != "global" or self._options.sparsity == 0:
            return dict.fromkeys(self._shapes, self._options.sparsity)
        known = self._partial.load_json("allocation")
        if known is None:
            meter, model = Meter(self._device), self._fresh_model()
            blocks, tokens = model.get_submodule(self._block_path), torch.from_numpy(self._tokens)
            rates = allocate(model, blocks, list(self._shapes), tokens, self._options, self._device)
            known = {"rates": rates, **meter.facts()}
            self._partial.save_json("allocation", known)
        self._stages["allocation"] = {key: value for key, value in known.items() if key != "rates"}
        return known["rates"]

    def _row_bits(self, falling: bool) -> dict[str, torch.Tensor]:
        """Widths of each linear's rows, uint8 [rows]. falling: whether a training is to bring them down."""
        if self._allotment is None:
            return {
                path: torch.full((rows,), self._options.bits, dtype=torch.uint8)
                for path, (rows, _) in self._shapes.items()
            }
        self.stage, meter = "sensitivities", Meter(self._device)
        self._allotment.measure(
            self._fresh_model, self._block_path, torch.from_numpy(self._tokens), self._options, self._device,
            self._partial, self._progress,
        )  # fmt: skip
        self._stages["sensitivities"] = meter.facts()
        self._options = replace(self._options, target_bpw=self._allotment.target)  # learning rates follow
        return self._allotment.row_bits(falling)

    def _end_to_end(self, stage: str, previous: str) -> str:
        self.stage = stage
        facts = self._partial.load_json(f"{stage}-facts")
        if facts is None:
            meter = Meter(self._device)
            training = prepare_training(
                stage, previous, self._fresh_model(), self._block_path, self._train_tokens, self._options,
                self._device, self._partial, self._batch_tokens, self._allotment, self._world,
            )  # fmt: skip
            with step_bar(stage, training.steps, self._progress, meter) as on_read:
                clock = train(training, self._partial.checkpoint(stage), on_read)
            store_trained(training, self._block_path, self._dense, self._options, self._partial)
            facts = {
                "curve": training.history,
                "steps": training.history[-1][0],
                "tokens_per_step": training.batch * self._train_tokens.shape[1],
                "train_seconds": round(clock.spent_s, 2),
                "choosing_seconds": round(training.choosing_s, 2),
                "captured": training.captured is not None and bool(training.captured.graph),
                "rates": list(self._options.rates(stage)),
                "processes": self._world.size,
                **meter.facts(),
            }
            self._partial.save_json(f"{stage}-facts", facts)
            state_file(self._partial.checkpoint(stage), self._world).unlink(missing_ok=True)
        self._finish(stage, facts)
        return stage

    def _finish(self, stage: str, facts: dict) -> None:
        self._stages[stage] = facts
        if self._after_stage is not None:
            self._after_stage(stage, lambda: self._dequantised(stage))

    def _dequantised(self, stage: str):
        """The model in f32 on the CPU as a stage has left it."""
        model = self._fresh_model().float()
        blocks = model.get_submodule(self._block_path)
        for index in range(self._count):
            stored, name = self._partial.load_block(stage, index), f"{self._block_path}.{index}"
            paths = [path[len(name) + 1 :] for path in self._shapes if path.startswith(f"{name}.")]
            linears = {path: blocks[index].get_submodule(path) for path in paths}
            load_linears(name, linears, stored, self._options)
            load_dense(model, stored)
        load_dense(model, self._outside(stage))
        return model

    def _outside(self, stage: str) -> dict[str, np.ndarray]:
        """Tensors outside the blocks as the last stage up to `stage` that trains them has left them."""
        found = None
        if stage in ("distill", "e2e-oqp"):
            found = self._partial.load_block(f"{stage}-outside", 0)
        return found or {}

    def _write(self, last: str) -> dict:
        """The checkpoint folder with its report, whole or not at all."""
        options = self._options
        folder = self._partial.new_model_folder()
        writer = ShardWriter(folder)
        outside = self._outside(last)
        state = self._model.state_dict()  # the blocks are on meta by now, the rest is as it was
        for name in self._dense:
            if not name.startswith(f"{self._block_path}."):
                tensor = outside[name] if name in outside else dense_tensor(name, to_numpy(state[name]))
                writer.add({name: tensor})
        counts = {}
        for index in range(self._count):
            stored, prefix = self._partial.load_block(last, index), f"{self._block_path}.{index}."
            writer.add(stored)
            for path, shape in self._shapes.items():
                if path.startswith(prefix):
                    counts[path] = stored_counts(from_stored(path, stored, shape, options))
        writer.finish()
        facts = sizes(self._shapes, counts, options, self._allotment)
        if self._allotment is not None:
            facts |= self._reached({path: count.row_bits for path, count in counts.items()})
        config = QuantizationConfig(
            bits=options.bits if self._allotment is None else facts["mean_width"],
            group_size=options.group_size,
            quant_group_size=options.quant_group_size,
            sparsity=options.sparsity,
            skip=options.skip,
            shapes=self._shapes,
            details={"name": self._source.name, "gqsac": gqsac.__version__, **_details(self._identity)},
        )
        quality = None
        if self._original is not None:
            compressed = partial(self._dequantised, last)
            quality = measured(compressed, self._fresh_model, self._parameters, self._tokens, self._device)
        write_json(folder / "config.json", {**self._source.config, "quantization_config": config.to_dict()})
        for name, content in self._source.files.items():
            (folder / name).write_bytes(content)
        report = {
            "out": str(self._out),
            "model": self._source.name,
            **facts,
            "measured": quality,
            "rounded_before": self._source.rounded,
            "bytes": sum(file.stat().st_size for file in folder.iterdir()),
            "calibration": f"{self._described}: {self._tokens.shape[0]} samples of {self._tokens.shape[1]} tokens",
            "resumed_blocks": sum(
                fact["resumed"] for facts in self._stages.values() for fact in facts.get("blocks", ())
            ),
            "seconds": round(time.monotonic() - self._started, 1),
            "device": str(self._device),
            "compiled": compiles(self._device),
            "options": self._identity,
            "stages": self._stages,
        }
        write_report(folder, report)
        self._partial.publish(folder)
        return report

    def _reached(self, row_bits: dict[str, np.ndarray]) -> dict:
        """For the report: what a goal in bytes came to, and a sentence where a target was missed, which is told too."""
        goal, reached, facts = self._allotment.goal, self._allotment.reached(row_bits), {}
        missed = self._allotment.missed(reached)
        if goal is not None:
            facts = {goal.key: reached, "counted": goal.words}
        if missed is None:
            return facts
        if self._progress:
            print(f"warning: {missed}", file=sys.stderr, flush=True)
        return facts | {"target_missed": missed}


def _details(identity: dict) -> dict:
    """What config.json says of how a checkpoint was made, besides what stands elsewhere in it."""
    elsewhere = ("bits", "group_size", "quant_group_size", "sparsity", "skip")
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in identity.items()
        if key not in elsewhere and value is not None
    }


def _digest(read: dict[str, np.ndarray], *purposes: str) -> str:
    """Of the tokens read for the last of these purposes for which any were."""
    tokens = next((read[purpose].tobytes() for purpose in reversed(purposes) if purpose in read), b"")
    return hashlib.sha256(tokens).hexdigest()[:16]
