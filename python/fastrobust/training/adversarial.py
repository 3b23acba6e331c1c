"""Adversarial training by PGD and its cheaper relatives: one class a method, with its paper's settings as defaults.

``eps`` and step lengths are in the units of the images; ``eps`` may be a schedule (:mod:`.schedules`), or a
sequence of one radius an epoch. ``step_size=None``
is the paper's share of the radius. ``attack_mode`` "eval" attacks the model as it is deployed, "train" on batch
statistics as several authors' codes do; running statistics never absorb an attack's passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..attacks import _inputs
from ._passes import (
    CIFAR_EPS,
    Attacked,
    Scheduled,
    attacking,
    input_gradient,
    label_weights,
    length,
    noise,
    optional_length,
    statistics_apart,
)
from .method import Batch, Loss
from .registry import register


@register("pgd")
class PGD(Attacked):
    """Standard adversarial training (Madry et al. 2018; Wang et al. 2019, eq. 1 and 3): the loss at ``steps`` of PGD
    from a uniform start of the ball. Defaults: PGD-10 with steps of eps / 4 (Wang et al. 2019, section 5.1)."""

    def __init__(
        self, eps: Scheduled = CIFAR_EPS, *, steps: int = 10, step_size: float | None = None, random_start: bool = True,
        **ball: Any,
    ) -> None:  # fmt: skip
        super().__init__(eps, **ball)
        self.steps = _inputs.integer(steps, "steps", 0)
        self.step_size = optional_length(step_size)
        self.random_start = bool(random_start)

    def perturb(self, model: nn.Module, batch: Batch) -> Tensor:
        step = length(self.step_size, self.radius(batch), 0.25)
        return self.attack(model, batch, steps=self.steps, step_size=step, random_start=self.random_start)


@register("curriculum")
class Curriculum(PGD):
    """Curriculum adversarial training (Cai et al. 2018, as Wang et al. 2019 compare with): PGD-k, k growing from 0
    (clean images) to ``steps`` in equal stages over the first ``grow`` of the training. The stages are of equal length;
    Cai et al. end a stage when its accuracy stops growing."""

    def __init__(self, eps: Scheduled = CIFAR_EPS, *, steps: int = 10, grow: float = 1.0, **options: Any) -> None:
        super().__init__(eps, steps=steps, **options)
        if not 0 < grow <= 1:
            raise ValueError(f"grow: got {grow}, expected a share of the training in (0, 1]")
        self.grow = float(grow)

    def strength(self, batch: Batch) -> int:
        """The steps of this epoch's attack."""
        return min(int((self.steps + 1) * batch.epoch / (self.grow * batch.epochs)), self.steps)

    def perturb(self, model: nn.Module, batch: Batch) -> Tensor:
        steps = self.strength(batch)
        if steps == 0:
            return batch.x
        return self.attack(model, batch, steps=steps, step_size=length(self.step_size, self.radius(batch), 0.25))


