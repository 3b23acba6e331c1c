"""Fast adversarial training that carries perturbations from epoch to epoch: ATTA and ATAS."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..attacks._modes import undisturbed
from . import distributed
from ._passes import input_gradient
from .augment import Move, ShiftFlip
from .method import Batch, Loss, Method
from .registry import register
from .store import PerturbationStore

Clip = tuple[float, float] | None


def _gradient(model: nn.Module, x: Tensor, y: Tensor, clean: Tensor | None = None) -> Tensor:
    """:func:`input_gradient` with the model in eval mode; of the KL divergence from the outputs at ``clean``, if
    given."""
    with undisturbed(model, "eval"):
        with torch.no_grad():
            reference = None if clean is None else model(clean).float()
        return input_gradient(model, x, y, reference)


class Stored(Method):
    """What methods share whose attack starts where the last epoch's ended.

    Images are moved by :class:`ShiftFlip` here, not by the loader, so that the stored perturbations can follow. The
    store is made at the first batch, or given. Of several processes each has a whole store; before an epoch begins they
    exchange what the last one wrote, so that it does not matter which process sees an example.
    """

    needs_index = True

    def __init__(
        self, eps: float, norm: float | str, clip: Clip, shift: int, flip: bool, seed: int, dtype: torch.dtype,
        resets: tuple[int, ...], store: PerturbationStore | None,
    ) -> None:  # fmt: skip
        if not eps >= 0:
            raise ValueError(f"eps: got {eps}, expected a number of at least 0")
        self.eps, self.norm, self.clip, self.resets = eps, norm, clip, tuple(resets)
        self.shift, self.flip, self.seed = shift, flip, seed
        self._augment, self._dtype, self._store = ShiftFlip(shift, flip, seed), dtype, store
        self._examples: int | None = None if store is None else len(store)
        self._clean: Tensor | None = None
        self._written: Tensor | None = None  # (N,) since the last exchange, by this process of several

    def store_options(self) -> dict[str, Any]:
        """How the store begins."""
        return {"padding": self.shift}

    def begin(self, model: nn.Module, examples: int | None, epochs: int) -> None:
        if self._store is not None and examples is not None and len(self._store) < examples:
            raise ValueError(
                f"store: got one of {len(self._store)} examples, expected at least the loader's {examples}"
            )
        self._examples = examples if self._store is None else len(self._store)

    def kept(self) -> list[Tensor]:
        """What has a row for each example."""
        return [] if self._store is None else [self._store.perturbations, self._store.known]

    def begin_epoch(self, model: nn.Module, epoch: int, epochs: int) -> None:
        if self._written is not None:
            distributed.exchange_rows(self.kept(), self._written)
        if epoch in self.resets and self._store is not None:
            self._store.reset()

    def _make_store(self, shape: tuple[int, ...]) -> PerturbationStore:
        if self._examples is None:
            raise ValueError(
                "loader: got one that does not tell how many examples it has, expected a loader of a data set, "
                "or store=PerturbationStore(examples, shape)"
            )
        return PerturbationStore(self._examples, shape, dtype=self._dtype, seed=self.seed, **self.store_options())

    @property
    def store(self) -> PerturbationStore | None:
        return self._store

    def perturb(self, model: nn.Module, batch: Batch) -> Tensor:
        if batch.index is None:
            raise ValueError(f"loader: got batches without the numbers of their examples, which {self.name} needs")
        if self._store is None:
            self._store = self._make_store(tuple(batch.x.shape[1:]))
        move = self._augment.draw(batch)
        x = move.apply(batch.x)
        start = self.start(batch, x, move)
        adv = self.ascend(model, batch, x, start)
        self._store.update(batch.index, adv, x, move)
        if distributed.rank_and_world()[1] > 1:
            if self._written is None:
                self._written = torch.zeros(len(self._store), dtype=torch.bool)
            self._written[batch.index.to("cpu")] = True
        self._clean = x
        return adv

    def start(self, batch: Batch, x: Tensor, move: Move) -> Tensor:
        """Where the attack begins, around the moved images x."""
        assert self._store is not None and batch.index is not None
        return self._store.start(batch.index, x, self.eps, self.norm, self.clip, move)

    def ascend(self, model: nn.Module, batch: Batch, x: Tensor, adv: Tensor) -> Tensor:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        written = {} if self._written is None else {"written": self._written}
        return {} if self._store is None else {"store": self._store.state_dict(), **written}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "store" not in state:
            return
        if self._store is None:
            self._store = self._make_store(self._shape_of(state["store"]["perturbations"]))
        self._store.load_state_dict(state["store"])
        self._written = state["written"].clone() if "written" in state else None

    def _shape_of(self, kept: Tensor) -> tuple[int, ...]:
        """The images' shape, from what a store of them has."""
        options = self.store_options()
        factor, padding = options.get("downsample", 1), options.get("padding", 0)
        return (kept.shape[1], *(n * factor - 2 * padding for n in kept.shape[2:]))


