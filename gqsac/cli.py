"""The `gqsac` command: compress and build, and every verb of the runtime."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import click
from gqsa_runtime.cli import Commands, check_signature_options, commands, signature_options
from gqsa_runtime.cli import main as run_group

from gqsac import __version__
from gqsac.bsr import GROUP_SIZES
from gqsac.cli_doctor import doctor
from gqsac.cli_eval import evaluate
from gqsac.cli_sign import sign, sign_made, sign_option, signer
from gqsac.cli_sweep import sweep_command
from gqsac.errors import DeviceError


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="gqsac")
def cli():
    """Compiles language models compressed with GQSA (INT4 groups, 1xG group sparsity) into one file.

    \b
    gqsac compress Qwen/Qwen2.5-0.5B -o model/     make a compressed checkpoint
    gqsac build model/ -o qwen.gqsa                compile it for GPUs and this CPU
    gqsac run qwen.gqsa --prompt "Once upon"       run it, without PyTorch
    """


@cli.command()
@click.argument("source", metavar="SRC")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@click.option(
    "--target-bpw", type=float, metavar="BITS",
    help="Bits per weight of the linears in the built file, scales and all, at most. Every row gets the width that "
    "pays best. Default: 4.5, if none of --target-*, --bits, --sparsity, --pattern and their kin is given.",
)  # fmt: skip
@click.option(
    "--target-size", metavar="SIZE",
    help="The same by bytes of the whole file that `gqsac build` writes, head and kernels counted: 90M, 4G, 512Mi.",
)  # fmt: skip
@click.option(
    "--target-memory", metavar="SIZE",
    help="The same by bytes of memory that a run needs, KV cache and activations counted, at --context.",
)  # fmt: skip
@click.option("--context", type=click.IntRange(min=1), help="With --target-memory: positions. Default: 4096 at most.")
@click.option(
    "--build-target", "targets", multiple=True, metavar="TARGET",
    help="With --target-size or --target-memory: a --target that `gqsac build` will get; repeatable. Default: its own.",
)  # fmt: skip
@click.option("--widths", metavar="LIST", help="With a target: widths that rows may have. Default: 1,2,3,4,8.")
@click.option("--bits", type=click.IntRange(2, 8), help="One width for all: 2, 3, 4 or 8 bits. Default: 4.")
@click.option("--group-size", type=int, help=f"Weights in a group: {', '.join(map(str, GROUP_SIZES))}. Default: 16.")
@click.option("--sparsity", type=float, default=None, help="Share of groups to remove, 0 to below 1. Default: 0.02.")
@click.option(
    "--calibration", multiple=True, type=click.Path(path_type=Path), metavar="TEXT",
    help="UTF-8 text file to calibrate and train with, or self:N for N tokens that the model writes itself "
    "(self:200k); repeatable. Without one, a small built-in text serves.",
)  # fmt: skip
@click.option(
    "--samples", type=int, help="Calibration sequences, on which BQPO trains too. Default: 8, with training 128."
)
@click.option(
    "--seq-len", type=click.IntRange(min=8), default=None, help="Tokens in a sequence. Default: 1024 or the context."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses sequences and the order of training.")
@click.option(
    "--skip", multiple=True, metavar="PATTERN", help="Linears to leave dense, e.g. '*.down_proj'; repeatable."
)
@click.option("--pattern", help="What is removed: groups (1xG) or two of every four weights (2:4).")
@click.option(
    "--allocation",
    help="Groups compete within a row, a layer, or the whole model: row, layer, global. Default: row, with training "
    "global.",
)
@click.option(
    "--removal",
    help="Training keeps the one-shot mask (at-once) or removes groups itself (gradual). Default: gradual in a distill "
    "without bqpo.",
)
@click.option("--quant-group-size", type=int, help="Weights that share a scale. [default: 64 if possible]")
@click.option(
    "--stages", metavar="LIST", help="Comma-separated: one-shot (default), bqpo, distill, e2e-oqp, in this order."
)
@click.option("--epochs", type=int, help="bqpo: epochs over the samples at most. Default: 5.")
@click.option("--e2e-steps", metavar="LIST", help="distill, e2e-oqp: steps of both, or of each. Default: two epochs.")
@click.option("--train-samples", type=int, help="distill, e2e-oqp: sequences to train on. Default: --samples.")
@click.option("--batch-tokens", type=int, help="distill, e2e-oqp: tokens in a step. Default: 16384, on a CPU 2048.")
@click.option("--minutes", metavar="LIST", help="Training time at most: of every stage, or comma-separated of each.")
@click.option("--distill", type=float, help="e2e-oqp: share of distillation in the loss, 0 to 1. Default: 0.")
@click.option(
    "--master-dtype", help="bqpo, distill: weights that learn are float32 (default), or bfloat16 for half the memory."
)
@click.option(
    "--learn-embeddings", is_flag=True, default=None, help="distill: input embedding and output head learn, too."
)
@click.option("--weight-lr", type=float, help="Learning rate of weights, relative to their size.")
@click.option("--scale-lr", type=float, help="Learning rate of scales, relative to their size.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout.")
def compress(source, output, as_json, stages, minutes, e2e_steps, widths, **options):
    """Makes a compressed checkpoint of a model: calibrate, choose widths or groups, quantise, and train.

    SRC is a Hugging Face folder, a hub id, or a .gguf file. Block after block is calibrated and rounded to INT, every
    row to the width that pays best under the target; or, as published, all to --bits with the least salient 1xG
    groups removed (--sparsity).
    With more --stages the compressed model is trained: bqpo block by block, distill and e2e-oqp end to end.
    An interrupted run goes on where it stopped when the same command is given again.
    The folder gets a report of the run, report.json and report.png.

    \b
    gqsac compress SmolLM2.gguf -o smollm2/
    gqsac compress SmolLM2.gguf -o smollm2/ --target-size 90M
    gqsac compress models/llama-7b -o llama/ --sparsity 0.5 --calibration train.txt --stages bqpo,e2e-oqp
    gqsac compress SmolLM2.gguf -o smollm2/ --target-bpw 2.6 --calibration train.txt --stages distill
    """
    from safetensors import SafetensorError

    from gqsac.compress.report import summary
    from gqsac.compress.run import compress as run

    chosen = _chosen(stages, minutes, e2e_steps, widths, **options)
    try:
        report = run(source, output, **chosen)
    except SafetensorError as error:  # its writer reports a full disk so
        raise DeviceError(
            f"writing {output} failed: {error}; free some space, then give the same command again to go on"
        ) from error
    if not report:
        return  # one of several processes, of which the first tells
    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        click.echo(summary(report), err=True)


def _chosen(stages=None, minutes=None, e2e_steps=None, widths=None, **options) -> dict:
    """Arguments for the compression from options as click gives them; what was not given is left out."""
    chosen = {key: value for key, value in options.items() if value is not None and value != ()}
    if stages is not None:
        chosen["stages"] = tuple(stage.strip() for stage in stages.split(","))
    if minutes is not None:
        chosen["minutes"] = _numbers("--minutes", minutes)
    if e2e_steps is not None:
        chosen["e2e_steps"] = _numbers("--e2e-steps", e2e_steps, int)
    for name in ("target_size", "target_memory"):
        if name in chosen:
            chosen[name] = _bytes(f"--{name.replace('_', '-')}", chosen[name])
    if widths is not None:
        found = _numbers("--widths", widths, int)
        chosen["widths"] = found if isinstance(found, tuple) else (found,)
    _check_effect(chosen)
    return chosen


# Options of the training stages -> the stages that heed them.
_HEEDED_BY = {
    "epochs": ("bqpo",),
    **dict.fromkeys(("e2e_steps", "train_samples", "batch_tokens"), ("distill", "e2e-oqp")),
    **dict.fromkeys(("removal", "weight_lr", "master_dtype"), ("bqpo", "distill")),
    "learn_embeddings": ("distill",),
    **dict.fromkeys(("minutes", "scale_lr"), ("bqpo", "distill", "e2e-oqp")),
    "distill": ("e2e-oqp",),
}


def _check_effect(chosen: dict) -> None:
    """Raises a usage error for an option that no stage of the run would heed."""
    stages = chosen.get("stages", ("one-shot",))
    for name, heeding in _HEEDED_BY.items():
        if name in chosen and not set(heeding) & set(stages):
            raise click.UsageError(
                f"--{name.replace('_', '-')} is for the stages {' and '.join(heeding)}, but --stages is "
                f"{','.join(stages)}; leave it out, or add a stage"
            )


def _bytes(option: str, text: str) -> int:
    """A size such as 90M (millions of bytes) or 512Mi (of 2^20)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kKMGT]?)(i?)B?", text.strip())
    if not found or (found[3] and not found[2]):
        raise click.UsageError(f"{option} is {text!r}, expected a size such as 90M, 4G or 512Mi")
    return round(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " "))


