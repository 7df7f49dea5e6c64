"""A quality comparison of many checkpoints: its rows, what each of them costs in bits, and its table."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gqsa_runtime.errors import FormatError, InputError, ModelError

from gqsac.evaluate.load import is_artifact
from gqsac.model_folder import read_json

DENSE_BITS = 16.0  # of a source that gqsac did not compress, whatever type its file stores
REFERENCE, UNIFORM, TWO_FOUR, GQSA = "fp16", "INT, no sparsity", "2:4 + INT4", "GQSA, 1xG groups"


@dataclass(frozen=True)
class Entry:
    """A checkpoint to compare. path: what `gqsac eval` takes. series: points of a plot that belong together.

    bits_per_weight: where given, in place of what `bits_per_weight` finds.
    """

    label: str
    path: str
    series: str
    bits_per_weight: float | None = None


@dataclass
class Row:
    """What is known of an entry so far. tasks: name -> fields of TaskResult. error: of what failed, by stage.

    perplexity: fields of PerplexityResult. divergence: fields of Divergence. file_bytes: of the built file.
    """

    label: str
    path: str
    series: str
    fingerprint: str
    bits_per_weight: float | None = None
    perplexity: dict | None = None
    divergence: dict | None = None
    file_bytes: int | None = None
    tasks: dict[str, dict] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def is_finished(self, tasks: Sequence[str]) -> bool:
        """Whether nothing is left to measure, failures counted as left."""
        return self.bits_per_weight is not None and self.perplexity is not None and set(tasks) <= set(self.tasks)


def read_entries(sources: Sequence[str]) -> list[Entry]:
    """Entries from arguments, each LABEL=PATH, a folder of checkpoints, or a JSON list of Entry fields.

    A folder gives an entry for each model folder, .gqsa and .gguf file in it, labelled by its name. Raises
    InputError where one is none of these, or two have one label.
    """
    entries: list[Entry] = []
    for source in sources:
        label, equals, path = source.partition("=")
        if equals and not Path(source).exists():
            if not label or not path:
                raise InputError(f"{source!r} is no LABEL=PATH")
            entries.append(Entry(label, path, series_of(label)))
        elif source.endswith(".json"):
            entries += _listed(Path(source))
        elif Path(source).is_dir() and not _is_model(Path(source)):
            found = [path for path in sorted(Path(source).iterdir()) if _is_model(path)]
            if not found:
                raise InputError(f"{source} holds no model folders, .gqsa or .gguf files")
            entries += [Entry(path.stem, str(path), series_of(path.stem)) for path in found]
        else:
            raise InputError(
                f"{source!r} is no LABEL=PATH, no folder of checkpoints and no .json list; "
                "give a single checkpoint a label"
            )
    labels = [entry.label for entry in entries]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"the label {label!r} stands for {labels.count(label)} checkpoints; labels must differ")
    return entries


def series_of(label: str) -> str:
    """The series that a label such as "fp16", "W3 g64", "2:4 + W4" or "W4 S50" speaks of."""
    if re.search(r"2[:_-]4", label):
        return TWO_FOUR
    if re.search(r"(?<![A-Za-z])[Ss]\d|1x\d", label):
        return GQSA
    if re.search(r"(?<![A-Za-z])([Ww]|INT|int)\d", label):
        return UNIFORM
    return REFERENCE


def fingerprint(path: str) -> str:
    """What changes when a checkpoint is written anew: sizes and times of its config and weights."""
    root = Path(path)
    files = sorted(root.glob("*")) if root.is_dir() else [root] if root.is_file() else []
    facts = [
        f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}"
        for file in files
        if file == root or file.name == "config.json" or file.suffix in (".safetensors", ".bin")
    ]
    return " ".join(facts)


def bits_per_weight(path: str, count: str = "built") -> float:
    """Bits per weight of the compressed linears, scales, zeros and indices counted.

    count: "built" is what a .gqsa file stores, or what `gqsac build` would make of a folder; "coded" is what the
    method itself needs by the usual count, as a compressed folder's report.json has it: the fair one for formats
    that no kernel here packs, such as 2:4. DENSE_BITS for a source that is not compressed. Raises FormatError
    or ModelError where the source is damaged or does not know the count, UnsupportedError where it cannot be built.
    """
    if is_artifact(path):
        if count == "coded":
            raise ModelError(f"{path} is compiled, so its bits are those that it stores; count them as built")
        from gqsa_runtime.inspect_ import describe
        from gqsa_runtime.reader import ArtifactFile
        from gqsa_runtime.validate import validate

        with ArtifactFile.open(path) as file:
            validate(file.program, file.tensors)
            return describe(file)["linears"]["bits_per_weight"] or DENSE_BITS
    folder = Path(path)
    if not folder.is_dir() or not read_json(folder / "config.json").get("quantization_config"):
        return DENSE_BITS
    if count == "coded":
        file = folder / "report.json"
        coded = read_json(file).get("coded_bits_per_weight") if file.is_file() else None
        if not isinstance(coded, (int, float)) or not coded > 0:
            raise ModelError(f"{file} does not give coded_bits_per_weight; count the bits as built, or list them")
        return float(coded)
    from gqsac.compiler.pipeline import BuildOptions, build

    # Plans alone are made, the same for every target.
    return build(folder, None, BuildOptions(targets=("sm_80",), dry_run=True)).counts.bits_per_weight


def table(rows: Sequence[Row], tasks: Sequence[str] = ()) -> str:
    """The comparison in Markdown, from most to fewest bits; accuracies in percent, the normalised ones if any."""
    reference = next((row.perplexity["perplexity"] for row in rows if row.series == REFERENCE and row.perplexity), None)
    lines = [
        "| model | bits per weight | perplexity | relative |" + "".join(f" {name} |" for name in tasks),
        "|---|---|---|---|" + "---|" * len(tasks),
    ]
    for row in sorted(rows, key=lambda row: -(row.bits_per_weight or math.inf)):
        bits = "-" if row.bits_per_weight is None else f"{row.bits_per_weight:.2f}"
        value = row.perplexity["perplexity"] if row.perplexity else None
        ratio = "-" if value is None or not reference else f"{value / reference:.2f}"
        cells = [row.label, bits, _perplexity(value), ratio]
        cells += [_accuracy(row.tasks.get(name), name in row.errors) for name in tasks]
        if "load" in row.errors or "perplexity" in row.errors:
            cells[2] = "failed"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def save(path: Path, settings: dict, rows: Sequence[Row]) -> None:
    """Writes results as JSON, whole or not at all."""
    part = path.with_name(path.name + ".part")
    # A perplexity may be infinite, which JSON cannot say: it becomes null, and the row's table cell "inf".
    value = {"settings": settings, "rows": [_finite(asdict(row)) for row in rows]}
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)


def load(path: Path, settings: dict) -> dict[str, Row]:
    """Rows of an earlier run by label, {} without one. Raises InputError where its settings were others."""
    if not path.is_file():
        return {}
    raw = read_json(path)
    try:
        rows = [Row(**row) for row in raw["rows"]]
        before = dict(raw["settings"])
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path} holds no results of this script ({error}); choose another output folder") from None
    for key in {**before, **settings}:
        if before.get(key) != settings.get(key):
            raise InputError(
                f"{path} was made with {key} {before.get(key)!r}, and now {settings.get(key)!r} is asked for; "
                "choose another output folder"
            )
    for row in rows:
        if row.perplexity and row.perplexity["perplexity"] is None:
            row.perplexity["perplexity"] = math.inf
    return {row.label: row for row in rows}


def _listed(path: Path) -> list[Entry]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error})") from None
    entries = []
    for number, item in enumerate(raw if isinstance(raw, list) else [raw]):
        known = {"label", "path", "series", "bits_per_weight"}
        if not isinstance(item, dict) or not {"label", "path"} <= set(item) <= known:
            raise InputError(f"{path}: entry {number} is {item!r}, expected label, path and, where wanted, series "
                             "and bits_per_weight")  # fmt: skip
        entries.append(Entry(**{"series": series_of(item["label"]), **item}))
    return entries


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file() if path.is_dir() else path.suffix in (".gqsa", ".gguf")


def _finite(raw: dict) -> dict:
    perplexity = raw["perplexity"]
    if perplexity and math.isinf(perplexity["perplexity"]):
        raw["perplexity"] = {**perplexity, "perplexity": None}
    return raw


def _perplexity(value: float | None) -> str:
    if value is None:
        return "-"
    return "inf" if math.isinf(value) else f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def _accuracy(result: dict | None, failed: bool) -> str:
    if result is None:
        return "failed" if failed else "-"
    key = "acc" if result["acc_norm"] is None else "acc_norm"
    error = result[f"{key}_stderr"]
    return f"{100 * result[key]:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
