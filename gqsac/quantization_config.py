"""The `quantization_config` entry of a compressed checkpoint's config.json, as data.

It holds what the tensors cannot say themselves: the shape and the group sizes of each compressed linear, and how
the checkpoint was made. Widths are not needed to read a checkpoint, they follow from its tensors; `bits` here is
for people.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gqsa_runtime.errors import FormatError

from gqsac.bsr import BITS, GROUP_SIZES

QUANT_METHOD = "gqsa"
FORMAT_VERSION = 2  # written; 1, of BSR streams alone, is read too
STREAMS_VERSION = 1
_MOST_BITS = 8


@dataclass(frozen=True)
class QuantizationConfig:
    """bits: of a kept weight, on average where rows or linears differ. group_size: G, columns that are kept or removed
    together. sparsity: share of groups removed.

    skip: patterns of linears that were left dense. shapes: compressed module -> (rows, columns).
    details: how the checkpoint was made (calibration, seed, …), for people and tools.
    quant_group_size: Q, columns that share a scale, by default G. group_sizes: module -> its own (G, Q).
    """

    bits: float
    group_size: int
    sparsity: float
    skip: tuple[str, ...] = ()
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    details: dict = field(default_factory=dict)
    quant_group_size: int | None = None
    group_sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def group_sizes_of(self, module: str) -> tuple[int, int]:
        """G and Q of a compressed module."""
        return self.group_sizes.get(module, (self.group_size, self.quant_group_size or self.group_size))

    def to_dict(self) -> dict:
        """The JSON object that stands in config.json."""
        common = {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "bits": self.bits,
            "group_size": self.group_size,
            "sparsity": self.sparsity,
            "skip": list(self.skip),
        }
        if self.format_version == STREAMS_VERSION:
            return common | {"shapes": {name: list(s) for name, s in self.shapes.items()}, "details": self.details}
        modules = {name: {"shape": list(shape)} for name, shape in self.shapes.items()}
        for name, (group_size, quant_group_size) in self.group_sizes.items():
            modules[name] |= {"group_size": group_size, "quant_group_size": quant_group_size}
        quant_group_size = self.quant_group_size or self.group_size
        return common | {"quant_group_size": quant_group_size, "modules": modules, "details": self.details}

    @classmethod
    def from_dict(cls, raw: dict, where: str = "config.json") -> QuantizationConfig:
        """Checks and reads the JSON object. Raises FormatError that names `where` and the bad entry."""
        if not isinstance(raw, dict):
            raise FormatError(f"{where}: quantization_config is {type(raw).__name__}, expected an object")
        method = raw.get("quant_method")
        if method != QUANT_METHOD:
            raise FormatError(
                f"{where}: the weights are stored as {method!r}, expected {QUANT_METHOD!r}; "
                "run `gqsac compress` on the uncompressed model"
            )
        version = raw.get("format_version")
        if type(version) is not int or version not in (STREAMS_VERSION, FORMAT_VERSION):
            raise FormatError(
                f"{where}: checkpoint format version {version!r}, this gqsac reads versions {STREAMS_VERSION} and "
                f"{FORMAT_VERSION}; compress the model again with this gqsac, or install the gqsac that wrote it"
            )
        sparsity = raw.get("sparsity")
        if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
            raise FormatError(f"{where}: sparsity is {sparsity!r}, expected a number from 0 to below 1")
        skip, details = raw.get("skip", []), raw.get("details", {})
        if not isinstance(skip, list) or not all(isinstance(name, str) for name in skip):
            raise FormatError(f"{where}: skip is {skip!r}, expected a list of names")
        if not isinstance(details, dict):
            raise FormatError(f"{where}: details is {type(details).__name__}, expected an object")
        read = _read_streams if version == STREAMS_VERSION else _read_matrices
        return cls(
            sparsity=float(sparsity), skip=tuple(skip), details=details, format_version=version, **read(raw, where)
        )


def _read_streams(raw: dict, where: str) -> dict:
    """The fields that stand otherwise in version 1."""
    bits, group_size = raw.get("bits"), _group_size(raw, where)
    if bits not in BITS or isinstance(bits, bool):
        raise FormatError(f"{where}: bits is {bits!r}, expected one of {', '.join(map(str, BITS))}")
    shapes = raw.get("shapes")
    if not isinstance(shapes, dict):
        raise FormatError(f"{where}: shapes is {type(shapes).__name__}, expected an object of [rows, columns]")
    for name, shape in shapes.items():
        _check_shape(shape, group_size, f"{where}: the shape of {name}")
    return {"bits": bits, "group_size": group_size, "shapes": {name: tuple(shape) for name, shape in shapes.items()}}


def _read_matrices(raw: dict, where: str) -> dict:
    """The fields that stand otherwise in version 2."""
    bits = raw.get("bits")
    if isinstance(bits, bool) or not isinstance(bits, (int, float)) or not 1 <= bits <= _MOST_BITS:
        raise FormatError(f"{where}: bits is {bits!r}, expected a number from 1 to {_MOST_BITS}")
    group_size = _group_size(raw, where)
    quant_group_size = _quant_group_size(raw, group_size, where)
    modules = raw.get("modules")
    if not isinstance(modules, dict):
        raise FormatError(f"{where}: modules is {type(modules).__name__}, expected an object of compressed linears")
    shapes, group_sizes = {}, {}
    for name, entry in modules.items():
        if not isinstance(entry, dict):
            raise FormatError(f"{where}: the entry of {name} is {entry!r}, expected an object with its shape")
        own = {"group_size": group_size, "quant_group_size": quant_group_size} | entry
        sizes = _group_size(own, f"{where}: {name}"), _quant_group_size(own, own["group_size"], f"{where}: {name}")
        _check_shape(entry.get("shape"), max(sizes), f"{where}: the shape of {name}")
        shapes[name] = tuple(entry["shape"])
        if sizes != (group_size, quant_group_size):
            group_sizes[name] = sizes
    return {
        "bits": bits,
        "group_size": group_size,
        "quant_group_size": quant_group_size,
        "shapes": shapes,
        "group_sizes": group_sizes,
    }


def _group_size(raw: dict, where: str) -> int:
    group_size = raw.get("group_size")
    if type(group_size) is not int or group_size not in GROUP_SIZES:
        raise FormatError(f"{where}: group_size is {group_size!r}, expected one of {', '.join(map(str, GROUP_SIZES))}")
    return group_size


def _quant_group_size(raw: dict, group_size: int, where: str) -> int:
    size = raw.get("quant_group_size", group_size)
    if type(size) is not int or size < 1 or (size % group_size and group_size % size):
        raise FormatError(
            f"{where}: quant_group_size is {size!r}, expected a multiple or a divisor of the group size {group_size}"
        )
    return size


def _check_shape(shape, group_size: int, where: str) -> None:
    """where: begins the message, and what the shape is of."""
    whole = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
    if not whole or shape[1] % group_size:
        raise FormatError(
            f"{where} is {shape!r}, expected [rows, columns] with columns a multiple of the group size {group_size}"
        )
