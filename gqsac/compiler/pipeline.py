"""The compiler's table of contents: every pass from a checkpoint to a .gqsa file, in order."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from gqsa_runtime.facts import facts_json
from gqsa_runtime.format import canonical_json
from gqsa_runtime.kv_cache import KV_ELEMENTS
from gqsa_runtime.layouts import GROUP_WORDS, RECORDS
from gqsa_runtime.program import Program

from gqsac.checkpoint import Checkpoint
from gqsac.compiler import dump, ir
from gqsac.compiler.passes.bundle import Content, bundle, bundled_bytes, check_output
from gqsac.compiler.passes.choose_layouts import LayoutOptions, Weights, module_of
from gqsac.compiler.passes.compile import (
    Compiled,
    check_targets,
    compile_all,
    default_cache_dir,
    default_targets,
    families,
    toolchain,
)
from gqsac.compiler.passes.fuse import fuse
from gqsac.compiler.passes.fuse_records import fuse_records
from gqsac.compiler.passes.legalize import legalize
from gqsac.compiler.passes.link import code_tensors, kv_layers, link, ropes
from gqsac.compiler.passes.measure_linears import measure_linears
from gqsac.compiler.passes.pack import Packing, pack
from gqsac.compiler.passes.render import render
from gqsac.compiler.passes.trace import trace
from gqsac.compiler.passes.verify import verify
from gqsac.compiler.plan_family import plan_family
from gqsac.compiler.summary import ByteCounts, Summary, count_bytes
from gqsac.errors import InputError
from gqsac.model_info import bos_token_id, chat_template, eos_token_ids, measured, model_name, tokenizer_json
from gqsac.rounding import RoundedCheckpoint, Rounding

KV_DTYPES = tuple(KV_ELEMENTS)
HEAD_BITS = (4, 8, 16)


@dataclass(frozen=True)
class BuildOptions:
    """targets: () for all defaults. jobs: compile threads, 0 for all cores. kv_dtype: None for f16, or f32 where exact.
    rounding: compress an uncompressed checkpoint without data, to try things out. dry_run: stop before compiling."""

    targets: tuple[str, ...] = ()
    jobs: int = 0
    kv_dtype: str | None = None
    exact: bool = False
    head_bits: int | None = None
    max_context: int | None = None
    rounding: Rounding | None = None
    dump_dir: Path | None = None
    dry_run: bool = False
    cache: bool = True

    @property
    def cache_dtype(self) -> str:
        """Of the KV cache. A yardstick's does not round: a cache of halves moves logits as integer activations do."""
        return self.kv_dtype or ("f32" if self.exact else "f16")


