"""Attacks on ordinary models: images in, adversarial examples out."""

from . import compat
from ._report import AttackReport, EvaluationReport
from ._trust import AttackWarning
from .apgd import apgd
from .autoattack import EvaluationResult, autoattack
from .fab import fab
from .pgd import AttackResult, fgsm, ifgsm, pgd
from .square import square

__all__ = [
    "AttackReport",
    "AttackResult",
    "AttackWarning",
    "EvaluationReport",
    "EvaluationResult",
    "apgd",
    "autoattack",
    "compat",
    "fab",
    "fgsm",
    "ifgsm",
    "pgd",
    "square",
]
