"""Sound bounds of a network's outputs: interval and linear bound propagation."""

from fastrobust.bounds.api import METHODS, Bounds, LinearBounds, compute_bounds
from fastrobust.bounds.builder import SUPPORTED, UnsupportedLayerError

__all__ = ["METHODS", "SUPPORTED", "Bounds", "LinearBounds", "UnsupportedLayerError", "compute_bounds"]
