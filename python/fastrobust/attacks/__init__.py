"""Attacks on ordinary models: images in, adversarial examples out."""

from ._trust import AttackWarning
from .pgd import AttackResult, fgsm, ifgsm, pgd

__all__ = ["AttackResult", "AttackWarning", "fgsm", "ifgsm", "pgd"]
