"""Sound bounds of a network's outputs: interval and linear bound propagation."""

from fastrobust._record import UnreadableModelError
from fastrobust.bounds.api import METHODS, Bounds, LinearBounds, compute_bounds
from fastrobust.bounds.builder import SUPPORTED, UnsupportedLayerError
from fastrobust.bounds.self_check import ModelMismatchError

__all__ = [
    "METHODS", "SUPPORTED", "Bounds", "LinearBounds", "ModelMismatchError", "UnreadableModelError", "UnsupportedLayerError",
    "compute_bounds",
]  # fmt: skip
