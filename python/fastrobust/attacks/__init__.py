"""Attacks on ordinary models: images in, adversarial examples out."""

from .pgd import AttackResult, fgsm, ifgsm, pgd

__all__ = ["AttackResult", "fgsm", "ifgsm", "pgd"]
