"""Other constants of the compiler for a while, to try geometries out."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from gqsac.compiler import cuda_launch, records_launch


@contextmanager
def changed_constants(changes: Iterable[str]) -> Iterator[None]:
    """Sets constants of gqsac.compiler.cuda_launch and records_launch for the length of a `with` block.

    changes: NAME=VALUE, the value as Python writes it. Raises ValueError for a name that neither has.
    """
    before = {module: dict(vars(module)) for module in (cuda_launch, records_launch)}
    try:
        for change in changes:
            name, _, value = change.partition("=")
            having = [module for module in before if hasattr(module, name)]
            if not having:
                raise ValueError(f"{name} is no constant of cuda_launch or records_launch")
            for module in having:
                setattr(module, name, eval(value))
        yield
    finally:
        for module, values in before.items():
            vars(module).update(values)
