"""torchattacks' classes on this package's attacks: ``import fastrobust.attacks.classes as torchattacks``.

Constructors, defaults and methods are those of torchattacks 3.5.1. Covered: APGD, APGDT, AutoAttack, BIM (IFGSM), CW,
DeepFool, EOTPGD, FAB, FFGSM, FGSM, MultiAttack, PGD, PGDL2, Square, TPGD, VANILA; any other name says that it is not.
What differs, on
purpose: AutoAttack makes 100 steps, not 10; CW moves pixels that are exactly 0 or 1, gives each example up by its own
cost, and judges what it hands back; DeepFool's steps keep to the box; an exception leaves the model's modes and the
attack's settings as they were; the model's buffers come back also after an attack in training mode; ``save`` writes
once; 8-bit pixels are rounded, not cut off; random numbers are this package's own, and leave torch's global generator
alone where there is a ``seed``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops import _checks as ck
from ._interface import Attack as Attack
from ._modes import undisturbed
from .apgd import apgd
from .autoattack import autoattack
from .cw import cw_l2
from .deepfool import deepfool
from .fab import fab
from .pgd import fgsm, pgd
from .square import square

_EPS = 8 / 255


class VANILA(Attack):
    """The images themselves."""

    def __init__(self, model: Any) -> None:
        super().__init__("VANILA", model)

    def _attack(self, images: Tensor, goal: Tensor | None) -> Tensor:
        return images.clone()


class FGSM(Attack):
    def __init__(self, model: Any, eps: float = _EPS) -> None:
        super().__init__("FGSM", model, targeted=True)
        self.eps = eps

    def _attack(self, images: Tensor, goal: Tensor | None) -> Tensor:
        return fgsm(self.model, images, goal, eps=self.eps, targeted=self.targeted, **self._common())


class FFGSM(Attack):
    """One step of length alpha from a random start (FGSM-RS)."""

    def __init__(self, model: Any, eps: float = _EPS, alpha: float = 10 / 255) -> None:
        super().__init__("FFGSM", model, targeted=True)
        self.eps, self.alpha = eps, alpha

    def _attack(self, images: Tensor, goal: Tensor | None) -> Tensor:
        return fgsm(
            self.model, images, goal, eps=self.eps, step_size=self.alpha, random_start=True, targeted=self.targeted,
            **self._common(),
        )  # fmt: skip


class _Steps(Attack):
    """PGD, whatever its norm, loss and start."""

    norm: Any = "Linf"
    eps: float
    alpha: float
    steps: int
    random_start = False

    def _more(self) -> dict[str, Any]:
        return {}

    def _attack(self, images: Tensor, goal: Tensor | None) -> Tensor:
        return pgd(
            self.model, images, goal, eps=self.eps, step_size=self.alpha, steps=self.steps, norm=self.norm,
            random_start=self.random_start, targeted=self.targeted, **self._more(), **self._common(),
        )  # fmt: skip


class BIM(_Steps):
    """``steps=0``: min(255 eps + 4, 1.25 * 255 eps) of them (Kurakin et al. 2017)."""

    def __init__(self, model: Any, eps: float = _EPS, alpha: float = 2 / 255, steps: int = 10) -> None:
        super().__init__("BIM", model, targeted=True)
        self.eps, self.alpha = eps, alpha
        self.steps = steps if steps != 0 else int(min(eps * 255 + 4, 1.25 * eps * 255))


IFGSM = BIM


class PGD(_Steps):
    def __init__(
        self, model: Any, eps: float = _EPS, alpha: float = 2 / 255, steps: int = 10, random_start: bool = True
    ) -> None:
        super().__init__("PGD", model, targeted=True)
        self.eps, self.alpha, self.steps, self.random_start = eps, alpha, steps, random_start


class PGDL2(_Steps):
    """``eps_for_division`` is taken and not needed: a zero gradient makes no step."""

    norm = "L2"

    def __init__(
        self, model: Any, eps: float = 1.0, alpha: float = 0.2, steps: int = 10, random_start: bool = True,
        eps_for_division: float = 1e-10,
    ) -> None:  # fmt: skip
        super().__init__("PGDL2", model, targeted=True)
        self.eps, self.alpha, self.steps, self.random_start = eps, alpha, steps, random_start
        self.eps_for_division = eps_for_division


class EOTPGD(_Steps):
    """Gradients averaged over ``eot_iter`` passes, for a randomised model."""

    def __init__(
        self, model: Any, eps: float = _EPS, alpha: float = 2 / 255, steps: int = 10, eot_iter: int = 2,
        random_start: bool = True,
    ) -> None:  # fmt: skip
        super().__init__("EOTPGD", model, targeted=True)
        self.eps, self.alpha, self.steps, self.random_start = eps, alpha, steps, random_start
        self.eot_iter = eot_iter

    def _more(self) -> dict[str, Any]:
        return {"eot_samples": self.eot_iter}


class TPGD(_Steps):
    """PGD on the KL divergence to the clean prediction (TRADES); labels are not looked at."""

    def __init__(self, model: Any, eps: float = _EPS, alpha: float = 2 / 255, steps: int = 10) -> None:
        super().__init__("TPGD", model)
        self.eps, self.alpha, self.steps = eps, alpha, steps

    def _more(self) -> dict[str, Any]:
        return {"loss": "kl"}

    def _attack(self, images: Tensor, goal: Tensor | None) -> Tensor:
        return super()._attack(images, None)


class CW(Attack):
    """One run of Adam with a fixed c, the nearest point that fools; x where there is none."""

    def __init__(self, model: Any, c: float = 1, kappa: float = 0, steps: int = 50, lr: float = 0.01) -> None:
        super().__init__("CW", model, targeted=True)
        self.c, self.kappa, self.steps, self.lr = c, kappa, steps, lr

    def _attack(self, images: Tensor, goal: Tensor | None) -> Tensor:
        return cw_l2(
            self.model, images, goal, c=self.c, confidence=self.kappa, steps=self.steps, lr=self.lr, searches=1,
            targeted=self.targeted, **self._common(),
        )  # fmt: skip


class DeepFool(Attack):
    """L2; x where no point was found that fools."""

    def __init__(self, model: Any, steps: int = 50, overshoot: float = 0.02) -> None:
        super().__init__("DeepFool", model)
        self.steps, self.overshoot = steps, overshoot

    def _attack(self, images: Tensor, goal: Tensor | None) -> Tensor:
        return deepfool(self.model, images, goal, norm=2, steps=self.steps, overshoot=self.overshoot, **self._common())

    def forward_return_target_labels(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Images in [0, 1], and the classes that the model says of what comes back."""
        adv = self(self.normalize(images), labels)
        with undisturbed(self.model, "eval"), torch.no_grad():
            said = self.model(adv).argmax(1)
        return self.inverse_normalize(adv), said


