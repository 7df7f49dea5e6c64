"""What BQPO and E2E-OQP cost on a large model: peak memory and seconds, measured on a few layers, and for the paper's.

    python benchmarks/training_cost.py --shape llama-7b --layers 6 --samples 80 --seq-len 2048 -o cost.json
    python benchmarks/training_cost.py --shape llama-7b --memory-cap-gb 24 -o cost.json

Makes a model of that shape with random bf16 weights, in memory, and compresses it (W4, half of the groups of 16
removed) on random tokens. Prints seconds and peak memory of each stage, and what follows for the whole model and the
paper's 4096 samples of 2048 tokens, each with its formula; -o keeps all of it as JSON. With --memory-cap-gb the GPU
gives no more than that. A run that does not fit says so, exits with 1, and still reports what it got to.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from gqsa_runtime.errors import GqsaError, InputError

from gqsac.compress import blockwise, bqpo, end_to_end, run, sensitivity
from gqsac.compress.blocks import BlockRunner, find_blocks
from gqsac.compress.prepare import choose_device
from gqsac.compress.progress import resident_gib
from gqsac.compress.trainable import is_large
from gqsac.source import Source

GIB = 1 << 30
GROUP_SIZE = 16
PAPER_TOKENS = 4096 * 2048
PAPER_EPOCHS = (5, 2)  # of BQPO: the paper's, and what early stopping often leaves
E2E_EPOCHS = 2
CARD_GB = 24


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama. layers: of the whole model. context: the longest sample."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int


SHAPES = {
    "llama-7b": Shape(4096, 11008, 32, 32, 32, 32000, 2048),
    "llama-13b": Shape(5120, 13824, 40, 40, 40, 32000, 2048),
    "llama-3-8b": Shape(4096, 14336, 32, 32, 8, 128256, 8192),
    "tiny": Shape(64, 96, 8, 4, 2, 300, 64),
}


def make_source(shape: Shape, layers: int, device: torch.device, seed: int = 0) -> Source:
    """A random bf16 Llama with a tokenizer that knows the numbers below the vocabulary, separated by spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "num_hidden_layers": layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.context, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(seed)
    options = {key: value for key, value in config.items() if key not in ("model_type", "dtype")}
    with torch.device(device):  # transformers' own start, deviation 0.02: a GPU draws 7B weights in a second
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **options), dtype=torch.bfloat16)
    numbers = {str(number): number for number in range(shape.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Source("random", model.to("cpu").eval(), config, {"tokenizer.json": tokenizer.to_str().encode()})


def random_text(shape: Shape, tokens: int, seed: int = 0) -> str:
    """Text of so many random tokens of `make_source`'s tokenizer."""
    return " ".join(map(str, np.random.default_rng(seed).integers(0, shape.vocabulary, tokens).tolist()))


@dataclass
class Costs:
    """What was measured. Seconds, and GPU memory in bytes (0 on a CPU).

    blocks: of each block of BQPO: "seconds" in all, of it "passes" (samples through the block: time grows with the
    samples), "training" (grows with samples and epochs), "inverses", "one-shot" and "packing" (both constant),
    "epochs", "batch" (samples a step), "allocated" and "reserved". stages: name -> facts of the report and peaks.
    state_bytes: of one token's activations, inputs and targets. step_starts: of E2E-OQP, seconds. scoring,
    choosing: peaks of the two halves of `--allocation global`; end_to_end: of the student: bytes, see `extrapolated`.
    """

    blocks: list[dict] = field(default_factory=list)
    stages: dict[str, dict] = field(default_factory=dict)
    state_bytes: int = 0
    step_starts: list[float] = field(default_factory=list)
    scoring: dict = field(default_factory=dict)
    choosing: dict = field(default_factory=dict)
    end_to_end: dict = field(default_factory=dict)


class Recorder:
    """Fills `costs` while `gqsac.compress.run.compress` runs inside `watching`."""

    def __init__(self, device: torch.device):
        self.costs, self._device, self._parts = Costs(), device, {}

    @contextlib.contextmanager
    def watching(self):
        """Puts clocks around the steps of the blockwise stage and the stages themselves."""
        with contextlib.ExitStack() as stack:

            def wrap(owner, name: str, wrapper) -> None:
                wrapped = functools.partial(wrapper, getattr(owner, name))
                function = wrapped if not isinstance(owner, type) else lambda *a, **k: wrapped(*a, **k)  # a method
                stack.enter_context(mock.patch.object(owner, name, function))

            def clock(owner, name: str, part: str) -> None:
                wrap(owner, name, functools.partial(self._timed, part))

            clock(BlockRunner, "check", "passes")
            clock(blockwise, "siblings_of", "inverses")
            clock(bqpo, "quantize_block", "one-shot")
            clock(blockwise, "quantize_block", "one-shot")
            clock(blockwise, "to_stream", "packing")
            clock(blockwise, "stored_block", "packing")
            clock(blockwise, "load_linears", "packing")
            wrap(BlockRunner, "_pass", self._on_pass)
            wrap(bqpo.BlockTrainer, "train", self._on_train)
            wrap(run, "block_bar", self._on_block_bar)
            wrap(run, "allocate", self._on_allocate)
            wrap(sensitivity, "group_scores", self._on_group_scores)
            wrap(run, "prepare_training", self._on_prepare)
            wrap(end_to_end, "_step", self._on_step)
            wrap(run, "Meter", self._on_meter)
            wrap(run._Run, "_finish", self._on_finish)
            yield self

    def peaks(self) -> dict:
        """Bytes that were allocated and reserved on the GPU at most since the last reset."""
        if self._device.type != "cuda":
            return {"allocated": 0, "reserved": 0}
        return {
            "allocated": torch.cuda.max_memory_allocated(self._device),
            "reserved": torch.cuda.max_memory_reserved(self._device),
        }

    def _reset_peaks(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # so that what is reserved is this stage's
            torch.cuda.reset_peak_memory_stats(self._device)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _timed(self, part, function, *args, **kwargs):
        began = self._now()
        result = function(*args, **kwargs)
        self._parts[part] = self._parts.get(part, 0.0) + self._now() - began
        return result

    def _on_pass(self, function, runner, index, block, states, *args):
        streams = 1 if runner.reference is None else 2
        self.costs.state_bytes = streams * states.shape[-1] * states.element_size()
        return self._timed("passes", function, runner, index, block, states, *args)

    def _on_train(self, function, trainer, *args):
        result = function(trainer, *args)
        self._parts |= {"training": result.seconds, "epochs": result.epochs, "batch": trainer._batch}
        return result

    @contextlib.contextmanager
    def _on_block_bar(self, function, *args):
        with function(*args) as on_block:
            began = self._now()

            def ended(index, note):
                nonlocal began
                now = self._now()
                self.costs.blocks.append({"seconds": now - began, **self._parts, **self.peaks()})
                began, self._parts = now, {}
                on_block(index, note)

            yield ended

    def _on_allocate(self, function, *args):
        self._reset_peaks()
        began = self._now()
        result = function(*args)
        self.costs.choosing = self.peaks()
        both = {key: max(value, self.costs.scoring[key]) for key, value in self.costs.choosing.items()}
        facts = {"seconds": self._now() - began, "peak_gib": resident_gib(), **both}
        self.costs.stages["allocation"] = facts
        return result

    def _on_group_scores(self, function, model, paths, tokens, group_size):
        result = function(model, paths, tokens, group_size)
        block, outside = held_bytes(model, self._device)
        scores = sum(score.nbytes for score in result.values()) // len(find_blocks(model)[1])
        embedding = model.get_input_embeddings().weight
        saved = tokens.shape[1] * embedding.shape[1] * embedding.element_size()
        self.costs.scoring = {**self.peaks(), "per_layer": block + scores + saved, "outside": outside}
        self._reset_peaks()
        return result

    def _on_prepare(self, function, *args):
        training = function(*args)
        block, outside = held_bytes(training.student, self._device, per_trained=4)  # gradient, two moments
        facts = self.costs.end_to_end
        facts |= {"block": block, "outside": outside, "saved": 0}

        def see(module, inputs, output):
            facts["saved"] = max(facts["saved"], output.nbytes)  # what a recomputed block keeps: its input

        training.student.get_input_embeddings().register_forward_hook(see)
        return training

    def _on_step(self, function, *args):
        self.costs.step_starts.append(self._now())
        return function(*args)

    def _on_meter(self, meter, device):
        self._reset_peaks()
        return meter(device)

    def _on_finish(self, function, running, stage, facts):
        kept = {key: value for key, value in facts.items() if key not in ("blocks", "curve")}
        self.costs.stages[stage] = {**kept, **self.peaks()}
        function(running, stage, facts)


def held_bytes(model, device: torch.device, per_trained: int = 1) -> tuple[int, int]:
    """Bytes on the device of one block, and of all outside the blocks; trained parameters count so many times."""

    def held(module) -> int:
        tensors = [(tensor, 1) for tensor in module.buffers()]
        tensors += [(tensor, per_trained if tensor.requires_grad else 1) for tensor in module.parameters()]
        return sum(tensor.nbytes * times for tensor, times in tensors if tensor.device.type == device.type)

    blocks = find_blocks(model)[1]
    return held(blocks[0]), held(model) - sum(held(block) for block in blocks)


def typical(blocks: list[dict], key: str) -> float:
    """Median over the blocks but the first, which compiles and warms up."""
    return statistics.median(block.get(key, 0.0) for block in blocks[1:] or blocks)


def block_seconds(blocks: list[dict], measured: int, tokens: int, epochs: int) -> float:
    """Seconds of BQPO for a block on `tokens` tokens. blocks: see `Costs`, on `measured` tokens."""
    passes, training = typical(blocks, "passes"), training_per_epoch(blocks)
    constant = typical(blocks, "seconds") - passes - typical(blocks, "training")
    return constant + (passes + epochs * training) * tokens / measured


def training_per_epoch(blocks: list[dict]) -> float:
    """Seconds of one epoch of a block's training."""
    return statistics.median(block["training"] / block["epochs"] for block in blocks[1:] or blocks)


def step_seconds(step: float, shape: Shape, layers: int) -> float:
    """Seconds of a step with all layers of the shape, when it took `step` with `layers`.

    A block's weights are multiplied with four times (forward, again when it is recomputed, and for two gradients),
    those of the head, which does not learn, twice.
    """
    block = 2 * shape.hidden * shape.hidden * (1 + shape.kv_heads / shape.heads)
    block += 3 * shape.hidden * shape.intermediate
    head = shape.hidden * shape.vocabulary
    share = 4 * layers * block / (4 * layers * block + 2 * head)
    return step * (1 - share + share * shape.layers / layers)


def extrapolated(costs: Costs, shape: Shape, layers: int, tokens: int) -> list[dict]:
    """What the whole model costs on PAPER_TOKENS: {"what", "value", "unit", "formula"} each. tokens: measured on."""
    lines, more = [], shape.layers - layers

    def line(what, value, unit, formula) -> None:
        lines.append({"what": what, "value": round(value, 3), "unit": unit, "formula": formula})

    if costs.choosing.get("allocated"):  # on a CPU there is nothing to say of a GPU
        scoring, choosing = costs.scoring, costs.choosing
        peak = (scoring["allocated"] + more * scoring["per_layer"]) / GIB
        line("allocation, scores: GPU", peak, "GiB",
             f"{scoring['allocated'] / GIB:.2f} + {more} more layers x {scoring['per_layer'] / GIB:.3f} "
             "(bf16 weights, scores, saved input)")  # fmt: skip
        outside = scoring["outside"]
        peak = (outside + (choosing["allocated"] - outside) * shape.layers / layers) / GIB
        line("allocation, choice: GPU", peak, "GiB",
             f"{outside / GIB:.2f} outside the blocks + ({choosing['allocated'] / GIB:.2f} - {outside / GIB:.2f}) "
             f"x {shape.layers}/{layers} layers")  # fmt: skip
    if costs.blocks and "training" in costs.blocks[-1]:
        blocks = costs.blocks
        passes, training = typical(blocks, "passes"), training_per_epoch(blocks)
        constant = typical(blocks, "seconds") - passes - typical(blocks, "training")
        for epochs in PAPER_EPOCHS:
            hours = shape.layers * block_seconds(blocks, tokens, PAPER_TOKENS, epochs) / 3600
            line(f"bqpo, {epochs} epochs: time", hours, "h",
                 f"{shape.layers} blocks x ({constant:.2f} s constant + ({passes:.2f} s passes + {epochs} x "
                 f"{training:.2f} s) x {PAPER_TOKENS}/{tokens} tokens)")  # fmt: skip
        if blocks[-1]["allocated"]:
            line("bqpo: GPU", max(block["allocated"] for block in blocks) / GIB, "GiB",
                 f"as measured: one block at a time, steps of {blocks[-1]['batch']} samples")  # fmt: skip
        state = PAPER_TOKENS * costs.state_bytes
        line("bqpo: activations of all samples, RAM or disk", state / GIB, "GiB",
             f"{PAPER_TOKENS} tokens x {costs.state_bytes} B (inputs and targets, {costs.state_bytes // shape.hidden} "
             f"B for each of {shape.hidden} numbers)")  # fmt: skip
        for epochs in PAPER_EPOCHS:
            line(f"bqpo, {epochs} epochs: activations read and written", shape.layers * (2.5 + epochs) * state / GIB,
                 "GiB", f"{shape.layers} blocks x {state / GIB:.1f} GiB x (0.5 Hessians + 1 targets + 1 outputs + "
                 f"{epochs} epochs); what it costs if they are on disk")  # fmt: skip
    steps = np.diff(costs.step_starts)
    if len(steps) and "e2e-oqp" in costs.stages:
        facts, parts = costs.stages["e2e-oqp"], costs.end_to_end
        step, count = float(np.median(steps)), E2E_EPOCHS * PAPER_TOKENS / facts["tokens_per_step"]
        whole = step_seconds(step, shape, layers)
        line("e2e-oqp: time", count * whole / 3600, "h",
             f"{E2E_EPOCHS} epochs x {PAPER_TOKENS} tokens / {facts['tokens_per_step']} a step = {count:.0f} steps x "
             f"{whole:.3f} s; {step:.3f} s with {layers} layers, a block's weights multiplied with 4 times, the "
             "head's 2 times")  # fmt: skip
        if facts["allocated"]:
            per_layer = parts["block"] + parts["saved"]
            line("e2e-oqp: GPU", (facts["allocated"] + more * per_layer) / GIB, "GiB",
                 f"{facts['allocated'] / GIB:.2f} + {more} more layers x ({parts['block'] / GIB:.3f} levels, scales "
                 f"with gradients and Adam's moments, masks + {parts['saved'] / GIB:.3f} the block's input); "
                 f"embeddings, norms and head are {parts['outside'] / GIB:.2f} of it")  # fmt: skip
    return lines


def table(result: dict) -> str:
    """The result in words."""
    lines = [result["what"], ""]
    lines.append(f"{'stage':12s} {'seconds':>8s} {'GPU allocated':>14s} {'reserved':>9s} {'RAM':>7s}   (peaks, GiB)")
    for name, facts in result["stages"].items():
        lines.append(
            f"{name:12s} {facts['seconds']:8.1f} {facts['allocated'] / GIB:14.2f} {facts['reserved'] / GIB:9.2f} "
            f"{facts['peak_gib']:7.2f}"
        )
    if result["blocks"]:
        parts = ("seconds", "passes", "inverses", "one-shot", "training", "packing")
        lines += ["", "block by block, seconds:  " + "  ".join(f"{part:>8s}" for part in parts)]
        for name, values in (
            ("first", [result["blocks"][0].get(part, 0.0) for part in parts]),
            ("median of the others", [typical(result["blocks"], part) for part in parts]),
        ):
            lines.append(f"  {name:23s} " + "  ".join(f"{value:8.2f}" for value in values))
    for name, (value, unit) in result["rates"].items():
        lines.append(f"{name}: {value:.4g} {unit}")
    lines += ["", *(f"note: {note}" for note in result["notes"])]
    lines += ["", "for the whole model and the paper's training:"]
    for each in result["extrapolation"]:
        lines.append(f"  {each['what']:46s} {each['value']:9.2f} {each['unit']:4s} = {each['formula']}")
    lines += ["", result["verdict"]]
    return "\n".join(lines)


def measure(args) -> dict:
    """Builds the model, compresses it and returns what `table` prints."""
    shape, device = SHAPES[args.shape], choose_device(args.device)
    if args.seq_len > shape.context:
        raise InputError(f"--seq-len is {args.seq_len}, expected at most {args.shape}'s context of {shape.context}")
    if args.output is not None and not args.output.parent.is_dir():
        raise InputError(f"--output is in {args.output.parent}, which is no folder; make it first")
    if args.memory_cap_gb is not None and device.type != "cuda":
        raise InputError(f"--memory-cap-gb is for GPUs, but the device is {device}; leave it out")
    layers = args.layers or min(6, shape.layers)
    source = make_source(shape, layers, device)
    large = is_large(source.model)
    parameters = sum(parameter.numel() for parameter in source.model.parameters())
    if args.memory_cap_gb is not None:
        torch.cuda.empty_cache()  # of the weights' making, which is no part of what is measured
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory_cap_gb * 1e9 / whole))
    tokens = args.samples * args.seq_len
    recorder, stopped, began = Recorder(device), None, time.monotonic()
    with tempfile.TemporaryDirectory(dir=args.work, prefix="training-cost-") as folder, recorder.watching():
        text = Path(folder) / "tokens.txt"
        text.write_text(random_text(shape, tokens), encoding="utf-8")
        try:
            run.compress(
                source, Path(folder) / "out", calibration=text, device=str(device), progress=sys.stderr.isatty(),
                sparsity=0.5, group_size=GROUP_SIZE, stages=tuple(args.stages.split(",")), epochs=args.epochs,
                samples=args.samples, seq_len=args.seq_len, e2e_steps=args.e2e_steps, batch_tokens=args.batch_tokens,
            )  # fmt: skip
        except GqsaError as error:
            stopped = str(error)
            recorder.costs.stages["stopped"] = {"seconds": 0.0, "peak_gib": resident_gib(), **recorder.peaks()}
    costs = recorder.costs
    lines = extrapolated(costs, shape, layers, tokens)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "what": f"{args.shape} with {layers} of {shape.layers} layers ({parameters / 1e9:.2f} B parameters), "
        f"{args.samples} samples of {args.seq_len} tokens, on {name}: {time.monotonic() - began:.0f} s",
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "large": large,
        "stages": costs.stages,
        "blocks": costs.blocks,
        "steps": np.diff(costs.step_starts).tolist(),
        "rates": rates(costs, args),
        "notes": notes(costs, args, large),
        "extrapolation": lines,
        "verdict": f"stopped: {stopped}" if stopped else verdict(lines, device),
        "stopped": stopped,
    }


