"""Attacks on ordinary models: images in, adversarial examples out."""

from . import classes, compat
from ._report import AttackReport, EvaluationReport
from ._trust import AttackWarning
from .apgd import apgd
from .autoattack import EvaluationResult, autoattack
from .cw import cw_inf, cw_l2
from .deepfool import deepfool
from .fab import fab
from .malt import malt
from .pgd import AttackResult, fgsm, ifgsm, pgd
from .prepare import Preparation, PreparedVictim, prepare
from .square import square

__all__ = [
    "AttackReport",
    "AttackResult",
    "AttackWarning",
    "EvaluationReport",
    "EvaluationResult",
    "Preparation",
    "PreparedVictim",
    "apgd",
    "autoattack",
    "classes",
    "compat",
    "cw_inf",
    "cw_l2",
    "deepfool",
    "fab",
    "fgsm",
    "ifgsm",
    "malt",
    "pgd",
    "prepare",
    "square",
]
