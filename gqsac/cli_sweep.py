"""`gqsac sweep`: a model at several sizes, and what each costs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
from gqsa_runtime.cli import evaluate as runtime_evaluate
from gqsa_runtime.cli import progress, read_text

# Of compress, all but what chooses widths, names the output, or goes by one width for all rows.
_OF_COMPRESS = (
    "widths", "calibration", "samples", "seq_len", "seed", "skip", "stages", "epochs", "e2e_steps", "train_samples",
    "batch_tokens", "minutes", "distill", "master_dtype", "weight_lr", "scale_lr", "device",
)  # fmt: skip
_OF_EVAL = ("text", "window", "max_windows")


def sweep_command(compress: click.Command, parse: Callable[..., dict]) -> click.Command:
    """The command. compress: whose options it shares. parse: makes arguments of the compression of those."""
    of_eval = runtime_evaluate.commands["ppl"].params
    return click.Command(
        "sweep",
        params=[
            click.Argument(["model"], metavar="MODEL"),
            click.Option(["--bpw"], required=True, metavar="LIST", help="Bits per weight as built, e.g. 2,2.6,3,4.3."),
            click.Option(["-o", "--out"], required=True, type=click.Path(path_type=Path), help="Folder to fill."),
            *[parameter for parameter in of_eval if parameter.name in _OF_EVAL],
            click.Option(["--target", "build_targets"], multiple=True, metavar="TARGET", help="Of `gqsac build`."),
            *[parameter for parameter in compress.params if parameter.name in _OF_COMPRESS],
            click.Option(["--json", "as_json"], is_flag=True, help="Print the points as JSON on stdout."),
        ],
        callback=partial(_sweep, parse),
        help=_HELP,
    )


_HELP = """Compresses MODEL to several sizes, and says how far each is from it.

For each number of --bpw a checkpoint is made as by `gqsac compress --target-bpw`, built, and compared with MODEL as by
`gqsac eval kl` on --text. The folder gets 2.6bpw/ and 2.6bpw.gqsa, sweep.json with all that was measured, sweep.md and
sweep.csv, a table, and sweep.png, perplexity and KL over bits and over the bytes of the files. An interrupted run goes
on where it stopped when the same command is given again; --bpw alone may change, which adds points.

\b
gqsac sweep SmolLM2.gguf --bpw 2,2.6,3,4.3 -o curve/ --text wiki.test.raw --max-windows 64
gqsac sweep SmolLM2.gguf --bpw 2.6,3 -o trained/ --text wiki.test.raw --stages distill --calibration self:4M
"""


def _sweep(parse, model, bpw, out, text, window, max_windows, build_targets, as_json, **options) -> None:
    from gqsac.evaluate.sweep import sweep, table

    try:
        targets = [float(part) for part in bpw.split(",")]
    except ValueError:
        raise click.UsageError(f"--bpw is {bpw!r}, expected numbers separated by commas, such as 2,2.6,3") from None
    content = read_text(text, "text")
    show = partial(progress, unit="window")
    rows = sweep(
        model, targets, out, content, window=window, max_windows=max_windows, build_targets=build_targets,
        progress=show, **parse(**options),
    )  # fmt: skip
    click.echo(json.dumps([vars(row) for row in rows], indent=1) if as_json else table(rows))
    failed = [row.label for row in rows if row.errors]
    if failed:
        click.echo(f"failed: {', '.join(failed)}; the same command tries them again", err=True)
        raise SystemExit(1)