class APGD(Attack):
    def __init__(
        self,
        model: Any,
        norm: str = "Linf",
        eps: float = _EPS,
        steps: int = 10,
        n_restarts: int = 1,
        seed: int | None = 0,
        loss: str = "ce",
        eot_iter: int = 1,
        rho: float = 0.75,
        verbose: bool = False,
    ) -> None:
        super().__init__("APGD", model)
        self.norm, self.eps, self.steps, self.n_restarts, self.seed = norm, eps, steps, n_restarts, seed
        self.loss, self.eot_iter, self.thr_decr, self.verbose = loss, eot_iter, rho, verbose

    def _attack(self, images: Tensor, goal: Tensor | None) -> Tensor:
        options: dict[str, Any] = {
            "norm": self.norm,
            "steps": self.steps,
            "restarts": self.n_restarts,
            "seed": self.seed,
            "loss": self.loss,
            "eot_samples": self.eot_iter,
            "rho": self.thr_decr,
            "progress": self.verbose,
        }
        return apgd(self.model, images, goal, eps=self.eps, **options, **self._common())


class APGDT(Attack):
    """Targeted DLR on the ``n_classes - 1`` likeliest wrong classes; the margin where there are fewer than four
    classes."""

    def __init__(
        self,
        model: Any,
        norm: str = "Linf",
        eps: float = _EPS,
        steps: int = 10,
        n_restarts: int = 1,
        seed: int | None = 0,
        eot_iter: int = 1,
        rho: float = 0.75,
        verbose: bool = False,
        n_classes: int = 10,
    ) -> None:
        super().__init__("APGDT", model)
        self.norm, self.eps, self.steps, self.n_restarts, self.seed = norm, eps, steps, n_restarts, seed
        self.eot_iter, self.thr_decr, self.verbose = eot_iter, rho, verbose
        self.n_target_classes, self._loss = n_classes - 1, "dlr" if n_classes > 3 else "margin"

    def _attack(self, images: Tensor, goal: Tensor | None) -> Tensor:
        options: dict[str, Any] = {
            "norm": self.norm,
            "steps": self.steps,
            "restarts": self.n_restarts,
            "seed": self.seed,
            "loss": self._loss,
            "targets": self.n_target_classes,
            "eot_samples": self.eot_iter,
            "rho": self.thr_decr,
            "progress": self.verbose,
        }
        return apgd(self.model, images, goal, eps=self.eps, **options, **self._common())