@register("fgsm-rs")
class FGSMRS(Attacked):
    """Fast adversarial training (Wong et al. 2020, algorithm 3): one step of ``1.25 eps`` from a uniform start, back to
    the ball. It may collapse ("catastrophic overfitting"): watch PGD accuracy."""

    def __init__(self, eps: Scheduled = CIFAR_EPS, *, step_size: float | None = None, **ball: Any) -> None:
        super().__init__(eps, **ball)
        self.step_size = optional_length(step_size)

    def perturb(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.attack(model, batch, steps=1, step_size=length(self.step_size, self.radius(batch), 1.25))


@register("n-fgsm")
class NFGSM(Attacked):
    """N-FGSM (de Jorge et al. 2022, eq. 5): ``x + n + eps sign(grad(x + n))`` with n uniform in ``noise`` = 2 radii,
    and no projection on the ball, so that the example may be up to 3 eps away; only the box holds."""

    def __init__(
        self, eps: Scheduled = CIFAR_EPS, *, noise: float = 2.0, step_size: float | None = None, **ball: Any
    ) -> None:
        super().__init__(eps, **ball)
        self.noise = _inputs.number(noise, "noise")
        self.step_size = optional_length(step_size)

    def perturb(self, model: nn.Module, batch: Batch) -> Tensor:
        eps = self.radius(batch)
        step = length(self.step_size, eps, 1.0)
        start = noise(batch, self.noise * eps, self.norm, None)
        start = start if self.clip is None else start.clamp(*self.clip)
        with attacking(model, self.attack_mode):
            grad = input_gradient(model, start, batch.y)
        # around the start itself a ball of the step's length holds nothing back
        return ops.pgd_step(start, start, grad, step, step, self.norm, self.clip)


@register("gradalign")
class GradAlign(FGSMRS):
    """GradAlign (Andriushchenko and Flammarion 2020, eq. 6): FGSM from x with ``1.25 eps`` (which the ball cuts to
    eps), and ``weight (1 - mean cos(grad(x), grad(x + n)))``, n uniform in the ball and not cut to the box,
    differentiated through both gradients. Examples one of whose gradients is zero are dropped before the mean. Two
    passes forth and back more than FGSM-RS, and the way back through both. weight: .2 for CIFAR-10, .5 CIFAR-100, .005
    ImageNet (thesis 5.2.4)."""

    def __init__(self, eps: Scheduled = CIFAR_EPS, *, weight: float = 0.2, **options: Any) -> None:
        super().__init__(eps, **options)
        self.weight = _inputs.number(weight, "weight")

    def perturb(self, model: nn.Module, batch: Batch) -> Tensor:
        step = length(self.step_size, self.radius(batch), 1.25)
        return self.attack(model, batch, steps=1, step_size=step, random_start=False)

    def loss(self, model: nn.Module, batch: Batch, adv: Tensor) -> Loss:
        found = super().loss(model, batch, adv)
        if self.weight == 0:
            return found
        near = noise(batch, self.radius(batch), self.norm, None)
        with statistics_apart(model):
            a, b = (self._gradient(model, point, batch.y).flatten(1) for point in (batch.x, near))
        least = torch.finfo(a.dtype).tiny  # of a square: what is smaller has no direction
        alive = (a.detach().square().sum(1) > least) & (b.detach().square().sum(1) > least)
        cosine = (F.normalize(a[alive], eps=0.0) * F.normalize(b[alive], eps=0.0)).sum(1)
        misaligned = 1 - cosine.mean() if len(cosine) else found.value.new_zeros(())
        return found._replace(
            value=found.value + self.weight * misaligned, metrics={"misalignment": misaligned.detach()}
        )

    @staticmethod
    def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        leaf = x.detach().clone().requires_grad_()
        value = F.cross_entropy(model(leaf), y, reduction="sum")
        return torch.autograd.grad(value, leaf, create_graph=True)[0]


@register("free")
class FreeAT(Attacked):
    """Free adversarial training (Shafahi et al. 2019, algorithm 1): each batch is trained on ``replays`` times, and one
    pass back gives the gradients of the parameters and of the perturbation, which then moves by ``step_size`` (eps).
    There is one perturbation a batch *slot*, zero at the beginning and carried from one batch to the next. Train for 1
    / replays of the epochs. Defaults: 8 replays; ImageNet 4 (thesis 5.2.4)."""

    def __init__(
        self, eps: Scheduled = CIFAR_EPS, *, replays: int = 8, step_size: float | None = None, **ball: Any
    ) -> None:
        super().__init__(eps, **ball)
        self.replays = _inputs.integer(replays, "replays", 1)
        self.step_size = optional_length(step_size)
        self._slots: Tensor | None = None

    def slots(self, x: Tensor) -> Tensor:
        """The perturbations, one for each place of a batch; places that no batch had yet are zero."""
        have = x[:0] if self._slots is None else self._slots.to(x.device, x.dtype)
        if have.shape[1:] != x.shape[1:]:
            raise ValueError(f"x: got images {tuple(x.shape[1:])}, expected {tuple(have.shape[1:])} as before")
        if len(have) < len(x):
            have = torch.cat([have, x.new_zeros(len(x) - len(have), *x.shape[1:])])
        self._slots = have.detach()
        return self._slots

    def step(self, model: nn.Module, batch: Batch, update: Callable[[Tensor], None]) -> Loss:
        eps, count = self.radius(batch), len(batch.x)
        step, slots = length(self.step_size, eps, 1.0), self.slots(batch.x)
        if callable(self.eps):  # a radius that shrinks leaves perturbations outside
            slots[:count] = ops.project(slots[:count], torch.zeros_like(batch.x), eps, self.norm, None)
        model.train()
        for _ in range(self.replays):
            moved = slots[:count].clone().requires_grad_()
            adv = batch.x + moved
            loss = self.loss(model, batch, adv if self.clip is None else adv.clamp(*self.clip))
            update(loss.value)
            assert moved.grad is not None
            slots[:count] = ops.pgd_step(
                moved.detach(), torch.zeros_like(moved), moved.grad, step, eps, self.norm, None
            )
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {} if self._slots is None else {"slots": self._slots.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._slots = state["slots"].clone() if state else None


@contextlib.contextmanager
def _removing(hook: Any) -> Iterator[None]:
    try:
        yield
    finally:
        hook.remove()


def _keeping(outputs: list[Tensor]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A hook that keeps what a layer says; the next may write into its copy."""

    def keep(_module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
        outputs.append(out)
        return out.clone()

    return keep


class _Stop(Exception):
    def __init__(self, output: Tensor) -> None:
        self.output = output


@register("yopo")
class YOPO(Attacked):
    """YOPO-m-n (Zhang et al. 2019, algorithm 1): ``full`` = m passes through the network, each of which gives the
    parameters' gradient and the costate p, the loss' gradient at the first layer's output; with p fixed, ``inner`` = n
    steps ascend ``<p, f_0(x + eta)>``, which cost a pass through the first layer f_0 alone. The parameters move once,
    by the sum of the m gradients (authors' rate: .1 * 4 / m). Defaults: YOPO-5-3, steps of 2/255 at 8/255.

    f_0 is all that runs up to the first layer with a weight of two dimensions or more, found by running the model;
    ``layer`` names another. ``variant="authors"``: the first layer also gets its gradient at the moved point of every
    pass, as in their code.
    """

    def __init__(
        self, eps: Scheduled = CIFAR_EPS, *, full: int = 5, inner: int = 3, step_size: float | None = None,
        layer: str | None = None, variant: str = "paper", **ball: Any,
    ) -> None:  # fmt: skip
        super().__init__(eps, **ball)
        self.full, self.inner = _inputs.integer(full, "full", 1), _inputs.integer(inner, "inner", 1)
        self.step_size = optional_length(step_size)
        if variant not in ("paper", "authors"):
            raise ValueError(f"variant: got {variant!r}, expected 'paper' or 'authors'")
        self.layer, self.variant = layer, variant

    def step(self, model: nn.Module, batch: Batch, update: Callable[[Tensor], None]) -> Loss:
        eps = self.radius(batch)
        step = length(self.step_size, eps, 0.25)
        model.train()
        first = self.first_layer(model, batch.x)
        learned = [p for p in model.parameters() if p.requires_grad]
        sums: list[Tensor | None] = [None] * len(learned)
        x, value = noise(batch, eps, self.norm, self.clip), batch.x.new_zeros(())
        for _ in range(self.full):
            outputs: list[Tensor] = []
            with _removing(first.register_forward_hook(_keeping(outputs))):
                found = self.loss(model, batch, x)
            costate, *rest = torch.autograd.grad(found.value, [outputs[0], *learned], allow_unused=True)
            grads: list[Tensor | None] = list(rest)
            for _ in range(self.inner):
                x = ops.pgd_step(x, batch.x, self._slope(model, first, x, costate), step, eps, self.norm, self.clip)
            if self.variant == "authors":
                again = torch.autograd.grad((costate * self._prefix(model, first, x)).sum(), learned, allow_unused=True)
                grads = [_sum(a, b) for a, b in zip(grads, again, strict=True)]
            sums = [_sum(a, b) for a, b in zip(sums, grads, strict=True)]
            value = value + found.value.detach()
        # a linear function with these gradients, so that the loop's update is what moves the parameters
        update(torch.stack([(p * g).sum() for p, g in zip(learned, sums, strict=True) if g is not None]).sum())
        return found._replace(value=value / self.full)

    def first_layer(self, model: nn.Module, x: Tensor) -> nn.Module:
        if self.layer is not None:
            named = dict(model.named_modules())
            if self.layer not in named:
                raise ValueError(f"layer: got {self.layer!r}, expected one of {', '.join(named)[:300]}")
            return named[self.layer]
        order: list[nn.Module] = []
        layers = [m for m in model.modules() if any(p.dim() > 1 for p in m.parameters(recurse=False))]
        hooks = [m.register_forward_hook(lambda m, _i, _o: order.append(m)) for m in layers]
        try:
            with torch.no_grad(), attacking(model, "eval"):
                model(x[:1])
        finally:
            for hook in hooks:
                hook.remove()
        if not order:
            raise ValueError("model: got no layer with a weight of two dimensions or more, expected one; give layer=")
        return order[0]

    @staticmethod
    def _prefix(model: nn.Module, first: nn.Module, x: Tensor) -> Tensor:
        """f_0(x): the model is left as soon as its first layer has spoken."""

        def leave(_module: nn.Module, _inputs: Any, out: Tensor) -> None:
            raise _Stop(out)

        with _removing(first.register_forward_hook(leave)):
            try:
                model(x)
            except _Stop as stop:
                return stop.output
        raise ValueError("layer: the model gave an output without it")

    def _slope(self, model: nn.Module, first: nn.Module, x: Tensor, costate: Tensor) -> Tensor:
        leaf = x.detach().clone().requires_grad_()
        return torch.autograd.grad(self._prefix(model, first, leaf), leaf, costate)[0]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


@register("kl-finetune")
class KLFinetune(PGD):
    r"""Fine-tuning a robust model with additional data (thesis 4.3.5): hard examples are weighted down, and clean
    outputs
    serve as targets.

    .. math:: \sum_i w_i [CE(f(x_i'), y_i) + \lambda KL(o_i || o_i')]

    with o, o' the probabilities of the clean and of the attacked image, ``w_i = softmax(f(x_i'))_{y_i}`` normalised
    over the batch (a constant; ``reweight=False``: 1 / B) and lambda = 6. Rate 1e-3, 1 or 5 epochs of :class:`Mixed`.
    Attack: PGD-10 with steps of eps / 4.
    """

    def __init__(
        self, eps: Scheduled = CIFAR_EPS, *, kl_weight: float = 6.0, reweight: bool = True, **options: Any
    ) -> None:
        super().__init__(eps, **options)
        self.kl_weight, self.reweight = _inputs.number(kl_weight, "kl_weight"), bool(reweight)

    def loss(self, model: nn.Module, batch: Batch, adv: Tensor) -> Loss:
        clean, attacked = model(batch.x) if self.kl_weight else None, model(adv)
        each = F.cross_entropy(attacked, batch.y, reduction="none")
        if clean is not None:
            each = each + self.kl_weight * ops.kl_divergence(attacked, clean).value
        if not self.reweight:
            return Loss(each.mean(), attacked)
        return Loss((label_weights(attacked, batch.y) * each).sum(), attacked)


class Mixed:
    """Batches half from ``loader``, half from ``extra`` (thesis 4.3.5): an epoch goes once through ``extra`` while
    ``loader`` is begun anew as often as needed. Both give (x, y); the first parts of both go together, without numbers.
    """

    def __init__(self, loader: Iterable[Any], extra: Iterable[Any]) -> None:
        self.loader, self.extra = loader, extra

    def __len__(self) -> int:
        return len(self.extra)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        own: Iterator[Any] = iter(())
        for more in self.extra:
            batch = next(own, None)
            if batch is None:
                own = iter(self.loader)
                batch = next(own, None)
                if batch is None:
                    raise ValueError("loader: got no batch, expected at least one")
            yield torch.cat([batch[0], more[0]]), torch.cat([batch[1], more[1]])


__all__ = ["FGSMRS", "NFGSM", "PGD", "YOPO", "Curriculum", "FreeAT", "GradAlign", "KLFinetune", "Mixed"]
