"""Sound bounds of a network's outputs: interval and linear bound propagation."""

from fastrobust._record import UnreadableModelError
from fastrobust.bounds.api import METHODS, Bounds, LinearBounds, compute_bounds
from fastrobust.bounds.builder import SUPPORTED, UnsupportedLayerError
from fastrobust.bounds.decisions import WAYS, ways
from fastrobust.bounds.explain import Explanation, explain
from fastrobust.bounds.self_check import ModelMismatchError
from fastrobust.bounds.slopes import SlopeSearch

__all__ = [
    "METHODS", "SUPPORTED", "WAYS", "Bounds", "Explanation", "LinearBounds", "ModelMismatchError", "SlopeSearch",
    "UnreadableModelError",    "UnsupportedLayerError", "compute_bounds", "explain", "ways",
]  # fmt: skip
