"""Training loops over ordinary models and loaders."""

from .subnetwork import PerturbationStore, ShiftFlip, edge_popup, edge_popup_fast, score_optimizer

__all__ = ["PerturbationStore", "ShiftFlip", "edge_popup", "edge_popup_fast", "score_optimizer"]
