"""What a robust model and its training look like from inside."""

from . import connectivity, difficulty, fosc, landscape, subnetwork, theory, trajectory

__all__ = ["connectivity", "difficulty", "fosc", "landscape", "subnetwork", "theory", "trajectory"]
