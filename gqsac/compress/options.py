"""What a compression is asked to do: one frozen object that every step reads, checked before any work."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from gqsa_runtime.errors import InputError
from gqsa_runtime.inspect_ import size as in_words

from gqsac.bsr import BITS, GROUP_SIZES
from gqsac.compress.select import ALLOCATIONS, PATTERNS
from gqsac.quantized_matrix import ROW_BITS

# In the order in which they may follow each other; "one-shot" is what the others start from.
STAGES = ("one-shot", "bqpo", "distill", "e2e-oqp")
END_TO_END = ("distill", "e2e-oqp")
REMOVALS = ("at-once", "gradual")
TARGETS = ("target_bpw", "target_size", "target_memory")  # each in place of bits and sparsity
_IN_WORDS = {"target_bpw": "bits per weight", "target_size": "size", "target_memory": "memory"}
# Without a target, and without any of the options below, this many bits per weight: what a model hardly shows,
# one-shot (docs/method.md).
DEFAULT_BPW = 4.5
_WITHOUT_DEFAULT = ("bits", "sparsity", "pattern", "group_size", "quant_group_size", "allocation", "removal", "widths")
GROUP_SIZE = 16
DEFAULT_SPARSITY = 0.02
SCALE_COLUMNS = 64  # that share a scale where nothing else is asked for
MASTER_DTYPES = ("float32", "bfloat16")
_DEFAULT_SAMPLES = {False: 8, True: 128}  # without and with training stages
# Stage -> learning rates (weights, scales). Weights: relative to the root mean square of their linear.
# Scales: relative to each scale. Zeros move with the scales' rate, in units of the whole range of levels.
RATES = {"bqpo": (1e-2, 1e-3), "distill": (8e-3, 2e-3), "e2e-oqp": (0.0, 2e-3)}
# Share of the weights removed, levels -> share of distill's rate: what has lost little is harmed by large steps.
_MILDER = ((0.4, 0, 1.0), (0.2, 4, 0.75), (0.05, 8, 0.375), (0.0, 256, 0.1875))
_OVERHEAD = 0.35  # bits per weight of scales and zeros of 64 columns, in records


@dataclass(frozen=True)
class Options:
    """Every option of `gqsac.compress.run.compress` that changes its result; see there for their meaning.

    With a target of size or memory target_bpw is filled in when the model is known.
    """

    bits: int | None = None
    target_bpw: float | None = None
    target_size: int | None = None
    target_memory: int | None = None
    context: int | None = None
    targets: tuple[str, ...] | None = None
    widths: tuple[int, ...] | None = None
    group_size: int | None = None
    quant_group_size: int | None = None
    sparsity: float | None = None
    pattern: str = "1xG"
    allocation: str | None = None
    removal: str | None = None
    skip: tuple[str, ...] = ()
    damping: float = 0.01
    seed: int = 0
    samples: int | None = None
    seq_len: int | None = None
    stages: tuple[str, ...] = ("one-shot",)
    epochs: int = 5
    e2e_steps: int | tuple[int, ...] | None = None
    minutes: float | tuple[float, ...] | None = None
    train_samples: int | None = None
    batch_tokens: int | None = None
    distill: float = 0.0
    master_dtype: str = "float32"
    weight_lr: float | None = None
    scale_lr: float | None = None
    learn_embeddings: bool = False

    @property
    def training(self) -> tuple[str, ...]:
        """The stages that train, in order."""
        return tuple(stage for stage in self.stages if stage != "one-shot")

    @property
    def end_to_end(self) -> tuple[str, ...]:
        """The stages that train the whole model at once, in order."""
        return tuple(stage for stage in self.stages if stage in END_TO_END)

    @property
    def unit(self) -> int:
        """Columns that are kept or removed together."""
        return 1 if self.pattern == "2:4" else self.group_size

    @property
    def by_rows(self) -> bool:
        """Whether widths are chosen row by row under a target."""
        return any(getattr(self, name) is not None for name in TARGETS)

    @property
    def zeros_between_levels(self) -> bool:
        """Whether zeros may lie between two levels, see grid.py."""
        return self.by_rows

    @property
    def mean_bits(self) -> float:
        """Bits of a weight's level, about."""
        return self.bits if not self.by_rows else max(1.0, self.target_bpw - _OVERHEAD)

    def rates(self, stage: str) -> tuple[float, float]:
        """Learning rates of a stage's weights and scales, see RATES. 0.0: they do not learn there."""
        weights, scales = RATES[stage]
        if stage == "distill":
            weights *= self._share_of_rate()
        if self.weight_lr is not None and weights:
            weights = self.weight_lr
        return weights, scales if self.scale_lr is None else self.scale_lr

    def _share_of_rate(self) -> float:
        if self.by_rows:  # as of the uniform width of that size, and between
            return min(1.0, max(_MILDER[-1][2], 0.75 * 2 ** (2 - (self.target_bpw - _OVERHEAD))))
        removed = 0.5 if self.pattern == "2:4" else self.sparsity
        return next(share for least, levels, share in _MILDER if removed >= least or 1 << self.bits <= levels)

    def removes_gradually(self, stage: str) -> bool:
        """Whether groups go, and are chosen anew, while the stage trains; otherwise it keeps the mask it finds."""
        if self.removal is None:
            return stage == "distill" and "bqpo" not in self.stages
        return self.removal == "gradual"

    def seconds(self, stage: str) -> float | None:
        """Training time of a stage at most."""
        return None if self.minutes is None else 60 * self.minutes[self.training.index(stage)]

    def steps(self, stage: str) -> int | None:
        """Steps of an end-to-end stage at most."""
        return None if self.e2e_steps is None else self.e2e_steps[self.end_to_end.index(stage)]

    def identity(self) -> dict:
        """What a resumed run must share with the one that was stopped. Learning rates are left out, so
        that a run that diverged can go on with lower ones."""
        left_out = {"weight_lr", "scale_lr"}
        if self.target_size is not None or self.target_memory is not None:
            left_out.add("target_bpw")  # which follows
        return {key: value for key, value in asdict(self).items() if key not in left_out}


