"""Writes the reference of the Python API as HTML, from docstrings: `python -m tools.reference FOLDER`.

Raises a warning of pdoc's, for instance about a name that cannot be found, as an error.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import gqsa_runtime
import pdoc


def write(folder: Path) -> Path:
    """Makes the reference of the names in `gqsa_runtime.__all__`; returns its page."""
    for name in gqsa_runtime.__all__:
        setattr(gqsa_runtime, name, getattr(gqsa_runtime, name))  # pdoc does not see what is loaded when first used
    pdoc.render.configure(
        docformat="markdown", show_source=False, footer_text=f"gqsa-runtime {gqsa_runtime.__version__}"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pdoc.pdoc("gqsa_runtime", "!gqsa_runtime[.]", output_directory=folder)
    return folder / "gqsa_runtime.html"


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
