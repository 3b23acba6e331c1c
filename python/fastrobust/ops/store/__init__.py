"""Perturbations of a data set, and the moves of its images that they follow."""

from .perturbations import shift_flip, store_gather, store_scatter

__all__ = ["shift_flip", "store_gather", "store_scatter"]
