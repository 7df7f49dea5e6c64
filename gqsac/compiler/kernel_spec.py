"""A kernel as data: what its template needs and nothing more. Equal specs compile once."""

from dataclasses import dataclass

# Short words for parameters, in the order in which they appear in a kernel's name.
_VOCABULARY = {
    "tokens": "t",
    "bits": "w",
    "group_size": "g",
    "rows": "r",
    "k": "k",
    "width": "n",
    "heads": "h",
    "kv_heads": "kv",
    "head_dim": "d",
    "vocab": "v",
}


@dataclass(frozen=True)
class KernelSpec:
    """op: key of gqsa_runtime.operators.OPERATORS, also the template's file name.

    params: sorted (name, value) pairs of the constants that `OPERATORS` lists for the operator.
    """

    op: str
    params: tuple[tuple[str, int | float | str | bool], ...]

    @classmethod
    def make(cls, op: str, **params) -> "KernelSpec":
        return cls(op, tuple(sorted(params.items())))

    def __getitem__(self, name: str):
        return dict(self.params)[name]


def name_kernels(specs: list[KernelSpec]) -> dict[KernelSpec, str]:
    """Unique C identifiers that spell each kernel's main parameters; a count tells twins apart."""
    names: dict[KernelSpec, str] = {}
    taken: dict[str, int] = {}
    for spec in specs:
        if spec in names:
            continue
        params = dict(spec.params)
        words = [f"{short}{params[key]}" for key, short in _VOCABULARY.items() if key in params]
        stem = "_".join([spec.op, *words])
        count = taken[stem] = taken.get(stem, 0) + 1
        names[spec] = stem if count == 1 else f"{stem}_{count}"
    return names
