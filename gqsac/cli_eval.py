"""`gqsac eval`: the runtime's measurements, on models that are not compiled too."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import click
from gqsa_runtime.cli import evaluate as runtime_evaluate
from gqsa_runtime.cli import progress, read_text


@click.group("eval")
def evaluate() -> None:
    """Measures quality.

    \b
    Examples:
      gqsac eval ppl model.gqsa --text wiki.test.raw
      gqsac eval ppl models/llama-7b --text wiki.test.raw
    """


_runtime_ppl = runtime_evaluate.commands["ppl"]


@evaluate.command(params=_runtime_ppl.params, context_settings={"help_option_names": ["-h", "--help"]})
def ppl(file, text, window, stride, max_windows, device, context, threads, as_json) -> None:
    """Perplexity of a text. The last tokens that fill no window are left out.

    FILE is a .gqsa file, or a model folder (compressed or not), hub id or .gguf file: those run in
    PyTorch with fp32 arithmetic, on a GPU where PyTorch finds one.

    \b
    Examples:
      gqsac eval ppl model.gqsa --text wiki.test.raw --window 2048 --max-windows 20
      gqsac eval ppl model/ --text wiki.test.raw --json
    """
    if file.endswith(".gqsa") or (Path(file).is_file() and not file.endswith(".gguf")):
        _runtime_ppl.callback(file, text, window, stride, max_windows, device, context, threads, as_json)
        return
    result = _torch_perplexity(file, text, window, stride, max_windows, device)
    if as_json:
        click.echo(json.dumps({"path": file, "window": window, "stride": stride or window, **vars(result)}))
    else:
        click.echo(f"perplexity {result.perplexity:.4f} over {result.n_tokens:,} tokens in {result.n_windows} windows")


def _torch_perplexity(source: str, text: str, window: int, stride: int | None, max_windows: int | None, device: str):
    import torch
    from gqsa_runtime.tokenizer import Tokenizer

    from gqsac.evaluate.load import load_for_evaluation
    from gqsac.evaluate.perplexity import perplexity

    content = read_text(text, "text")
    model, tokenizer_json = load_for_evaluation(source)
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    tokens = Tokenizer(tokenizer_json).encode(content)
    return perplexity(model.to(where), tokens, window, stride, max_windows, partial(progress, unit="window"))
