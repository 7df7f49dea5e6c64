"""What BQPO and E2E-OQP cost on a large model: measured on a few of its layers, and reckoned from that for all of it.

    python benchmarks/training_cost.py --shape llama-7b --layers 6 --samples 80 -o cost.json
    python benchmarks/training_cost.py --shape llama-7b --layers 32 --memory-cap-gb 24

Compresses a model of that shape with random bf16 weights (W4, half of the groups of 16 removed) on random tokens.
Prints seconds and peak memory of each stage, and what follows for all layers and the paper's 4096 samples of 2048
tokens, each with its formula; -o keeps all of it as JSON. With --memory-cap-gb the GPU gives no more than that: a run
that needs more says so and exits with 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from gqsa_runtime.errors import GqsaError, InputError

from gqsac.compress.end_to_end import samples_at_once
from gqsac.compress.prepare import choose_device
from gqsac.compress.run import compress
from gqsac.compress.trainable import is_large
from gqsac.source import Source

GIB = 1 << 30
GROUP_SIZE = 16
PAPER_TOKENS = 4096 * 2048
PAPER_EPOCHS = (5, 2)  # of BQPO: the paper's, and what early stopping often leaves
E2E_EPOCHS = 2
CARD_GB = 24
# Of E2E-OQP, bytes of a level, and of all that a group has: scale, gradient, two moments, initial scale, zero, mask.
LEVEL_BYTES, GROUP_BYTES = 1, 5 * 4 + 1 + 1


def _llama(hidden, intermediate, layers, heads, kv_heads, vocabulary, context) -> dict:
    """The config.json of a Llama of these sizes."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "max_position_embeddings": context,
        "tie_word_embeddings": False,
    }  # fmt: skip


SHAPES = {
    "llama-7b": _llama(4096, 11008, 32, 32, 32, 32000, 2048),
    "llama-13b": _llama(5120, 13824, 40, 40, 40, 32000, 2048),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128256, 8192),
    "tiny": _llama(64, 96, 8, 4, 2, 300, 64),
}