def rates(costs: Costs, args) -> dict[str, tuple[float, str]]:
    """Name -> (value, unit) of what training costs by the sample and by the step."""
    found = {}
    if costs.blocks and "training" in costs.blocks[-1]:
        found["bqpo"] = (training_per_epoch(costs.blocks) / args.samples, "s per sample, epoch and block")
        found["bqpo step"] = (costs.blocks[-1]["batch"] * args.seq_len, "tokens")
    if len(costs.step_starts) > 1 and "e2e-oqp" in costs.stages:
        found["e2e-oqp"] = (float(np.median(np.diff(costs.step_starts))), "s per step")
        found["e2e-oqp step"] = (costs.stages["e2e-oqp"]["tokens_per_step"], "tokens")
    return found


def notes(costs: Costs, args, large: bool) -> list[str]:
    """What keeps the measurement from speaking for a large model and a long training."""
    found = []
    if not large:
        found.append("the model has fewer than 2^30 parameters, so this is not the path of large ones; more --layers")
    if costs.blocks and "batch" in costs.blocks[-1]:
        reached = costs.blocks[-1]["batch"] * args.seq_len
        if reached + args.seq_len <= bqpo._BATCH_TOKENS:
            found.append(
                f"steps of bqpo had {reached} tokens and have up to {bqpo._BATCH_TOKENS} with more samples, "
                "which take less time for each; more --samples"
            )
    return found


