"""Distances to polyhedra."""

from .distance import polyhedral_distance

__all__ = ["polyhedral_distance"]