@register("atta")
class ATTA(Stored):
    """Adversarial training with transferable examples (Zheng et al. 2020): ``steps`` of PGD from the last epoch's
    perturbation, kept for the padded image so that it survives cropping and flipping.

    loss: "ce", or "trades": the attack climbs KL(f(x) || f(x')), and CE(f(x), y) + beta KL(f(x) || f(x')) is minimised.
    (The authors' TRADES variant still attacks the cross-entropy, and their mean loss is divided by the batch size
    again.)
    step_size: eps / 2 when None (4/255 for 8/255). resets: epochs, counted from 0, at which the perturbations are drawn
    anew (the code: 10, 20 and 30, counted from 1; never on MNIST). init_scale: standard deviation of the first
    perturbations, unclamped as the authors'. shift, flip: the crops (with that padding) and mirror images; 0 and False
    for digits. dtype: of the store.
    """

    def __init__(
        self,
        eps: float = 8 / 255,
        step_size: float | None = None,
        steps: int = 1,
        *,
        norm: float | str = "Linf",
        clip: Clip = (0.0, 1.0),
        loss: str = "ce",
        beta: float = 6.0,
        shift: int = 4,
        flip: bool = True,
        resets: tuple[int, ...] = (9, 19, 29),
        init_scale: float = 0.001,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        store: PerturbationStore | None = None,
    ) -> None:
        super().__init__(eps, norm, clip, shift, flip, seed, dtype, resets, store)
        if loss not in ("ce", "trades"):
            raise ValueError(f"loss: got {loss!r}, expected 'ce' or 'trades'")
        if steps < 1:
            raise ValueError(f"steps: got {steps}, expected at least 1")
        self.step_size = eps / 2 if step_size is None else step_size
        self.steps, self.kind, self.beta, self.init_scale = steps, loss, beta, init_scale

    def store_options(self) -> dict[str, Any]:
        return {"padding": self.shift, "init": "normal", "scale": self.init_scale}

    def ascend(self, model: nn.Module, batch: Batch, x: Tensor, adv: Tensor) -> Tensor:
        for _ in range(self.steps):
            grad = _gradient(model, adv, batch.y, x if self.kind == "trades" else None)
            adv = ops.pgd_step(adv, x, grad, self.step_size, self.eps, self.norm, self.clip)
        return adv

    def loss(self, model: nn.Module, batch: Batch, adv: Tensor) -> Loss:
        if self.kind == "ce":
            return super().loss(model, batch, adv)
        assert self._clean is not None
        clean, logits = model(self._clean), model(adv)
        natural = F.cross_entropy(clean, batch.y)
        apart = F.kl_div(logits.log_softmax(1), clean.log_softmax(1), reduction="batchmean", log_target=True)
        return Loss(natural + self.beta * apart, logits, {"natural_loss": natural.detach(), "kl": apart.detach()})