def make_source(config: dict, device: torch.device) -> Source:
    """A random bf16 model with a tokenizer that knows the numbers below the vocabulary, separated by spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {key: value for key, value in config.items() if key not in ("model_type", "dtype")}
    torch.manual_seed(0)
    with torch.device(device):  # a GPU draws 7B weights in a second
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **options), dtype=torch.bfloat16)
    numbers = {str(number): number for number in range(config["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Source("random", model.to("cpu").eval(), config, {"tokenizer.json": tokenizer.to_str().encode()})


def measure(args, device: torch.device) -> dict:
    """Compresses a model. "report" of compress, "step_seconds" of E2E-OQP, and facts of the model.

    Raises GqsaError, also where the memory does not suffice.
    """
    config, calls, stages = SHAPES[args.shape] | {"num_hidden_layers": args.layers}, [], {}
    source = make_source(config, device)
    facts = {"large": is_large(source.model), "parameters": sum(part.numel() for part in source.model.parameters())}

    def called(model, inputs) -> None:  # compress trains copies of the model, which keep its hooks
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        calls.append(time.perf_counter())

    def finished(stage: str, dequantised) -> None:
        stages[stage] = calls.copy()
        calls.clear()

    source.model.register_forward_pre_hook(called)
    with tempfile.TemporaryDirectory(prefix="training-cost-") as folder:
        tokens = np.random.default_rng(0).integers(0, config["vocab_size"], args.samples * args.seq_len)
        text = Path(folder) / "tokens.txt"
        text.write_text(" ".join(map(str, tokens.tolist())), encoding="utf-8")
        report = compress(
            source, Path(folder) / "out", calibration=text, device=str(device), progress=sys.stderr.isatty(),
            after_stage=finished, bits=4, sparsity=0.5, group_size=GROUP_SIZE, quant_group_size=GROUP_SIZE,
            stages=tuple(args.stages.split(",")), epochs=args.epochs, samples=args.samples, seq_len=args.seq_len,
            e2e_steps=args.e2e_steps, batch_tokens=args.batch_tokens,
        )  # fmt: skip
    if "e2e-oqp" in stages:
        began = stages["e2e-oqp"]
        steps = np.diff(began[:: len(began) // report["stages"]["e2e-oqp"]["steps"]])  # a step may be several calls
        facts["step_seconds"] = float(np.median(steps[1:]))  # the first compiles
    return {**facts, "report": report}


def tokens_at_once(shape: dict, seq_len: int, device: torch.device) -> int:
    """What E2E-OQP passes at once through a large model of that shape with all of its layers."""
    inputs = shape["num_hidden_layers"] * shape["hidden_size"]
    return seq_len * samples_at_once(seq_len, shape["vocab_size"], device, inputs if device.type == "cuda" else 0)


def block_costs(blocks: list[dict]) -> tuple[float, float, float]:
    """Seconds of a block of BQPO: what stays, what grows with the samples, and an epoch, which does too.

    blocks: of the report. Medians of all but the first, which compiles.
    """
    later = blocks[1:] or blocks
    stays = median(block["block_seconds"] - block["pass_seconds"] - block["seconds"] for block in later)
    return stays, median(b["pass_seconds"] for b in later), median(b["seconds"] / b["epochs"] for b in later)


def extrapolated(measured: dict, shape: dict, layers: int, tokens: int) -> list[dict]:
    """What all layers cost on PAPER_TOKENS: {"what", "value", "unit", "formula"} each.

    measured: see `measure`, on so many layers and tokens.
    """
    report, lines, all_layers = measured["report"], [], shape["num_hidden_layers"]

    def line(what, value, unit, formula) -> None:
        lines.append({"what": what, "value": round(float(value), 3), "unit": unit, "formula": formula})

    def gpu_line(stage, gib, formula) -> None:
        fits = "fits" if gib * GIB <= CARD_GB * 1e9 else "does not fit"
        line(f"{stage}, GPU", gib, "GiB", f"{formula}; {fits} in {CARD_GB} GB ({CARD_GB * 1e9 / GIB:.2f} GiB)")

    layer_weights, more = report["parameters"] / layers, all_layers - layers
    if "peak_gpu_gib" in (facts := report["stages"].get("allocation", {})):
        layer = layer_weights * (2 + 4 / GROUP_SIZE) / GIB
        gpu_line("allocation", facts["peak_gpu_gib"] + more * layer,
                 f"{facts['peak_gpu_gib']:.2f} measured + {more} more layers x {layer:.3f}: 2 bytes a weight and 4 a "
                 "group")  # fmt: skip
    if facts := report["stages"].get("bqpo"):
        stays, passes, epoch = block_costs(facts["blocks"])
        for epochs in PAPER_EPOCHS:
            seconds = all_layers * (stays + (passes + epochs * epoch) * PAPER_TOKENS / tokens)
            line(f"bqpo, {epochs} epochs", seconds / 3600, "h",
                 f"{all_layers} layers x ({stays:.2f} s + {PAPER_TOKENS / tokens:.1f} times the tokens x "
                 f"({passes:.2f} s passing through + {epochs} epochs x {epoch:.2f} s))")  # fmt: skip
        if "peak_gpu_gib" in facts:
            gpu_line("bqpo", facts["peak_gpu_gib"], "as measured: one block at a time")
        line("bqpo, activations", 2 * 2 * PAPER_TOKENS * shape["hidden_size"] / GIB, "GiB",
             f"inputs and targets x {PAPER_TOKENS} tokens x {shape['hidden_size']} x 2 bytes, in memory, or on the "
             "disk where they are more than half of what is free")  # fmt: skip
    if facts := report["stages"].get("e2e-oqp"):
        steps, step = E2E_EPOCHS * PAPER_TOKENS / facts["tokens_per_step"], measured["step_seconds"]
        line(f"e2e-oqp, {E2E_EPOCHS} epochs", steps * step * all_layers / layers / 3600, "h",
             f"{steps:.0f} steps of {facts['tokens_per_step']} tokens x {step:.3f} s x {all_layers}/{layers} layers; "
             "the head's share, which does not grow, counts as if it did")  # fmt: skip
        if "peak_gpu_gib" in facts:
            layer = layer_weights * (LEVEL_BYTES + GROUP_BYTES / GROUP_SIZE) / GIB
            inputs = 4 * facts["tokens_per_step"] * shape["hidden_size"] / GIB
            gpu_line("e2e-oqp", facts["peak_gpu_gib"] + more * (layer + inputs),
                     f"{facts['peak_gpu_gib']:.2f} measured + {more} more layers x ({layer:.3f}, a byte "
                     f"a weight and {GROUP_BYTES} a group, + {inputs:.3f} for the inputs of the layer)")  # fmt: skip
    return lines


def table(result: dict, tokens: int) -> str:
    """The result in words."""
    stages = result["report"]["stages"]
    lines = [result["what"]]
    if not result["large"]:
        lines.append("note: fewer than 2^30 parameters, so this is not the path of large models; use more --layers")
    lines += ["", f"{'stage':10s} {'seconds':>9s} {'GPU':>7s} {'RAM':>7s}   (peaks, GiB)"]
    for name, facts in stages.items():
        gpu = f"{facts['peak_gpu_gib']:.2f}" if "peak_gpu_gib" in facts else "-"
        lines.append(f"{name:10s} {facts['seconds']:9.1f} {gpu:>7s} {facts['peak_gib']:7.2f}")
    if "bqpo" in stages:
        blocks = stages["bqpo"]["blocks"]
        stays, passes, epoch = block_costs(blocks)
        whole, training = (median(block[key] for block in blocks[1:] or blocks) for key in ("block_seconds", "seconds"))
        lines.append(
            f"bqpo: {whole:.2f} s a block, of it {stays:.2f} s whatever the samples, {passes:.2f} s of their passing "
            f"through, {training:.2f} s of training: {epoch:.2f} s an epoch, {1e6 * epoch / tokens:.2f} us a token"
        )
    if "e2e-oqp" in stages:
        lines.append(f"e2e-oqp: {result['step_seconds']:.3f} s a step of {stages['e2e-oqp']['tokens_per_step']} tokens")
    lines += ["", "all layers, 4096 samples of 2048 tokens:"]
    lines += [f"  {e['what']:18s} {e['value']:9.2f} {e['unit']:3s} = {e['formula']}" for e in result["extrapolation"]]
    return "\n".join(lines)


def check(args, device: torch.device) -> None:
    """Raises InputError for what compress does not check itself, or only late."""
    for name, least in (("layers", 1), ("samples", 1), ("seq_len", 2), ("e2e_steps", 3)):
        if getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least {least}")
    if args.output is not None and not args.output.parent.is_dir():
        raise InputError(f"--output is in {args.output.parent}, which is no folder; make it first")
    if args.memory_cap_gb is not None and args.memory_cap_gb <= 0:
        raise InputError(f"--memory-cap-gb is {args.memory_cap_gb}, expected a number above 0")
    if args.memory_cap_gb is not None and device.type != "cuda":
        raise InputError(f"--memory-cap-gb is for GPUs, but the device is {device}; leave it out")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--layers", type=int, default=6, help="to measure (default: 6, enough for a large model)")
    parser.add_argument("--samples", type=int, default=80, help="for all stages (default: 80, for whole steps of bqpo)")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a sample (default: 2048)")
    parser.add_argument("--epochs", type=int, default=2, help="of BQPO (default: 2)")
    parser.add_argument("--e2e-steps", type=int, default=10, help="steps of E2E-OQP (default: 10)")
    parser.add_argument("--batch-tokens", type=int, help="of a step of E2E-OQP (default: what all layers take at once)")
    parser.add_argument("--stages", default="bqpo,e2e-oqp", help="as of `gqsac compress` (default: bqpo,e2e-oqp)")
    parser.add_argument("--memory-cap-gb", type=float, help="GPU memory to allow, in 10^9 bytes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    try:
        device = choose_device(args.device)
        check(args, device)
        if args.batch_tokens is None:
            args.batch_tokens = tokens_at_once(SHAPES[args.shape], args.seq_len, device)
        if args.memory_cap_gb is not None:
            whole = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory_cap_gb * 1e9 / whole), device.index or 0)
        result = measure(args, device)
    except GqsaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    shape, tokens = SHAPES[args.shape], args.samples * args.seq_len
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    result["what"] = (
        f"{args.shape} with {args.layers} of {shape['num_hidden_layers']} layers "
        f"({result['parameters'] / 1e9:.2f} B parameters), {args.samples} samples of {args.seq_len} tokens, on "
        f"{where}: {result['report']['seconds']:.0f} s"
    )
    result["extrapolation"] = extrapolated(result, shape, args.layers, tokens)
    print(table(result, tokens))
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