def _numbers(option: str, text: str, kind=float):
    """One number, or a tuple of comma-separated ones. kind: float or int."""
    try:
        values = tuple(kind(part) for part in text.split(","))
    except ValueError:
        name = "a whole number or whole numbers" if kind is int else "a number or numbers"
        raise click.UsageError(f"{option} is {text!r}, expected {name} separated by commas") from None
    return values[0] if len(values) == 1 else values


@cli.command()
@click.argument("model", metavar="MODEL")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to make.")
@click.option(
    "--target", "targets", multiple=True, metavar="TARGET",
    help="sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, compute_80 (PTX), x86_64_v3, x86_64_v3_vnni, "
    "x86_64_v4, x86_64_v4_vnni, aarch64, aarch64_dotprod, "
    "cuda or cpu; repeatable. Default: all CUDA targets and this machine's CPU.",
)  # fmt: skip
@click.option("-j", "--jobs", type=click.IntRange(min=0), default=0, help="Compile threads; 0: one a core.")
@click.option(
    "--kv-dtype", type=click.Choice(["f16", "f32", "int8"]), help="KV cache. [default: f16, with --exact f32]"
)
@click.option("--head-bits", type=int, help="Round head and embeddings to 4 or 8 bits, or keep 16. [default: 8]")
@click.option("--exact", is_flag=True, help="f32 activations and KV cache, 16-bit heads: slow and large, to compare.")
@click.option("--max-context", type=click.IntRange(min=1), help="Longest context to allow; default: the model's own.")
@click.option("--bits", type=int, help="Round an uncompressed MODEL without data: 2, 4, 8, or 16 for dense fp16.")
@click.option("--group-size", type=int, default=16, show_default=True, help="With --bits: weights in a group.")
@click.option("--sparsity", type=float, default=0.0, show_default=True, help="With --bits: share of groups to drop.")
@click.option("--dump-dir", type=click.Path(path_type=Path), help="Write graph, plan, sources, logs and code here.")
@click.option("--dry-run", is_flag=True, help="Trace and plan, but compile and write nothing.")
@click.option("--no-cache", is_flag=True, help="Compile every kernel anew.")
@sign_option
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
def build(model, output, targets, jobs, kv_dtype, exact, head_bits, max_context, bits, group_size, sparsity, dump_dir,
          dry_run, no_cache, key, as_json):  # fmt: skip
    """Compiles a checkpoint folder into one .gqsa file.

    MODEL is a folder made by `gqsac compress`, by llm-compressor with 4 or 8 bits (compressed-tensors'
    pack-quantized), by GPTQ with 2, 4 or 8 bits and without act-order, or by AWQ (gemm). An
    uncompressed Hugging Face folder is taken too if --bits is given: it is rounded without
    calibration data, for trying out.

    \b
    gqsac build smollm2/ -o smollm2.gqsa
    gqsac build smollm2/ -o smollm2.gqsa --target sm_90 --target cpu --dump-dir dump/
    """
    if output is None and not dry_run:
        raise click.UsageError("give the file to make with -o FILE, or --dry-run")
    from gqsac.build_progress import BuildProgress
    from gqsac.compiler.pipeline import BuildOptions
    from gqsac.compiler.pipeline import build as run
    from gqsac.rounding import Rounding

    signing = signer(key)
    rounding = Rounding(bits, group_size, sparsity) if bits is not None else None
    if rounding is not None:
        click.echo(
            "note: rounding without calibration data, for trying out; use `gqsac compress` for quality", err=True
        )
    options = BuildOptions(
        targets=tuple(targets), jobs=jobs, kv_dtype=kv_dtype, exact=exact, head_bits=head_bits,
        max_context=max_context, rounding=rounding,
        dump_dir=dump_dir, dry_run=dry_run, cache=not no_cache,
    )  # fmt: skip
    with BuildProgress() as progress:
        summary = run(model, output, options, progress)
    if not dry_run:
        sign_made(signing, output)
    if as_json:
        click.echo(json.dumps(summary.as_dict(), indent=1))
        return
    kernel_table = summary.kernel_table()
    if kernel_table:
        click.echo(kernel_table + "\n", err=True)
    click.echo(summary.table(), err=True)