def verdict(lines: list[dict], device: torch.device) -> str:
    """Whether every stage of the whole model fits on a card of CARD_GB."""
    peaks = {line["what"]: line["value"] for line in lines if line["what"].endswith("GPU")}
    if device.type != "cuda" or not peaks:
        return "no GPU memory was measured"
    limit = CARD_GB * 1e9 / GIB
    above = [f"{what.removesuffix(': GPU')} ({value:.1f} GiB)" for what, value in peaks.items() if value > limit]
    if above:
        return f"does not fit in {CARD_GB} GB ({limit:.2f} GiB): {', '.join(above)}"
    return f"fits in {CARD_GB} GB ({limit:.2f} GiB): at most {max(peaks.values()):.1f} GiB"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--layers", type=int, help="to measure (default: 6, which makes a large model of the large)")
    parser.add_argument("--samples", type=int, default=80, help="for all stages (default: 80, for whole steps of bqpo)")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a sample (default: 2048)")
    parser.add_argument("--epochs", type=int, default=2, help="of BQPO (default: 2)")
    parser.add_argument("--e2e-steps", type=int, default=10, help="steps of E2E-OQP (default: 10)")
    parser.add_argument("--batch-tokens", type=int, help="tokens of a step of E2E-OQP (default: compress's)")
    parser.add_argument("--stages", default="bqpo,e2e-oqp", help="as of `gqsac compress` (default: bqpo,e2e-oqp)")
    parser.add_argument("--memory-cap-gb", type=float, help="GPU memory to allow, in 10^9 bytes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, help="folder for temporary files (default: the system's)")
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    try:
        for name in ("layers", "samples", "epochs", "e2e_steps"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 1")
        result = measure(args)
    except GqsaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(result))
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return int(result["stopped"] is not None)


if __name__ == "__main__":
    sys.exit(main())
