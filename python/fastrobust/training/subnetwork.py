"""Robust subnetworks of random networks: edge-popup with attacks (thesis, algorithms 5.1 and 5.2)."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import attacks, ops
from ..nn.freeze import FrozenModel, freeze
from ..nn.masked import masked_layers
from .augment import Move, ShiftFlip
from .fast import Stored
from .loop import train
from .method import Batch, Method
from .registry import register
from .store import PerturbationStore

Record = dict[str, float]
OnEpoch = Callable[[nn.Module, Record], None]
Clip = tuple[float, float] | None
ORDERS = ("upsample-first", "printed")


def score_optimizer(
    model: nn.Module, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 5e-4
) -> torch.optim.SGD:
    """SGD over whatever is learned, with the thesis' settings: scores, and biases or affine parameters if there are
    any."""
    learned = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(learned, lr=lr, momentum=momentum, weight_decay=weight_decay)


@register("edge-popup")
class EdgePopup(Method):
    """Scores of a masked model (of :func:`fastrobust.nn.convert`) on PGD examples (thesis, algorithm 5.1).

    ``steps`` PGD steps from a random start of the ball of radius ``eps``, then cross-entropy with the straight-through
    gradient in every score. eps = 0 trains on clean images. step_size: 2.5 eps / steps when None.
    attack_mode "eval": attacks the frozen model (running statistics, masks computed once a batch, sparse forward and
    input gradient). "train": attacks the model in train mode on batch statistics, as the authors do, without their side
    effect on the running ones.
    """

    def __init__(
        self,
        eps: float = 8 / 255,
        step_size: float | None = None,
        steps: int = 10,
        *,
        norm: float | str = "Linf",
        clip: Clip = (0.0, 1.0),
        attack_mode: str = "eval",
    ) -> None:
        if attack_mode not in ("eval", "train"):
            raise ValueError(f"attack_mode: expected 'eval' or 'train', got {attack_mode!r}")
        self.eps, self.step_size, self.steps, self.norm, self.clip = eps, step_size, steps, norm, clip
        self.attack_mode = attack_mode
        self._frozen: FrozenModel | None = None

    def begin(self, model: nn.Module, examples: int | None, epochs: int) -> None:
        _need_masks(model)
        self._frozen = freeze(model) if self.attack_mode == "eval" and self.eps > 0 else None

    def perturb(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.eps == 0:
            return batch.x
        options: dict[str, Any] = {
            "eps": self.eps, "norm": self.norm, "steps": self.steps, "step_size": self.step_size, "clip": self.clip,
        }  # fmt: skip
        if self._frozen is None:
            return attacks.pgd(model, batch.x, batch.y, model_mode="keep", **options)
        self._frozen.update()
        return attacks.pgd(self._frozen, batch.x, batch.y, **options)


@register("edge-popup-fast")
class EdgePopupFast(Stored):
    """Scores on one-step attacks that start from the last epoch's perturbations, down-sampled (thesis, algorithm 5.2).

    An example's perturbation is moved as its image is and brought to full resolution (for a new one, a random point of
    the ball), goes one step of ``step_size`` (1.25 eps when None) by the frozen model's gradient, and is projected;
    then it is taken back, down-sampled by ``downsample`` and kept.
    order: "upsample-first" moves at full resolution; "printed", as the algorithm is printed, at low resolution, by
    whole low-resolution pixels. Other arguments as for :class:`fastrobust.training.ATTA`.
    """

    def __init__(
        self,
        eps: float = 8 / 255,
        step_size: float | None = None,
        *,
        norm: float | str = "Linf",
        clip: Clip = (0.0, 1.0),
        downsample: int = 2,
        order: str = "upsample-first",
        shift: int = 4,
        flip: bool = True,
        dtype: torch.dtype = torch.float16,
        seed: int = 0,
        store: PerturbationStore | None = None,
    ) -> None:
        super().__init__(eps, norm, clip, shift, flip, seed, dtype, (), store)
        if order not in ORDERS:
            raise ValueError(f"order: got {order!r}, expected one of {', '.join(ORDERS)}")
        self.step_size = 1.25 * eps if step_size is None else step_size
        self.downsample, self.order = downsample, order
        self._frozen: FrozenModel | None = None

    def store_options(self) -> dict[str, Any]:
        return {"downsample": self.downsample, "augment_first": self.order == "printed"}

    def begin(self, model: nn.Module, examples: int | None, epochs: int) -> None:
        _need_masks(model)
        super().begin(model, examples, epochs)
        self._frozen = freeze(model)

    def start(self, batch: Batch, x: Tensor, move: Move) -> Tensor:
        kept = super().start(batch, x, move)
        assert self._store is not None and batch.index is not None
        known = self._store.known[batch.index.to("cpu")]
        if bool(known.all()):
            return kept
        number = (self.seed * 1_000_003 + batch.epoch) * 1_000_003 + batch.step
        fresh = ops.random_start(x, self.eps, self.norm, self.clip, seed=number % 2**63)
        return torch.where(known.to(x.device).view(-1, *[1] * (x.dim() - 1)), kept, fresh)

    def ascend(self, model: nn.Module, batch: Batch, x: Tensor, adv: Tensor) -> Tensor:
        assert self._frozen is not None
        self._frozen.update()
        leaf = adv.detach().requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(self._frozen(leaf), batch.y, reduction="sum")
            (grad,) = torch.autograd.grad(loss, leaf)
        return ops.pgd_step(adv, x, grad, self.step_size, self.eps, self.norm, self.clip)


def edge_popup(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    epochs: int,
    eps: float,
    step_size: float | None = None,
    steps: int = 10,
    norm: float | str = "Linf",
    clip: Clip = (0.0, 1.0),
    optimizer: torch.optim.Optimizer | None = None,
    attack_mode: str = "eval",
    on_epoch: OnEpoch | None = None,
) -> list[Record]:
    """:func:`fastrobust.training.train` with the method "edge-popup" (:class:`EdgePopup`), whose options these are.

    optimizer: `score_optimizer(model)` with a cosine schedule over the epochs when None; your own is stepped as it is.
    on_epoch(model, record): called after every epoch. Returns the records.
    """
    _check(model, epochs)
    method = EdgePopup(eps, step_size, steps, norm=norm, clip=clip, attack_mode=attack_mode)
    return _train(model, loader, method, epochs, optimizer, on_epoch)


def edge_popup_fast(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    epochs: int,
    eps: float,
    step_size: float | None = None,
    norm: float | str = "Linf",
    clip: Clip = (0.0, 1.0),
    optimizer: torch.optim.Optimizer | None = None,
    store: PerturbationStore | None = None,
    augmentation: ShiftFlip | None = None,
    on_epoch: OnEpoch | None = None,
) -> list[Record]:
    """:func:`fastrobust.training.train` with the method "edge-popup-fast" (:class:`EdgePopupFast`).

    loader gives (images, labels, indices), the index telling which example it is. augmentation: None leaves the images
    as they are. Other arguments as in :func:`edge_popup`; pass a `store` to keep it between calls (a down-sampled
    float16 one when None).
    """
    _check(model, epochs)
    if store is None and isinstance(loader, (list, tuple)) and loader:  # which tells its examples by what it holds
        examples = 1 + max(int(index.max()) for _, _, index in loader)
        store = PerturbationStore(examples, tuple(loader[0][0].shape[1:]), dtype=torch.float16, downsample=2)
    moves = ShiftFlip(0, False) if augmentation is None else augmentation
    method = EdgePopupFast(
        eps, step_size, norm=norm, clip=clip, shift=moves.shift, flip=moves.flip, seed=moves.seed, store=store
    )
    return _train(model, loader, method, epochs, optimizer, on_epoch)


def _train(
    model: nn.Module, loader: Iterable[Any], method: Method, epochs: int, optimizer: torch.optim.Optimizer | None,
    on_epoch: OnEpoch | None,
) -> list[Record]:  # fmt: skip
    if isinstance(loader, (list, tuple)) and not loader:
        raise ValueError("loader: expected at least one batch per epoch, got none")
    schedule = None
    if optimizer is None:
        optimizer = score_optimizer(model)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs))
    return train(model, loader, method, epochs=epochs, optimizer=optimizer, scheduler=schedule, on_epoch=on_epoch)


def _need_masks(model: nn.Module) -> None:
    if not masked_layers(model):
        raise ValueError("model: expected masked layers (see fastrobust.nn.convert), got none")


def _check(model: nn.Module, epochs: int) -> None:
    _need_masks(model)
    if isinstance(epochs, bool) or not isinstance(epochs, numbers.Integral) or epochs < 0:
        raise ValueError(f"epochs: expected an int of at least 0, got {epochs!r}")


__all__ = ["EdgePopup", "EdgePopupFast", "edge_popup", "edge_popup_fast", "score_optimizer"]