def target_in_words(options: Options) -> str:
    """What a compression aims at, in a line. options: as `checked` and the model have filled them in."""
    o = options
    if not o.by_rows:
        removed = "two of every four weights" if o.pattern == "2:4" else f"{o.sparsity:.1%} of groups of {o.group_size}"
        return f"{o.bits} bits for every weight, {removed} removed"
    rows = f"rows of {', '.join(map(str, o.widths))} bits"
    for n_bytes, what in (o.target_size, "the built file"), (o.target_memory, "the memory of a run"):
        if n_bytes is not None:
            return f"{in_words(n_bytes)} for {what}, {rows}"
    return f"{o.target_bpw:.2f} bits per weight, {rows}"


def with_scale_groups(options: Options, columns: Iterable[int]) -> Options:
    """The options with the quantisation group size for linears of these columns, where none was asked for.

    64 columns share a scale if that is possible: the fastest kernels read such weights, and a scale for each 16 costs
    1.25 bits a weight more and gains little (docs/results.md).
    """
    if options.quant_group_size is not None:
        return options
    shared = max(SCALE_COLUMNS, options.group_size)
    fits = all(count % shared == 0 for count in columns)
    return replace(options, quant_group_size=shared if fits else options.group_size)


def checked(options: Options) -> Options:
    """The options with their defaults filled in. Raises InputError for the first that is out of range."""
    o = options = _with_widths(options)
    if not o.by_rows and o.bits not in BITS:
        raise InputError(f"bits is {o.bits}, expected one of {', '.join(map(str, BITS))}")
    if o.group_size not in GROUP_SIZES:
        raise InputError(f"the group size is {o.group_size}, expected one of {', '.join(map(str, GROUP_SIZES))}")
    if o.quant_group_size is not None and (o.quant_group_size < 1 or o.quant_group_size % o.group_size):
        raise InputError(
            f"the quantisation group size is {o.quant_group_size}, expected a multiple of the group size {o.group_size}"
        )
    if o.pattern not in PATTERNS:
        raise InputError(f"the pattern is {o.pattern!r}, expected one of {', '.join(PATTERNS)}")
    if o.pattern == "2:4" and o.sparsity not in (None, 0.5):
        raise InputError(f"sparsity is {o.sparsity}, but the pattern 2:4 removes exactly 0.5; leave the sparsity out")
    if o.pattern == "2:4" and o.allocation not in (None, "row"):
        raise InputError(f"allocation is {o.allocation!r}, but the pattern 2:4 leaves no choice; leave it out")
    sparsity = (0.5 if o.pattern == "2:4" else DEFAULT_SPARSITY) if o.sparsity is None else o.sparsity
    if not 0 <= sparsity < 1:
        raise InputError(f"sparsity is {sparsity}, expected a share of groups to remove from 0 to below 1")
    allocation = ("global" if o.training and o.pattern == "1xG" else "row") if o.allocation is None else o.allocation
    if allocation not in ALLOCATIONS:
        raise InputError(f"allocation is {allocation!r}, expected one of {', '.join(ALLOCATIONS)}")
    if o.removal not in (None, *REMOVALS):
        raise InputError(f"removal is {o.removal!r}, expected one of {', '.join(REMOVALS)}")
    if o.master_dtype not in MASTER_DTYPES:
        raise InputError(f"the master dtype is {o.master_dtype!r}, expected one of {', '.join(MASTER_DTYPES)}")
    if o.seq_len is not None and o.seq_len < 2:
        raise InputError(f"the sample length is {o.seq_len} tokens, expected at least 2")
    if not 0 <= o.seed < 2**63:
        raise InputError(f"the seed is {o.seed}, expected 0 or more and below 2**63")
    if not 0 < o.damping <= 1:
        raise InputError(f"damping is {o.damping}, expected above 0 and at most 1")
    if not 0 <= o.distill <= 1:
        raise InputError(f"distill is {o.distill}, expected a share of the loss from 0 to 1")
    _check_stages(o.stages)
    samples = _DEFAULT_SAMPLES[bool(o.training)] if o.samples is None else o.samples
    train_samples = samples if o.train_samples is None else o.train_samples
    e2e_steps = _one_for_each("e2e_steps", o.e2e_steps, o.end_to_end, "end-to-end")
    counts = [("samples", samples), ("train_samples", train_samples), ("epochs", o.epochs)]
    counts.append(("batch_tokens", o.batch_tokens))
    for name, value in counts:
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}, expected at least 1")
    minutes = _one_for_each("minutes", o.minutes, o.training, "training")
    for name, value in (("weight_lr", o.weight_lr), ("scale_lr", o.scale_lr)):
        if value is not None:
            _check_positive(name, value)
    filled = {
        "allocation": allocation,
        "e2e_steps": e2e_steps,
        "minutes": minutes,
        "samples": samples,
        "skip": tuple(o.skip),
        "sparsity": float(sparsity),
        "stages": tuple(o.stages),
        "targets": tuple(o.targets) if o.targets else None,
        "train_samples": train_samples,
    }
    return Options(**{**asdict(o), **filled})


