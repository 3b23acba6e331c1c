"""Steps of attacks and the losses that they follow."""

from .ascent import apgd_step
from .losses import LossValue, cross_entropy, dlr_loss, dlr_targeted_loss, kl_divergence, margin_loss
from .steps import atas_step, fosc, pgd_step, pgd_step_fosc, project, random_start

__all__ = [
    "LossValue",
    "apgd_step",
    "atas_step",
    "cross_entropy",
    "dlr_loss",
    "dlr_targeted_loss",
    "fosc",
    "kl_divergence",
    "margin_loss",
    "pgd_step",
    "pgd_step_fosc",
    "project",
    "random_start",
]
