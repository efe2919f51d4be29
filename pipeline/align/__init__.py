"""Bring a teacher's keys and values to a student's heads, dims, layers and length.

The quick-fix API (`KVProjector` and the functions on the time axis) works on any tensors; `Alignment` is the record the store
keeps. Knows no model and no store.
"""

from pipeline.align.alignment import Alignment, Comparison
from pipeline.align.layers import choose_student_layers, default_student_layers
from pipeline.align.projectors import KVDimensionProjector, KVProjector
from pipeline.align.time import build_safe_linear_indices, resample_kv_with_interpolation, safe_time_resample

__all__ = [
    "Alignment",
    "Comparison",
    "KVDimensionProjector",
    "KVProjector",
    "build_safe_linear_indices",
    "choose_student_layers",
    "default_student_layers",
    "resample_kv_with_interpolation",
    "safe_time_resample",
]
