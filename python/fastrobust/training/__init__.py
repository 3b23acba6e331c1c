"""Training loops over ordinary models and loaders, and the methods of the papers by name."""

from . import (  # methods known by name
    adversarial,
    certified,
    dynamic,
    envelope,
    losses,
    mmr,
    projected,
    schedules,
    weights,
)
from .augment import Move, ShiftFlip
from .averaging import Averaging, estimate_statistics
from .batches import Loader, indexed, loader
from .evaluate import Evaluation, OverfittingWarning
from .fast import ATAS, ATTA
from .loop import TrainingDiverged, train
from .method import Batch, Loss, Method
from .recipes import Recipe, recipe
from .registry import make, methods, register
from .reweight import AdaptiveTargets, Reweight
from .store import PerturbationStore
from .subnetwork import EdgePopup, EdgePopupFast, edge_popup, edge_popup_fast, score_optimizer

__all__ = [
    "ATAS",
    "ATTA",
    "AdaptiveTargets",
    "Averaging",
    "Batch",
    "EdgePopup",
    "EdgePopupFast",
    "Evaluation",
    "Loader",
    "Loss",
    "Method",
    "Move",
    "OverfittingWarning",
    "PerturbationStore",
    "Recipe",
    "Reweight",
    "ShiftFlip",
    "TrainingDiverged",
    "adversarial",
    "certified",
    "dynamic",
    "edge_popup",
    "edge_popup_fast",
    "envelope",
    "estimate_statistics",
    "indexed",
    "loader",
    "losses",
    "make",
    "methods",
    "mmr",
    "projected",
    "recipe",
    "register",
    "schedules",
    "score_optimizer",
    "train",
    "weights",
]