@cli.command()
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="File to make; may be FILE.")
@click.option(
    "--target", "targets", multiple=True, metavar="TARGET", help="As of build; repeatable. Default: those of FILE."
)
@click.option("-j", "--jobs", type=click.IntRange(min=0), default=0, help="Compile threads; 0: one a core.")
@click.option("--no-cache", is_flag=True, help="Compile every kernel anew.")
@signature_options
@sign_option
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
def relink(file, output, targets, jobs, no_cache, require_signature, signature, key, as_json):
    """Makes the kernels of a .gqsa file anew, for other targets or with a newer gqsac; weights and texts stay.

    Neither the checkpoint nor PyTorch is needed. A plan for GPUs is made from one for CPUs and the other way round, if
    this version of gqsac made it. A signature of FILE is not one of the new file, whose bytes are others: --sign makes
    that, after --require-signature has checked the old one.

    \b
    gqsac relink qwen.gqsa -o qwen-h100.gqsa --target sm_90
    gqsac relink qwen.gqsa -o qwen-all.gqsa --target cuda --target cpu
    gqsac relink old.gqsa -o new.gqsa
    """
    from gqsac.build_progress import BuildProgress
    from gqsac.compiler.relink import relink as run

    check_signature_options(require_signature, signature)
    signing = signer(key)
    with BuildProgress() as progress:
        made = run(file, output, tuple(targets), jobs, not no_cache, progress, require_signature, signature)
    sign_made(signing, output)
    if as_json:
        click.echo(json.dumps(asdict(made), indent=1))
        return
    click.echo(f"kernels    {made.n_compiled} binaries compiled, {made.n_cached} from the cache", err=True)
    click.echo(f"file       {made.file_bytes / 1e6:.1f} MB, for {', '.join(made.targets)}", err=True)
    click.echo(f"time       {made.seconds:.1f} s", err=True)