class FAB(Attack):
    """In a targeted mode the boundary to the target is looked for; success is leaving the label by whatever road."""

    def __init__(
        self, model: Any, norm: str = "Linf", eps: float | None = _EPS, steps: int = 10, n_restarts: int = 1,
        alpha_max: float = 0.1, eta: float = 1.05, beta: float = 0.9, verbose: bool = False, seed: int | None = 0,
        multi_targeted: bool = False, n_classes: int = 10,
    ) -> None:  # fmt: skip
        super().__init__("FAB", model, targeted=True)
        self.norm, self.steps, self.n_restarts, self.seed, self.verbose = norm, steps, n_restarts, seed, verbose
        self.eps = eps if eps is not None else {"Linf": 0.3, "L2": 1.0, "L1": 5.0}[norm]
        self.alpha_max, self.eta, self.beta = alpha_max, eta, beta
        self.multi_targeted, self.n_target_classes = multi_targeted, n_classes - 1

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        targets: Any = self.n_target_classes if self.multi_targeted else None
        if self.targeted and not self.multi_targeted:
            targets = self.get_target_label(inputs, labels)[:, None]
        options: dict[str, Any] = {
            "norm": self.norm, "steps": self.steps, "restarts": self.n_restarts, "targets": targets, "seed": self.seed,
            "alpha_max": self.alpha_max, "eta": self.eta, "beta": self.beta, "progress": self.verbose,
        }  # fmt: skip
        return fab(self.model, inputs, labels, eps=self.eps, **options, **self._common())


class Square(Attack):
    def __init__(
        self,
        model: Any,
        norm: str = "Linf",
        eps: float = _EPS,
        n_queries: int = 5000,
        n_restarts: int = 1,
        p_init: float = 0.8,
        loss: str = "margin",
        resc_schedule: bool = True,
        seed: int | None = 0,
        verbose: bool = False,
    ) -> None:
        super().__init__("Square", model, targeted=True)
        self.norm, self.eps, self.n_queries, self.n_restarts, self.seed = norm, eps, n_queries, n_restarts, seed
        self.p_init, self.loss, self.rescale_schedule, self.verbose = p_init, loss, resc_schedule, verbose

    def _attack(self, images: Tensor, goal: Tensor | None) -> Tensor:
        options: dict[str, Any] = {
            "norm": self.norm,
            "queries": self.n_queries,
            "restarts": self.n_restarts,
            "loss": self.loss,
            "share": self.p_init,
            "rescale": self.rescale_schedule,
            "seed": self.seed,
            "progress": self.verbose,
            "targeted": self.targeted,
        }
        return square(self.model, images, goal, eps=self.eps, **options, **self._common())


