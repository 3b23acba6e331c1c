"""Raw ops. Each has a plain-torch definition in :mod:`fastrobust.reference` and one kernel per device."""

from .binary import masked_conv2d, masked_linear, pack, topk_mask, topk_masks
from .losses import LossValue, cross_entropy, dlr_loss, dlr_targeted_loss, kl_divergence, margin_loss
from .pgd import atas_step, fosc, pgd_step, pgd_step_fosc, project, random_start

__all__ = [
    "LossValue",
    "atas_step",
    "cross_entropy",
    "dlr_loss",
    "dlr_targeted_loss",
    "fosc",
    "kl_divergence",
    "margin_loss",
    "masked_conv2d",
    "masked_linear",
    "pack",
    "pgd_step",
    "pgd_step_fosc",
    "project",
    "random_start",
    "topk_mask",
    "topk_masks",
]
