"""gqsac: an ahead-of-time compiler for GQSA-compressed language models.

Importing it makes transformers able to load compressed checkpoints (`quant_method` "gqsa"): at once if
transformers' quantisers are already imported, otherwise when they are, so that `import gqsac` itself
stays cheap and needs neither torch nor transformers.
"""

import importlib.abc
import importlib.machinery
import sys

__version__ = "0.1.0"

_QUANTIZERS = "transformers.quantizers.auto"


class _RegisterOnImport(importlib.abc.MetaPathFinder):
    """Lets the import of transformers' quantisers run as usual, then registers ours."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != _QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        run_module = spec.loader.exec_module

        def exec_module(module):
            run_module(module)
            _register()

        spec.loader.exec_module = exec_module
        return spec


def _register():
    from gqsac.transformers_integration import register

    register()


if _QUANTIZERS in sys.modules:
    _register()
elif not any(isinstance(finder, _RegisterOnImport) for finder in sys.meta_path):
    sys.meta_path.insert(0, _RegisterOnImport())