def _with_widths(options: Options) -> Options:
    """The options with what a target, or its absence, settles. Raises InputError for what contradicts it."""
    o = options
    if all(getattr(o, name) in (None, "1xG") for name in (*TARGETS, *_WITHOUT_DEFAULT)):
        o = replace(o, target_bpw=DEFAULT_BPW)
    o = replace(o, group_size=GROUP_SIZE if o.group_size is None else o.group_size)
    given = [name for name in TARGETS if getattr(o, name) is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} are given, and each is a target of its own; give one of them")
    if o.context is not None and o.target_memory is None:
        raise InputError(f"the context is {o.context}, but only a target of memory depends on it; leave it out")
    if o.targets and given not in (["target_size"], ["target_memory"]):
        raise InputError(
            "targets of the build are given, but only a target of size or memory depends on them; leave them out"
        )
    if not given:
        if o.widths is not None:
            raise InputError("widths are given, but no target of bits per weight; give one, or leave the widths out")
        return replace(o, bits=4 if o.bits is None else o.bits)
    _check_positive(given[0], getattr(o, given[0]))
    if o.context is not None:
        _check_positive("context", o.context)
    if o.bits is not None:
        raise InputError(
            f"bits is {o.bits}, but a target of {_IN_WORDS[given[0]]} chooses them row by row; leave them out"
        )
    if o.sparsity or o.pattern != "1xG":
        raise InputError(
            f"a target of {_IN_WORDS[given[0]]} is met by the widths of rows, and nothing is removed; leave out "
            "sparsity and pattern"
        )
    widths = ROW_BITS if o.widths is None else tuple(sorted(set(o.widths)))
    unknown = [width for width in widths if width not in ROW_BITS]
    if unknown or not widths:
        raise InputError(f"widths has {(unknown or ['none'])[0]}, expected some of {', '.join(map(str, ROW_BITS))}")
    if o.quant_group_size is not None and o.quant_group_size % SCALE_COLUMNS:
        raise InputError(
            f"the quantisation group size is {o.quant_group_size}, but rows of different widths are stored with a "
            f"scale for {SCALE_COLUMNS} columns or a multiple; leave it out"
        )
    return replace(o, widths=widths, sparsity=0.0)


def _one_for_each(name: str, value, stages: tuple[str, ...], kind: str) -> tuple | None:
    """A value for each of the stages from one for all, or from as many. Raises InputError for another number."""
    if value is None:
        return None
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    for part in values:
        _check_positive(name, part)
    if len(values) == 1:
        values *= len(stages)
    if len(values) != len(stages):
        raise InputError(
            f"{name} has {len(values)} values, expected one, or one for each of the {len(stages)} {kind} stages"
        )
    return values


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise InputError(f"{name} is {value}, expected a number above 0")


def _check_stages(stages: tuple[str, ...]) -> None:
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown or not stages:
        raise InputError(f"the stage {(unknown or [''])[0]!r} is unknown, expected some of {', '.join(STAGES)}")
    order = [STAGES.index(stage) for stage in stages]
    if order != sorted(set(order)):
        raise InputError(f"the stages {','.join(stages)} are out of order, expected the order {', '.join(STAGES)}")