def build(
    model: str | Path,
    output: str | Path | None,
    options: BuildOptions = BuildOptions(),
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Summary:
    """Compiles a checkpoint folder into one .gqsa file.

    progress: called as (stage, done, total) while kernels compile and weights are written.
    Raises GqsaError for a model, an option or a machine that will not do; writes nothing then.
    """
    started = time.perf_counter()
    if not options.dry_run:
        check_output(output)
    dumper = dump.Dumper(options.dump_dir)
    check_options(options)
    planned = _plan(open_checkpoint(model, options.rounding), options, dumper, progress)
    if options.dry_run:
        return planned.summary([], None, time.perf_counter() - started)
    compiled = _compiled(planned, options, progress)
    dumper.binaries(compiled)
    # Before the file gets its name, `verify` reads it as a stranger would meet it: by the runtime's own rules.
    size = bundle(Path(output), _content(planned, compiled, options), check=verify, progress=progress)
    return planned.summary(compiled, size, time.perf_counter() - started)


def planned_summary(
    checkpoint: Checkpoint,
    options: BuildOptions,
    context: int | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Summary:
    """What a build of this checkpoint would report, before its weights are there: none is read, and nothing is written.

    context: positions that memory_bytes are for, if not the default. With options.dry_run nothing is compiled, and
    file_bytes is None; otherwise it is exact.
    """
    started = time.perf_counter()
    planned = _plan(checkpoint, options, dump.Dumper(None), progress)
    compiled, size = [], None
    if not options.dry_run:
        compiled = _compiled(planned, options, progress)
        size = bundled_bytes(_content(planned, compiled, options))
    return planned.summary(compiled, size, time.perf_counter() - started, context)


@dataclass(frozen=True)
class _Planned:
    """All that is known before any kernel is compiled. measured: see model_info. sources: family -> kernel name ->
    text."""

    name: str
    tokenizer: str
    template: str | None
    measured: dict | None
    targets: tuple[str, ...]
    program: Program
    counts: ByteCounts
    packing: Packing
    sources: dict[str, dict[str, str]]

    def summary(
        self, compiled: list[Compiled], file_bytes: int | None, seconds: float, context: int | None = None
    ) -> Summary:
        """See Summary.make."""
        program = self.program
        if compiled:
            program = replace(program, binaries=tuple(binary for binary, _ in link(compiled, self.targets)))
        return Summary.make(program, self.counts, self.packing, compiled, self.targets, file_bytes, seconds, context)


def _plan(checkpoint: Checkpoint, options: BuildOptions, dumper: dump.Dumper, progress) -> _Planned:
    targets = check_options(options)

    # The checkpoint names its weights; none is read before the bundle is written.
    name = model_name(checkpoint)
    # They go into the file as they are: better refused now than after minutes of compiling.
    tokenizer, template = tokenizer_json(checkpoint), chat_template(checkpoint)
    quality = measured(checkpoint)

    # From the config alone: the model as torch sees it, then as the compiler's own operators.
    progress("trace", 0, 1)
    traced = trace(checkpoint.config)
    graph = legalize(traced)
    dumper.graph("1-legalized", graph)

    # Before weights are measured: siblings that share an input become one linear.
    weights = Weights(graph, checkpoint, layout_options(checkpoint, options))
    graph = fuse(graph, lambda names: can_stack(weights, names))
    # What is stored as records takes its norms and gates into its kernels.
    graph = fuse_records(
        graph, lambda linear: weights.layout(linear.weights) is RECORDS, lambda linear: weights.can_pair(linear.weights)
    )
    ir.verify(graph)
    graph = limit_context(graph, options.max_context)
    dumper.graph("2-fused", graph)
    progress("trace", 1, 1)

    # How many weights there are, and where, decides kernels and the cut of the work.
    stored_parts = measure_linears(graph, weights)
    packing = pack(graph, weights, stored_parts)
    counts = count_bytes(graph, packing, stored_parts, weights)

    # Each family of targets has a plan of its own: specialize, plan memory, schedule.
    specs, plans = {}, {}
    for family in families(targets):
        made = plan_family(graph, packing, stored_parts, family, options.cache_dtype, options.exact)
        specs[family], plans[family] = made
    program = Program(
        name=name,
        model_class=graph.model_class,
        vocab_size=graph.vocab_size,
        max_context=graph.max_context,
        bos_token_id=bos_token_id(checkpoint),
        eos_token_ids=eos_token_ids(checkpoint),
        kv_dtype=options.cache_dtype,
        kv_layers=kv_layers(graph),
        ropes=ropes(graph, packing),
        plans=plans,
    )
    dumper.text("3-plan.json", json.dumps(json.loads(program.to_json()), indent=1))

    # Text, then machine code: one source per kernel, one binary per kernel and target.
    sources = {
        family: {name: render(family, spec, name) for name, spec in kernels.items()}
        for family, kernels in specs.items()
    }
    dumper.sources(sources)
    return _Planned(name, tokenizer, template, quality, targets, program, counts, packing, sources)


def _compiled(planned: _Planned, options: BuildOptions, progress) -> list[Compiled]:
    cache_dir = default_cache_dir() if options.cache else None
    return compile_all(planned.sources, planned.targets, options.jobs, cache_dir, progress)


def _content(planned: _Planned, compiled: list[Compiled], options: BuildOptions) -> Content:
    # One file: binaries first, so that a reader meets the code before gigabytes of weights.
    linked = link(compiled, planned.targets)
    binaries = tuple(binary for binary, _ in linked)
    return Content(
        name=planned.name,
        program_json=replace(planned.program, binaries=binaries).to_json(),
        compiler_json=canonical_json(compiler_identity(planned.targets, options)),
        facts_json=facts_json(planned.counts.sparsity, planned.measured),
        tokenizer_json=planned.tokenizer,
        chat_template=planned.template,
        tensors=(*code_tensors(linked), *planned.packing.tensors),
    )


def check_options(options: BuildOptions) -> tuple[str, ...]:
    """The targets of a build. Raises InputError for an option that is out of range whatever the model."""
    if options.cache_dtype not in KV_DTYPES:
        raise InputError(f"unknown KV cache type {options.cache_dtype!r}; choose from {', '.join(KV_DTYPES)}")
    return check_targets(options.targets) if options.targets else default_targets()


def open_checkpoint(model: str | Path, rounding: Rounding | None) -> Checkpoint:
    """A compressed checkpoint, or an uncompressed one that is rounded without data on the way."""
    checkpoint = Checkpoint.open(model)
    if checkpoint.compressed:
        if rounding is not None:
            raise InputError(f"{model} is compressed already; build it without --bits, --group-size and --sparsity")
        return checkpoint
    if rounding is None:
        raise InputError(
            f"{model} is not compressed; run `gqsac compress {model} -o OUT` first, or give --bits "
            f"(and --group-size, --sparsity) to round it without calibration data, for trying out"
        )
    return RoundedCheckpoint(checkpoint, rounding)


def can_stack(weights: Weights, names: tuple[str, ...]) -> bool:
    """Whether linears can share one kernel: all dense, all in records, or all with the same streams."""

    def kind(name: str):
        layout = weights.layout((name,))
        if layout is not GROUP_WORDS:
            return layout
        streams = weights.checkpoint.stream_headers(module_of(weights.stored(name)))
        return [(stream.bits, stream.group_size) for stream in streams]

    return all(kind(name) == kind(names[0]) for name in names[1:])


def layout_options(checkpoint: Checkpoint, options: BuildOptions) -> LayoutOptions:
    """What the build asks of layouts. A model that is not compressed keeps its head as it is."""
    dense = options.rounding is not None and options.rounding.bits == 16
    bits = options.head_bits or (16 if options.exact or dense else 8)
    if bits not in HEAD_BITS:
        raise InputError(f"--head-bits is {bits}; choose from {', '.join(map(str, HEAD_BITS))}")
    if options.exact and bits != 16:
        raise InputError("--exact keeps heads and embeddings in 16 bits; leave out --head-bits")
    return LayoutOptions(options.exact, bits)


def limit_context(graph: ir.Graph, max_context: int | None) -> ir.Graph:
    """The graph with a smaller context. Raises InputError for one beyond the model's."""
    if max_context is None:
        return graph
    if not 1 <= max_context <= graph.max_context:
        raise InputError(f"--max-context is {max_context}; this model's positions allow 1 to {graph.max_context}")
    ropes = {
        key: replace(rope, long_inv_freq=None, original_context=None)
        if rope.original_context is not None and rope.original_context >= max_context  # no sequence is so long
        else rope
        for key, rope in graph.ropes.items()
    }
    return replace(graph, max_context=max_context, ropes=ropes)


def compiler_identity(targets: tuple[str, ...], options: BuildOptions) -> dict:
    """What made the file: enough to make it again, byte for byte."""
    return {
        **toolchain(targets),
        "kv_dtype": options.cache_dtype,
        "exact": options.exact,
        "head_bits": options.head_bits,
        "rounding": options.rounding.as_dict() if options.rounding else None,
    }