@cli.command()
@click.argument("model", metavar="MODEL", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to make.")
def export(model, output):
    """Writes a compressed checkpoint as compressed-tensors, for vLLM and others.

    MODEL is a folder made by `gqsac compress` with 4 or 8 bits and without removed groups (--sparsity 0); other
    weights have no place in that format. What it writes, and what llm-compressor writes as `pack-quantized`, can be
    given to `gqsac build`.

    \b
    gqsac compress models/llama-7b -o llama-w4/ --sparsity 0 --group-size 128
    gqsac export llama-w4/ -o llama-w4-vllm/
    """
    from gqsac.checkpoint import Checkpoint
    from gqsac.compressed_tensors import export as run

    run(Checkpoint.open(model), output)
    click.echo(f"written to {output}", err=True)


@cli.command("import")
@click.argument("model", metavar="MODEL", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to make.")
def import_(model, output):
    """Makes a gqsa checkpoint of one of GPTQ, AWQ or compressed-tensors, without loss.

    The weights stay as they are: the same levels, scales and zeros. What does not fit (act-order, 3-bit GPTQ, 8-bit
    zeros between sixteenths of the range) is refused by its name. `gqsac build` takes such folders as they are, too;
    an imported one can also be evaluated and loaded with transformers.

    \b
    gqsac import Qwen2.5-0.5B-Instruct-GPTQ-Int4/ -o qwen/
    gqsac build qwen/ -o qwen.gqsa
    """
    from gqsac.checkpoint import Checkpoint
    from gqsac.import_checkpoint import import_checkpoint

    config = import_checkpoint(Checkpoint.open(model), output)
    click.echo(f"{len(config.shapes)} linears of {config.bits:g} bits written to {output}", err=True)


cli.add_command(sign)
cli.add_command(sweep_command(compress, _chosen))
for command in commands():
    cli.add_command(command)
# In place of the runtime's, which know .gqsa files and nothing of compiling.
cli.add_command(evaluate)
cli.add_command(doctor)


def main() -> None:
    """Entry point: errors become one sentence and exit code 1."""
    run_group(cli, prog_name="gqsac")
