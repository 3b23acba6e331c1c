"""Certified training: losses that are sound bounds of the worst case, and the methods made of them (Liu 2022, chapter
3).

Every method here takes ``norm`` and ``clip`` of the attacker, a radius that grows over the training, and bounds it with
:func:`fastrobust.bounds.compute_bounds`. Batch norm uses the statistics of the clean batch, which move the running ones
once, and keeps them fixed while bounds are computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import attacks
from ..bounds import METHODS as BOUNDS
from ..bounds import compute_bounds
from ..bounds.checks import check_method
from ..ops.bounds import check_norm
from ._clean_statistics import clean_pass, fixed
from .envelope import envelope_loss
from .method import Batch, Loss, Method
from .registry import register

Radius = float | Callable[[float], float]  # a number, or a function of the share of the training that is done


def worst_case_logits(margins: Tensor, y: Tensor) -> Tensor:
    """o^(worst) of (3.1) less its entry y: 0 for class y and minus the lower bound of z_y - z_i for the others, (B, K).

    margins (B, K - 1): lower bounds, i ascending without y, as ``compute_bounds(..., labels=y)`` gives them.
    """
    rows, classes = len(margins), margins.shape[1] + 1
    other = torch.arange(classes - 1, device=y.device).expand(rows, -1)
    other = other + (other >= y.unsqueeze(1)).long()
    return margins.new_zeros(rows, classes).scatter(1, other, -margins)


def worst_case_loss(
    model: Any, x: Tensor, y: Tensor, eps: float | Tensor, *, method: str = "crown-ibp", elide: bool = True,
    reduction: str = "mean", **options: Any,
) -> Tensor:  # fmt: skip
    """The cross-entropy of (3.1): an upper bound of the loss of every attack in the ball.

    method: any bounds of :func:`fastrobust.bounds.compute_bounds`. elide: bound the margins, with the last layer elided
    (tighter); False: the outputs one by one, as (3.1) is written. reduction: "mean", "sum" or "none", (B,).
    """
    if elide:
        margins = compute_bounds(model, x, eps, method=method, labels=y, sides="lower", **options).lower
        return F.cross_entropy(worst_case_logits(margins, y), y, reduction=reduction)
    bounds = compute_bounds(model, x, eps, method=method, **options)
    own = torch.zeros_like(bounds.lower, dtype=torch.bool).scatter(1, y.unsqueeze(1), True)
    return F.cross_entropy(torch.where(own, bounds.lower, bounds.upper), y, reduction=reduction)


def fused_loss(
    model: Any, x: Tensor, y: Tensor, eps: float | Tensor, *, method: str = "crown-ibp", reduction: str = "mean",
    **options: Any,
) -> Tensor:  # fmt: skip
    """:func:`worst_case_loss` with loss fusion (Xu et al. 2020, section 3.4): one row a sample instead of K - 1.

    log(1 + sum_i exp(z_i - z_y)) with each exponential under its chord between interval bounds of z_i - z_y is linear
    in the outputs, so that one linear bound serves all classes: the cost does not grow with K. Sound, and looser than K
    - 1 rows.
    """
    ends = compute_bounds(model, x, eps, method="ibp", labels=y, **options)
    low, up = -ends.upper, -ends.lower  # of z_i - z_y
    top = up.amax(1, keepdim=True).detach().clamp(min=0)  # the largest exponent is 0
    width = up - low
    narrow = width < 1e-4
    at_up = (up - top).exp()
    slope = torch.where(narrow, at_up, at_up * -torch.expm1(-width) / torch.where(narrow, 1.0, width))
    # the chord through the upper end; where it is no number, the steepest slope raised above both ends
    offset = at_up - slope * torch.where(narrow, low, up)
    rows, classes = len(x), slope.shape[1] + 1
    other = torch.arange(classes - 1, device=y.device).expand(rows, -1)
    other = other + (other >= y.unsqueeze(1)).long()
    spec = (
        slope.new_zeros(rows, classes).scatter(1, other, slope).scatter(1, y.unsqueeze(1), -slope.sum(1, keepdim=True))
    )
    linear = compute_bounds(model, x, eps, method=method, spec=spec.unsqueeze(1), sides="upper", **options).upper[:, 0]
    sums = linear + offset.sum(1)
    # a bound may come out below what the sum of positive numbers can be; the largest interval bound caps it from above
    sums = torch.minimum(sums, at_up.sum(1)).clamp(min=torch.finfo(sums.dtype).tiny)
    value = top[:, 0] + ((-top[:, 0]).exp() + sums).log()
    return value if reduction == "none" else value.sum() if reduction == "sum" else value.mean()


def ibp_init(model: nn.Module) -> None:
    r"""Weights for interval bounds that neither grow nor vanish with depth (Shi et al. 2021, section 3.1), in place.

    N(0, sigma^2) with sigma = sqrt(2 pi) / n, n the fan-in: the mean of \|w\| is then 2 / n, which an interval and the
    ReLU behind it, that halves it, leave at its width. Biases become 0. Linear and convolutional layers alone are
    touched.
    """
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                m.weight.normal_(0.0, math.sqrt(2 * math.pi) / m.weight[0].numel())
                if m.bias is not None:
                    m.bias.zero_()


class Certified(Method):
    """What the certified methods share: the input set, its schedule, and the subsample that is bounded.

    eps: the final radius, or a function of the share of the training that is done. norm, clip: of the attacker.
    ramp: (begin, end), shares of the training between which eps grows linearly from ``start`` (times eps) to eps.
    subsample: number of examples of each batch that are bounded (stochastic robust approximation, section 3.3.3), None:
    all.
    """

    def __init__(
        self,
        eps: Radius,
        *,
        norm: float | str = math.inf,
        clip: Any = (0.0, 1.0),
        ramp: tuple[float, float] = (0.0, 0.0),
        start: float = 0.0,
        subsample: int | None = None,
    ) -> None:
        if not callable(eps) and not (math.isfinite(eps) and eps >= 0):
            raise ValueError(f"eps: got {eps}, expected a finite number >= 0")
        if not 0 <= ramp[0] <= ramp[1] <= 1:
            raise ValueError(f"ramp: got {ramp}, expected 0 <= begin <= end <= 1")
        if not 0 <= start <= 1:
            raise ValueError(f"start: got {start}, expected a share of eps in [0, 1]")
        if subsample is not None and subsample < 1:
            raise ValueError(f"subsample: got {subsample}, expected None or at least 1")
        self.eps, self.norm, self.clip = eps, check_norm(norm), clip
        self.ramp, self.start, self.subsample = tuple(ramp), start, subsample

    def ramped(self, progress: float) -> float:
        """How far the ramp is, in [0, 1]."""
        begin, end = self.ramp
        if progress >= end:
            return 1.0
        return max(0.0, (progress - begin) / (end - begin))

    def radius(self, progress: float) -> float:
        """eps where a share ``progress`` of the training is done."""
        if callable(self.eps):
            return self.eps(progress)
        return self.eps * (self.start + (1 - self.start) * self.ramped(progress))

    @property
    def input_set(self) -> dict[str, Any]:
        return {"norm": self.norm, "clip": self.clip, "check": "none"}  # the model was compared when it was first read

    def picked(self, x: Tensor) -> Tensor | slice:
        """The examples of a batch that are bounded, each with the same chance."""
        if self.subsample is None or self.subsample >= len(x):
            return slice(None)
        return torch.randperm(len(x))[: self.subsample].to(x.device)

    def bounded(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Any]:
        """Clean logits, and a context in which bounds see the batch norms as this pass did."""
        logits, seen = clean_pass(model, x)
        return logits, fixed(model, seen)


@register("worst-case")
class WorstCase(Certified):
    r"""The worst-case loss (3.1) by any bounds, mixed with the clean one.

    .. math:: \kappa L(f(x), y) + (1 - \kappa) L(o^{(worst)}, y)

    bounds: method of :func:`compute_bounds`. kappa: (first, last), moving linearly along the ramp. beta: (first, last)
    share of ``bounds`` in the margins, the rest interval bounds (CROWN-IBP); (1, 1) for ``bounds`` alone. fusion:
    :func:`fused_loss`.
    elide: as for :func:`worst_case_loss`.
    """

    def __init__(
        self, eps: Radius = 0.1, *, bounds: str = "crown-ibp", kappa: tuple[float, float] = (0.0, 0.0),
        beta: tuple[float, float] = (1.0, 1.0), elide: bool = True, fusion: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(eps, **options)
        self.bounds = check_method(bounds, BOUNDS)
        for name, pair in (("kappa", kappa), ("beta", beta)):
            if len(pair) != 2 or not all(0 <= v <= 1 for v in pair):
                raise ValueError(f"{name}: got {pair}, expected two numbers in [0, 1], first and last")
        if fusion and (self.bounds == "ibp" or tuple(beta) != (1.0, 1.0) or not elide):
            raise ValueError("fusion: got True, expected linear bounds with elide=True and beta=(1, 1)")
        self.kappa, self.beta, self.elide, self.fusion = tuple(kappa), tuple(beta), elide, fusion

    def _robust(self, model: nn.Module, x: Tensor, y: Tensor, progress: float) -> Tensor:
        eps, options = self.radius(progress), self.input_set
        if self.fusion:
            return fused_loss(model, x, y, eps, method=self.bounds, **options)
        share = between(self.beta, self.ramped(progress))
        if share == 1:
            return worst_case_loss(model, x, y, eps, method=self.bounds, elide=self.elide, **options)
        if share == 0:
            return worst_case_loss(model, x, y, eps, method="ibp", elide=self.elide, **options)
        if not self.elide:
            raise ValueError("elide: got False with a share of interval bounds, expected True")
        margins = [
            compute_bounds(model, x, eps, method=method, labels=y, sides="lower", **options).lower
            for method in ("ibp", self.bounds)
        ]
        return F.cross_entropy(worst_case_logits((1 - share) * margins[0] + share * margins[1], y), y)

    def loss(self, model: nn.Module, batch: Batch, adv: Tensor) -> Loss:
        progress = batch.progress
        share, eps = between(self.kappa, self.ramped(progress)), self.radius(progress)
        logits, frozen = self.bounded(model, batch.x)
        clean = F.cross_entropy(logits, batch.y)
        if eps == 0 or share == 1:
            return Loss(clean, logits, {"clean": clean.detach(), "eps": eps})
        rows = self.picked(batch.x)
        with frozen:
            robust = self._robust(model, batch.x[rows], batch.y[rows], progress)
        value = robust if share == 0 else share * clean + (1 - share) * robust
        return Loss(value, logits, {"clean": clean.detach(), "worst": robust.detach(), "eps": eps})


def between(ends: tuple[float, ...], share: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * share


@register("kw")
class KW(WorstCase):
    """The dual bound of Wong and Kolter (2018), which is Fast-Lin's: cross-entropy of the worst case, eps growing from
    a tenth over the first half of the training."""

    def __init__(self, eps: Radius = 0.1, **options: Any) -> None:
        super().__init__(eps, **{"bounds": "fast-lin", "ramp": (0.0, 0.5), "start": 0.1, **options})


@register("ibp")
class IBP(WorstCase):
    """Interval bound propagation (Gowal et al. 2018): kappa from 1 to 1/2 while eps grows, from 5 % to 30 % of the
    training."""

    def __init__(self, eps: Radius = 0.1, **options: Any) -> None:
        super().__init__(eps, **{"bounds": "ibp", "kappa": (1.0, 0.5), "ramp": (0.05, 0.3), **options})


@register("crown-ibp")
class CrownIBP(WorstCase):
    """CROWN-IBP (Zhang et al. 2020): the margins are beta CROWN-IBP + (1 - beta) IBP with beta from 1 to 0 while eps
    grows, so that the tight bounds start the training and the cheap ones end it; kappa from 1 to 0."""

    def __init__(self, eps: Radius = 0.1, **options: Any) -> None:
        super().__init__(
            eps, **{"bounds": "crown-ibp", "kappa": (1.0, 0.0), "beta": (1.0, 0.0), "ramp": (0.05, 0.3), **options}
        )


class PER(Certified):
    r"""Polyhedral envelope regularisation (Liu 2022, section 3.3.3 and Algorithm 3.6).

    .. math:: L(f(X), y) + \beta \, \mathrm{mean}_s \sum_{i \le C} \max(0, 1 - \hat d_i / \alpha)

    with the signed distances from the clean x; PER+at has (L(X) + L(X')) / 2 for the first term, X' by PGD, and takes
    the distances from X'. The envelope, of the ball around the clean x in both, is computed for ``subsample`` examples
    of the batch, the attack for all. How rows out of reach enter: :func:`fastrobust.training.envelope.envelope_hinge`.

    alpha, beta, count: as above (C = 4). eps: the radius at the start, times ``growth`` after every share ``every`` of
    the training; the defaults are those of table 3.5 for FC1 and l-inf: .0064, doubled every fifth, .1024 at the end.
    warm_up: share of the training that is adversarial training alone, without the envelope (the CNNs of the thesis).
    attack_steps, attack_eps (None: the envelope's eps): of X'.
    """

    bounds = "fast-lin"
    at = False

    def __init__(
        self, eps: Radius = 0.0064, *, alpha: float = 0.15, beta: float = 0.1, count: int = 4, growth: float = 2.0,
        every: float = 0.2, warm_up: float = 0.0, attack_steps: int = 10, attack_eps: float | None = None,
        norm: float | str = math.inf, clip: Any = (0.0, 1.0), subsample: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(eps, norm=norm, clip=clip, subsample=subsample)
        if not (alpha > 0 and beta >= 0 and count >= 1):
            raise ValueError(f"alpha, beta, count: got {alpha}, {beta}, {count}, expected > 0, >= 0, >= 1")
        if not (growth > 0 and 0 < every <= 1 and 0 <= warm_up <= 1):
            raise ValueError(f"growth, every, warm_up: got {growth}, {every}, {warm_up}, expected > 0, shares of 1")
        self.alpha, self.beta, self.count, self.growth, self.every = alpha, beta, count, growth, every
        self.warm_up, self.attack_steps, self.attack_eps = warm_up, attack_steps, attack_eps

    def radius(self, progress: float) -> float:
        if callable(self.eps):
            return self.eps(progress)
        return self.eps * self.growth ** math.floor(progress / self.every + 1e-9)

    def _warming(self, batch: Batch) -> bool:
        return batch.progress < self.warm_up

    def perturb(self, model: nn.Module, batch: Batch) -> Tensor:
        if not self.at and not self._warming(batch):
            return batch.x
        eps = self.radius(batch.progress) if self.attack_eps is None else self.attack_eps
        return attacks.pgd(
            model, batch.x, batch.y, eps=eps, norm=self.norm, clip=self.clip, steps=self.attack_steps, check=False
        )

    def loss(self, model: nn.Module, batch: Batch, adv: Tensor) -> Loss:
        eps = self.radius(batch.progress)
        if self._warming(batch):
            logits = model(adv)
            return Loss(F.cross_entropy(logits, batch.y), logits, {"eps": eps})
        logits, frozen = self.bounded(model, batch.x)
        value = F.cross_entropy(logits, batch.y)
        rows = self.picked(batch.x)
        with frozen:
            if self.at:
                value = 0.5 * (value + F.cross_entropy(model(adv), batch.y))
            found = envelope_loss(
                model, batch.x[rows], batch.y[rows], eps, alpha=self.alpha, norm=self.norm, clip=self.clip,
                at=adv[rows] if self.at else None, method=self.bounds, count=self.count, check="none",
            ).mean()  # fmt: skip
        return Loss(
            value + self.beta * found, logits, {"cross_entropy": value.detach(), "envelope": found.detach(), "eps": eps}
        )


@register("l-per")
class LinearPER(PER):
    """PER with Fast-Lin's lines."""


@register("l-per+at")
class LinearPERat(PER):
    """PER with Fast-Lin's lines and adversarial training."""

    at = True


@register("i-per")
class IntervalPER(PER):
    """PER with IBP-inspired lines: cheaper, and on par in the thesis."""

    bounds = "ibp-linear"


@register("i-per+at")
class IntervalPERat(PER):
    """PER with IBP-inspired lines and adversarial training."""

    bounds, at = "ibp-linear", True


def _pair(*beta: float, **shared: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return {**shared, "beta": beta[0]}, {**shared, "beta": beta[-1]}


# Table 3.5: what to give PER (the first) and PER+at (the second) for the networks of the thesis, by data, network and
# norm. The thesis does not print how long the CNNs are warmed up by adversarial training: a tenth here.
_CNN: dict[str, Any] = {"growth": 1.0, "warm_up": 0.1}
TABLE_3_5 = {
    ("mnist", "fc1", "Linf"): _pair(0.1, eps=0.0064, alpha=0.15),
    ("mnist", "cnn", "Linf"): _pair(0.3, 0.03, eps=0.1, alpha=0.15, subsample=20, **_CNN),
    ("cifar10", "cnn", "Linf"): _pair(3e-4, 1e-3, eps=0.008, alpha=0.1, subsample=10, **_CNN),
    ("mnist", "fc1", "L2"): _pair(1.0, eps=0.02, alpha=0.45, norm="L2"),
    ("mnist", "cnn", "L2"): _pair(1.0, eps=0.3, alpha=0.45, norm="L2", subsample=20, **_CNN),
    ("cifar10", "cnn", "L2"): _pair(0.3, 1.0, eps=0.1, alpha=0.15, norm="L2", subsample=10, **_CNN),
}


@register("sabr")
class SABR(Certified):
    """Small adversarial bounding regions (Müller et al. 2023): the interval bounds of a box of radius share * eps
    around an attack in the ball of radius (1 - share) * eps. share (their lambda): .1 at 2/255 and .7 at 8/255 in
    CIFAR-10, 1 is IBP. l-inf only.

    The box is moved into the ball around x and ``clip``, as theirs is. l1: weight of the l1 norm of the weights.
    """

    def __init__(
        self, eps: Radius = 0.1, *, share: float = 0.4, attack_steps: int = 8, l1: float = 0.0, **options: Any
    ) -> None:
        super().__init__(eps, **{"ramp": (0.0, 0.5), **options})
        if self.norm != math.inf:
            raise ValueError(f"norm: got {self.norm}, expected inf: SABR's regions are boxes")
        if not 0 < share <= 1:
            raise ValueError(f"share: got {share}, expected a number in (0, 1]")
        self.share, self.attack_steps, self.l1 = share, attack_steps, l1

    def perturb(self, model: nn.Module, batch: Batch) -> Tensor:
        eps = (1 - self.share) * self.radius(batch.progress)
        if eps == 0:
            return batch.x
        options = {"eps": eps, "clip": self.clip, "steps": self.attack_steps, "check": False}
        return attacks.pgd(model, batch.x, batch.y, **options)

    def loss(self, model: nn.Module, batch: Batch, adv: Tensor) -> Loss:
        radius = self.radius(batch.progress) * self.share
        logits, frozen = self.bounded(model, batch.x)
        rows = self.picked(batch.x)
        with frozen:
            value = worst_case_loss(model, adv[rows], batch.y[rows], radius, method="ibp", **self.input_set)
        return Loss(value + l1_of(model, self.l1), logits, {"worst": value.detach(), "eps": radius / self.share})


@register("mtl-ibp")
class MTLIBP(Certified):
    """Multi-task IBP (De Palma et al. 2024): (1 - share) L(f(X'), y) + share L(o^(worst), y) with X' by PGD in the ball
    and interval bounds of all of it. share (their alpha): .004 to .01 at 2/255 and .5 to .6 at 8/255 in CIFAR-10.

    attack_scale: the attack's radius by that of the bounds (2.1 at 2/255 there). l1: weight of the l1 norm of the
    weights.
    """

    def __init__(
        self,
        eps: Radius = 0.1,
        *,
        share: float = 0.5,
        attack_steps: int = 8,
        attack_scale: float = 1.0,
        l1: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(eps, **{"ramp": (0.0, 0.5), **options})
        if not 0 <= share <= 1:
            raise ValueError(f"share: got {share}, expected a number in [0, 1]")
        self.share, self.attack_steps, self.attack_scale, self.l1 = share, attack_steps, attack_scale, l1

    def perturb(self, model: nn.Module, batch: Batch) -> Tensor:
        eps = self.attack_scale * self.radius(batch.progress)
        if eps == 0:
            return batch.x
        return attacks.pgd(
            model, batch.x, batch.y, eps=eps, norm=self.norm, clip=self.clip, steps=self.attack_steps, check=False
        )

    def loss(self, model: nn.Module, batch: Batch, adv: Tensor) -> Loss:
        eps = self.radius(batch.progress)
        logits, frozen = self.bounded(model, batch.x)
        rows = self.picked(batch.x)
        with frozen:
            attacked = F.cross_entropy(model(adv), batch.y)
            worst = worst_case_loss(model, batch.x[rows], batch.y[rows], eps, method="ibp", **self.input_set)
        value = (1 - self.share) * attacked + self.share * worst + l1_of(model, self.l1)
        return Loss(value, logits, {"attacked": attacked.detach(), "worst": worst.detach(), "eps": eps})


def l1_of(model: nn.Module, weight: float) -> Tensor | float:
    """weight times the sum of absolute weights (not biases and affine parameters)."""
    if weight == 0:
        return 0.0
    return weight * torch.stack([p.abs().sum() for p in model.parameters() if p.dim() > 1]).sum()


__all__ = [
    "IBP",
    "KW",
    "MTLIBP",
    "PER",
    "SABR",
    "TABLE_3_5",
    "Certified",
    "CrownIBP",
    "IntervalPER",
    "IntervalPERat",
    "LinearPER",
    "LinearPERat",
    "WorstCase",
    "fused_loss",
    "ibp_init",
    "worst_case_logits",
    "worst_case_loss",
]
