"""The registry of weight layouts. A new one is a file here, a CUDA and a C header, and a line below."""

from gqsa_runtime.layouts.base import ContentRule, Layout, Part
from gqsa_runtime.layouts.dense_f16 import DenseF16
from gqsa_runtime.layouts.group_words import GroupWords
from gqsa_runtime.layouts.records import Records

DENSE_F16, GROUP_WORDS, RECORDS = DenseF16(), GroupWords(), Records()

LAYOUTS: tuple[Layout, ...] = (DENSE_F16, GROUP_WORDS, RECORDS)

__all__ = ["DENSE_F16", "GROUP_WORDS", "LAYOUTS", "RECORDS", "ContentRule", "Layout", "Part"]