@register("atas")
class ATAS(Stored):
    r"""Adversarial training with adaptive step size (thesis, algorithm 5.3; Huang et al. 2022).

    One gradient g a batch, at the last epoch's perturbation, serves the average and the step:
    ``v' = beta v + (1 - beta) ||g||_2^2`` for each example, the step from v', and the parameters move at the new point.

    variant: "authors", ``step_size / (1 + sqrt(v') / c)``, which is the thesis' gamma / (C + sqrt v) with step_size =
    gamma / C; or "paper", ``step_size / sqrt(v' + c)`` as (5.16) is printed, which with step_size = gamma = 2 eps c
    stays below 1.6/255 (section 5.2.4 describes the authors' form).
    step_size: when None 2 eps (16/255 for 8/255), times c for "paper". step_range: limits of the step, in the units of
    the images; the code's are (4/255, 14/255); None, none. warm_up: epochs with the constant step eps in which v stays.
    resets: epochs, counted from 0, at which the perturbations are drawn anew, uniform on [-eps, eps]; v is kept. The
    code resets at 10 and 20 counted from 1.
    gradient_scale: g is that of an example's own loss times this. c = 0.01 belongs to the gradients of a mean over
    batches of 128, as the authors take them; ours is that number whatever the batch. 1 is (5.15) to the letter.
    Other arguments as in :class:`ATTA`.
    """

    def __init__(
        self,
        eps: float = 8 / 255,
        step_size: float | None = None,
        *,
        beta: float = 0.5,
        c: float = 0.01,
        variant: str = "authors",
        step_range: tuple[float, float] | None = None,
        warm_up: int = 5,
        resets: tuple[int, ...] = (9, 19),
        gradient_scale: float = 1 / 128,
        norm: float | str = "Linf",
        clip: Clip = (0.0, 1.0),
        shift: int = 4,
        flip: bool = True,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        store: PerturbationStore | None = None,
    ) -> None:
        super().__init__(eps, norm, clip, shift, flip, seed, dtype, resets, store)
        if variant not in ("authors", "paper"):
            raise ValueError(f"variant: got {variant!r}, expected 'authors' or 'paper'")
        if step_size is None:
            step_size = 2 * eps * (c if variant == "paper" else 1.0)
        self.step_size, self.beta, self.c, self.variant = step_size, beta, c, variant
        self.step_range, self.warm_up, self.gradient_scale = step_range, warm_up, gradient_scale
        self._v: Tensor | None = None

    def store_options(self) -> dict[str, Any]:
        return {"padding": self.shift, "init": "uniform", "scale": self.eps}

    @property
    def v(self) -> Tensor | None:
        """(N,) moving averages of the squared gradient norms, once there was a batch."""
        return self._v

    def kept(self) -> list[Tensor]:
        return super().kept() + ([] if self._v is None else [self._v])

    def ascend(self, model: nn.Module, batch: Batch, x: Tensor, adv: Tensor) -> Tensor:
        assert self._store is not None and batch.index is not None
        if self._v is None:
            self._v = torch.zeros(len(self._store), dtype=x.dtype, device=x.device)
        grad = _gradient(model, adv, batch.y) * self.gradient_scale
        if batch.epoch < self.warm_up:
            return ops.pgd_step(adv, x, grad, self.eps, self.eps, self.norm, self.clip)
        index = batch.index.to(self._v.device)
        adv, v, _ = ops.atas_step(
            adv, x, grad, self._v[index], self.step_size, self.eps, self.norm, self.clip, beta=self.beta, c=self.c,
            variant=self.variant, step_range=(0.0, math.inf) if self.step_range is None else self.step_range,
        )  # fmt: skip
        self._v[index] = v
        return adv

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | ({} if self._v is None else {"v": self._v})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if "v" in state:
            self._v = state["v"].clone()


__all__ = ["ATAS", "ATTA", "Stored"]
