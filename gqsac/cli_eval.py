"""`gqsac eval`: the runtime's measurements, on models that are not compiled too, and zero-shot tasks."""

from __future__ import annotations

import json
from functools import partial

import click
from gqsa_runtime import rebuild
from gqsa_runtime.cli import check_signature_options, progress, read_text
from gqsa_runtime.cli import evaluate as runtime_evaluate

from gqsac.evaluate.load import is_artifact
from gqsac.evaluate.task_data import TASKS


@click.group("eval")
def evaluate() -> None:
    """Measures quality.

    \b
    Examples:
      gqsac eval ppl model.gqsa --text wiki.test.raw
      gqsac eval ppl models/llama-7b --text wiki.test.raw
      gqsac eval kl model/ --reference models/llama-7b --text wiki.test.raw
      gqsac eval tasks model.gqsa --task piqa --task arc_easy --data tasks/
    """


_runtime_ppl = runtime_evaluate.commands["ppl"]
_HELP = {"help_option_names": ["-h", "--help"]}


def _shared(*names: str) -> list[click.Parameter]:
    """Parameters of the runtime's command, so that both say the same."""
    return [parameter for parameter in _runtime_ppl.params if parameter.name in names]


_OF_ARTIFACTS = ("rebuild_kernels", "require_signature", "signature")  # options that other models have no use for


def _refuse(of_artifacts: dict) -> None:
    for name, value in of_artifacts.items():
        if value:
            raise click.UsageError(f"--{name.replace('_', '-')} is for .gqsa files alone")


def _opening(rebuild_kernels: bool, require_signature: str | None, signature: str | None) -> dict:
    """These options as `Model.open` has them."""
    check_signature_options(require_signature, signature)
    kernels = rebuild.REBUILD if rebuild_kernels else rebuild.FILE
    return {"kernels": kernels, "require_signature": require_signature, "signature": signature}


@evaluate.command(params=_runtime_ppl.params, context_settings=_HELP)
def ppl(file, text, window, stride, max_windows, device, context, threads, as_json, **of_artifacts) -> None:
    """Perplexity of a text. The last tokens that fill no window are left out; a shorter text is scored whole.

    FILE is a .gqsa file, or a model folder (compressed or not), hub id or .gguf file: those run in
    PyTorch with fp32 arithmetic, on a GPU where PyTorch finds one.

    \b
    Examples:
      gqsac eval ppl model.gqsa --text wiki.test.raw --window 2048 --max-windows 20
      gqsac eval ppl model/ --text wiki.test.raw --json
    """
    if is_artifact(file):
        _runtime_ppl.callback(
            file=file, text=text, window=window, stride=stride, max_windows=max_windows, device=device, context=context,
            threads=threads, as_json=as_json, **of_artifacts,
        )  # fmt: skip
        return
    _refuse(of_artifacts)
    from gqsac.evaluate.load import open_scorer

    content = read_text(text, "text")
    scorer = open_scorer(file, device, context, threads)
    result = scorer.perplexity(content, window, stride, max_windows, partial(progress, unit="window"))
    if as_json:
        click.echo(json.dumps({"path": file, "window": window, "stride": stride or window, **vars(result)}))
    else:
        click.echo(f"perplexity {result.perplexity:.4f} over {result.n_tokens:,} tokens in {result.n_windows} windows")


@evaluate.command(
    params=[
        *_shared("file"),
        click.Option(["--reference"], required=True, metavar="MODEL", help="The uncompressed model."),
        *_shared("text", "window", "stride", "max_windows", "device", "threads", "as_json"),
    ],
    context_settings=_HELP,
)
def kl(file, reference, text, window, stride, max_windows, device, threads, as_json) -> None:
    """How far a compressed model is from the one it was made of, position by position of a text.

    The mean and the 99th percentile of KL(reference || model) in nats a token, the share of positions at which
    the likeliest next token is another (flips), and the perplexities of both. Unlike perplexity these
    do not flatter a model that has been trained on text of the test's kind.

    FILE is a folder made by `gqsac compress`, MODEL a model folder, hub id or .gguf file; both run in PyTorch with
    fp32 arithmetic. A .gqsa file gives no whole distributions; compare the folder that it was built from.

    \b
    Examples:
      gqsac eval kl model/ --reference SmolLM2.gguf --text wiki.test.raw
      gqsac eval kl model/ --reference models/llama-7b --text wiki.test.raw --max-windows 64 --json
    """
    from gqsac.evaluate.divergence import compare

    content = read_text(text, "text")
    show = partial(progress, unit="window")
    result = compare(file, reference, content, window, stride, max_windows, device, threads, show)
    if as_json:
        facts = {"path": file, "reference": reference, "window": window, "stride": stride or window}
        click.echo(json.dumps({**facts, **vars(result)}))
    else:
        click.echo(
            f"KL {result.kl:.4f} nats a token, 99th percentile {result.kl_99:.3f}; {result.flips:.2%} of likeliest "
            f"tokens flip; perplexity {result.perplexity:.4f}, reference {result.reference_perplexity:.4f}; "
            f"{result.n_tokens:,} tokens in {result.n_windows} windows"
        )


@evaluate.command(
    params=[
        *_shared("file"),
        click.Option(["--task", "names"], multiple=True, help=f"{', '.join(TASKS)}; repeatable. Default: all."),
        click.Option(["--data"], required=True, type=click.Path(path_type=str), help="Folder of the tasks' files."),
        click.Option(["--limit"], type=int, help="Only the first so many rows of each task."),
        *_shared("device", "context", "threads", *_OF_ARTIFACTS, "as_json"),
    ],
    context_settings=_HELP,
)
def tasks(file, names, data, limit, device, context, threads, as_json, **of_artifacts) -> None:
    """Zero-shot accuracy with its standard error, through the lm-eval harness and its prompts.

    FILE is what `eval ppl` takes. The data folder holds piqa.jsonl, arc_easy.jsonl, arc_challenge.jsonl
    ({query, choices, gold} a line), winogrande.jsonl ({context_options, continuation, gold}) and
    hellaswag.jsonl or hellaswag_val_full.txt; nothing is downloaded.
    The harness comes with pip install "gqsac[eval]".

    \b
    Examples:
      gqsac eval tasks model.gqsa --task piqa --task arc_easy --data tasks/ --limit 500
      gqsac eval tasks model/ --data tasks/ --device cuda --json
    """
    from gqsac.evaluate.load import open_scorer
    from gqsac.evaluate.tasks import check_harness, evaluate_task, load_tasks, render

    if not is_artifact(file):
        _refuse(of_artifacts)
    rows = load_tasks(names, data, limit)  # before a long load
    version = check_harness()
    scorer = open_scorer(file, device, context, threads, **_opening(**of_artifacts))
    try:
        click.echo(f"device {scorer.device_reason}", err=True)
        results = [evaluate_task(scorer, name, rows[name], partial(progress, unit=f"{name} request")) for name in rows]
    finally:
        scorer.close()
    for result in results:
        if result.n_truncated:
            click.echo(
                f"note: {result.n_truncated} requests of {result.task} were longer than the context of "
                f"{scorer.context} tokens and lost their beginning",
                err=True,
            )
    if as_json:
        facts = {"path": file, "device": scorer.device_reason, "limit": limit, "lm_eval": version}
        click.echo(json.dumps({**facts, "results": [vars(result) for result in results]}))
    else:
        click.echo(render(results))
