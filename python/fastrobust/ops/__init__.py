"""Raw ops. Each has a plain-torch definition in :mod:`fastrobust.reference` and one kernel per device."""

from .binary import masked_conv2d, masked_linear, pack, topk_mask, topk_masks
from .bounds import (
    concretize,
    interval_activation,
    interval_ball_conv2d,
    interval_ball_linear,
    interval_conv2d,
    interval_linear,
    linear_back_step,
    relax,
)
from .pgd import (
    LossValue,
    apgd_step,
    atas_step,
    cross_entropy,
    dlr_loss,
    dlr_targeted_loss,
    fosc,
    kl_divergence,
    margin_loss,
    pgd_step,
    pgd_step_fosc,
    project,
    random_start,
)
from .polyhedron import polyhedral_distance
from .store import shift_flip, store_gather, store_scatter

__all__ = [
    "LossValue",
    "apgd_step",
    "atas_step",
    "concretize",
    "cross_entropy",
    "dlr_loss",
    "dlr_targeted_loss",
    "fosc",
    "interval_activation",
    "interval_ball_conv2d",
    "interval_ball_linear",
    "interval_conv2d",
    "interval_linear",
    "kl_divergence",
    "linear_back_step",
    "margin_loss",
    "masked_conv2d",
    "masked_linear",
    "pack",
    "pgd_step",
    "pgd_step_fosc",
    "polyhedral_distance",
    "project",
    "random_start",
    "relax",
    "shift_flip",
    "store_gather",
    "store_scatter",
    "topk_mask",
    "topk_masks",
]
