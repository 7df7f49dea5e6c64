"""`gqsac doctor`: the runtime's look at this machine, and what compiling needs."""

from __future__ import annotations

import json

import click
from gqsa_runtime.cli import OPTIONAL_FILE, check_signature_options, signature_options
from gqsa_runtime.doctor import Finding, examine, examine_file, render, versions

from gqsac import __version__
from gqsac.errors import GqsaError

_PACKAGES = ("torch", "transformers", "safetensors", "accelerate", "gguf")


@click.command()
@OPTIONAL_FILE
@signature_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def doctor(file, require_signature, signature, as_json) -> None:
    """Says what this machine can compile and run, and what to install where something is missing.

    With FILE, a compiled model, also how much memory it needs at which context, and what fits here.

    \b
    Examples:
      gqsac doctor
      gqsac doctor model.gqsa
    """
    check_signature_options(require_signature, signature, file)
    findings = [*examine(), Finding("gqsac", __version__), *versions(_PACKAGES), *_compilers(), _cache()]
    findings += examine_file(file, require_signature, signature) if file else []
    if as_json:
        click.echo(json.dumps([vars(finding) for finding in findings], indent=2))
    else:
        click.echo(render(findings))


def _compilers() -> list[Finding]:
    from gqsac.compiler.passes import compile_cpu, compile_cuda
    from gqsac.compiler.passes.compile import CUDA_TARGETS

    findings = []
    for subject, version, targets in (
        ("nvrtc", compile_cuda.nvrtc_version, CUDA_TARGETS),
        ("zig", compile_cpu.compiler_version, compile_cpu.TARGETS),
    ):
        try:
            findings.append(Finding(subject, f"{version()}; compiles {', '.join(targets)}"))
        except GqsaError as error:
            findings.append(Finding(subject, "not usable", str(error)))
    return findings


def _cache() -> Finding:
    from gqsac.compiler.passes.compile import default_cache_dir

    folder = default_cache_dir()
    n_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    return Finding("kernel cache", f"{folder}, {n_bytes / 1e6:.1f} MB")
