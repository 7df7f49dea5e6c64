"""The `quantization_config` entry of a compressed checkpoint's config.json, as data.

It holds what the tensors cannot say themselves: the group size, the shape of each compressed linear
and how the checkpoint was made. Bit widths are not needed to read a checkpoint, they follow from the
width of `values`; `bits` here is for people.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gqsa_runtime.errors import FormatError

from gqsac.bsr import BITS, GROUP_SIZES

QUANT_METHOD = "gqsa"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class QuantizationConfig:
    """bits: of the kept groups' weights. group_size: G, columns per group. sparsity: share of groups removed.

    skip: patterns of linears that were left dense. shapes: compressed module -> (rows, columns).
    details: how the checkpoint was made (calibration, seed, …), for people and tools.
    """

    bits: int
    group_size: int
    sparsity: float
    skip: tuple[str, ...] = ()
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    details: dict = field(default_factory=dict)

    def to_dict(self) -> dict:
        """The JSON object that stands in config.json."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "bits": self.bits,
            "group_size": self.group_size,
            "sparsity": self.sparsity,
            "skip": list(self.skip),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "details": self.details,
        }

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
        if version != FORMAT_VERSION:
            raise FormatError(
                f"{where}: checkpoint format version {version!r}, this gqsac reads version {FORMAT_VERSION}; "
                "compress the model again with this gqsac, or install the gqsac that wrote it"
            )
        bits, group_size, sparsity = raw.get("bits"), raw.get("group_size"), raw.get("sparsity")
        if bits not in BITS or isinstance(bits, bool):
            raise FormatError(f"{where}: bits is {bits!r}, expected one of {', '.join(map(str, BITS))}")
        if group_size not in GROUP_SIZES:
            raise FormatError(
                f"{where}: group_size is {group_size!r}, expected one of {', '.join(map(str, GROUP_SIZES))}"
            )
        if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
            raise FormatError(f"{where}: sparsity is {sparsity!r}, expected a number from 0 to below 1")
        skip, details = raw.get("skip", []), raw.get("details", {})
        if not isinstance(skip, list) or not all(isinstance(name, str) for name in skip):
            raise FormatError(f"{where}: skip is {skip!r}, expected a list of names")
        if not isinstance(details, dict):
            raise FormatError(f"{where}: details is {type(details).__name__}, expected an object")
        shapes = raw.get("shapes")
        if not isinstance(shapes, dict):
            raise FormatError(f"{where}: shapes is {type(shapes).__name__}, expected an object of [rows, columns]")
        for name, shape in shapes.items():
            whole = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
            if not whole or shape[1] % group_size:
                raise FormatError(
                    f"{where}: the shape of {name} is {shape!r}, expected [rows, columns] with columns "
                    f"a multiple of the group size {group_size}"
                )
        return cls(
            bits=bits,
            group_size=group_size,
            sparsity=float(sparsity),
            skip=tuple(skip),
            shapes={name: (shape[0], shape[1]) for name, shape in shapes.items()},
            details=details,
        )
