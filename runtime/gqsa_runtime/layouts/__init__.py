"""The registry of weight layouts. A new one is a file here, a CUDA and a C header, and a line below."""

from gqsa_runtime.layouts.base import ContentRule, Layout, Part
from gqsa_runtime.layouts.dense_f16 import DenseF16
from gqsa_runtime.layouts.group_words import GroupWords

DENSE_F16, GROUP_WORDS = DenseF16(), GroupWords()

# Operator -> the layout that its kernels read.
LAYOUTS: dict[str, Layout] = {layout.op: layout for layout in (DENSE_F16, GROUP_WORDS)}

__all__ = ["DENSE_F16", "GROUP_WORDS", "LAYOUTS", "ContentRule", "Layout", "Part"]