class AutoAttack(Attack):
    """:func:`autoattack` with ``n_classes - 1`` targets: steps and queries are AutoAttack's own (100 and 5000)."""

    def __init__(
        self,
        model: Any,
        norm: str = "Linf",
        eps: float = _EPS,
        version: str = "standard",
        n_classes: int = 10,
        seed: int | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__("AutoAttack", model)
        if version not in ("standard", "plus", "rand", "fast"):
            raise ValueError(f"version: got {version!r}, expected 'standard', 'plus', 'rand' or 'fast'")
        self.norm, self.eps, self.version, self.n_classes = norm, eps, version, n_classes
        self.seed, self.verbose = seed, verbose

    def _plan(self) -> Any:
        targets = {"targets": self.n_classes - 1}
        if self.norm in ("Linf", "L2") and self.version == "standard":
            return ["apgd-ce", ("apgd-t", targets), ("fab-t", targets), "square"]
        if self.norm in ("Linf", "L2") and self.version == "plus":
            often = {"restarts": 5}
            untargeted = [("apgd-ce", often), ("apgd-dlr", often), ("fab", often)]
            return [*untargeted, "square", ("apgd-t", targets), ("fab-t", targets)]
        return self.version

    def _attack(self, images: Tensor, goal: Tensor | None) -> Tensor:
        if goal is None:
            raise ValueError("labels: got None, expected the true classes")
        norm: Any = self.norm
        return autoattack(
            self.model, images, goal, eps=self.eps, norm=norm, version=self._plan(), progress=self.verbose,
            seed=time.time_ns() % 2**31 if self.seed is None else int(self.seed), **self._common(),
        )  # fmt: skip


class MultiAttack(Attack):
    """Several attacks on one model, one after the other, each on what the ones before have left. Settings (device,
    normalisation, modes of the model) go to all of them."""

    def __init__(self, attacks: Sequence[Attack], verbose: bool = False) -> None:
        self.attacks: Sequence[Attack] = []
        if len(attacks) < 2:
            raise ValueError(f"attacks: got {len(attacks)}, expected two or more")
        if any(attack.model is not attacks[0].model for attack in attacks):
            raise ValueError("attacks: got attacks on several models, expected one model")
        super().__init__("MultiAttack", attacks[0].model)
        self.attacks, self.verbose = attacks, verbose
        self._records: list[int] = []  # of the last call: examples left before the first attack, and after each
        self._total = [0] * (len(attacks) + 1)

    def _parts(self) -> Sequence[Attack]:
        return self.attacks

    def __call__(self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if labels is None:
            raise ValueError("labels: got None, expected the true classes")
        inputs, labels = ck.need_tensor(inputs, "inputs").detach(), ck.need_tensor(labels, "labels")
        if self.device is not None:
            inputs, labels = inputs.to(self.device), labels.to(self.device)
        final, left = inputs.clone(), torch.arange(len(inputs), device=inputs.device)
        self._records = [len(left)]
        for attack in self.attacks:
            if len(left):
                adv = attack(inputs[left], labels[left])
                with undisturbed(self.model, "eval"), torch.no_grad():
                    wrong = self.model(adv).argmax(1) != labels[left]
                final[left[wrong]] = adv[wrong]
                left = left[~wrong]
            self._records.append(len(left))
        self._total = [a + b for a, b in zip(self._total, self._records, strict=True)]
        if self.verbose:
            print(_in_words(_success_rates(self._records)))
        return final

    def save(self, *args: Any, **options: Any) -> Any:
        """As :meth:`Attack.save`; with ``return_verbose`` the success rates after each attack come second."""
        self._total = [0] * (len(self.attacks) + 1)
        found = super().save(*args, **options)
        rates = _success_rates(self._total)
        if options.get("verbose", True):
            print(_in_words(rates))
        return found if found is None else (found[0], rates, *found[1:])


def _success_rates(left: Sequence[int]) -> list[float]:
    """In percent, after each attack."""
    return [100 * (1 - n / max(left[0], 1)) for n in left[1:]]


def _in_words(rates: Sequence[float]) -> str:
    return "Attack success rate: " + " | ".join(f"{rate:2.2f} %" for rate in rates)


_COVERED = (
    "APGD", "APGDT", "Attack", "AutoAttack", "BIM", "CW", "DeepFool", "EOTPGD", "FAB", "FFGSM", "FGSM", "IFGSM",
    "MultiAttack", "PGD", "PGDL2", "Square", "TPGD", "VANILA",
)  # fmt: skip
_NOT_COVERED = (
    "GN", "RFGSM", "MIFGSM", "UPGD", "DIFGSM", "TIFGSM", "Jitter", "NIFGSM", "PGDRS", "SINIFGSM", "VMIFGSM", "VNIFGSM",
    "SPSA", "JSMA", "EADL1", "EADEN", "PIFGSM", "PIFGSMPP", "PGDRSL2", "SparseFool", "OnePixel", "Pixle", "LGV",
)  # fmt: skip
__all__ = list(_COVERED)


if not TYPE_CHECKING:  # a type checker shall refuse other names

    def __getattr__(name: str) -> Any:
        if name in _NOT_COVERED:  # an ImportError is what an import statement passes on as it is
            raise ImportError(f"{name}: not covered; covered: {', '.join(_COVERED)}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; covered: {', '.join(_COVERED)}")
