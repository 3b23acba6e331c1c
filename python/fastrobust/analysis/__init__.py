"""What a robust model and its training look like from inside."""

from . import (
    connectivity,
    convergence,
    corruptions,
    difficulty,
    fosc,
    landscape,
    overparametrized,
    subnetwork,
    theory,
    trajectory,
)

__all__ = [
    "connectivity", "convergence", "corruptions", "difficulty", "fosc", "landscape", "overparametrized", "subnetwork",
    "theory", "trajectory",
]  # fmt: skip
