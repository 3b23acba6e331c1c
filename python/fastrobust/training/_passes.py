"""What training methods share: passes that leave no trace in the model, input gradients, noise by example."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import attacks, ops
from ..attacks import _inputs
from ..attacks._modes import modules_of, undisturbed
from ..ops import _checks as ck
from .method import Batch, Method

INF = math.inf
# a number, one for each epoch, or what gives it from the share of the training that is done
Scheduled = float | Sequence[float] | Callable[[float], float]
CIFAR_EPS = 8 / 255


@dataclasses.dataclass(frozen=True)
class PerEpoch:
    """One number for each epoch."""

    values: tuple[float, ...]
    by_epoch: bool = True

    def __call__(self, progress: float) -> float:
        return self.values[min(round(progress * len(self.values)), len(self.values) - 1)]


def at(value: float | Callable[[float], float], batch: Batch) -> float:
    """A scheduled number now: by whole epochs where the schedule says so (``by_epoch``), else by batches."""
    if not callable(value):
        return value
    done = batch.epoch / max(batch.epochs, 1) if getattr(value, "by_epoch", False) else batch.progress
    return float(value(done))


@contextlib.contextmanager
def statistics_apart(model: nn.Module) -> Iterator[None]:
    """Passes inside move copies of the buffers. Unlike saving and writing back, this leaves a graph recorded inside
    usable afterwards: nothing that it saved is written into."""
    kept = [(m, name, b) for m in modules_of(model) for name, b in m._buffers.items() if b is not None]
    for module, name, b in kept:
        module._buffers[name] = b.detach().clone()
    try:
        yield
    finally:
        for module, name, b in kept:
            module._buffers[name] = b


@contextlib.contextmanager
def attacking(model: nn.Module, mode: str) -> Iterator[None]:
    """The model as it is attacked: in "eval" mode, or in "train" mode on batch statistics, whatever mode it comes in.
    Modes and statistics come back."""
    if mode == "eval":
        with undisturbed(model, "eval"):
            yield
        return
    flags = [(m, m.training) for m in modules_of(model)]
    for module, _ in flags:
        module.training = True
    try:
        with undisturbed(model, "keep"):
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def input_gradient(model: nn.Module, x: Tensor, y: Tensor, reference: Tensor | None = None) -> Tensor:
    """(B, ...) gradient of each example's own cross-entropy, or of KL(softmax(reference) || softmax(logits)). No
    parameter gets a gradient."""
    leaf = x.detach().clone().requires_grad_()
    logits = model(leaf)
    told = logits.detach()
    found = ops.cross_entropy(told, y) if reference is None else ops.kl_divergence(told, reference)
    return torch.autograd.grad(logits, leaf, found.grad.to(logits.dtype))[0]


def ascend(
    model: nn.Module, batch: Batch, start: Tensor, *, steps: int, step_size: float, eps: float, norm: float, clip: Any,
    reference: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``steps`` of projected gradient ascent from ``start`` in the ball around the batch's images."""
    x = start
    for _ in range(steps):
        x = ops.pgd_step(x, batch.x, input_gradient(model, x, batch.y, reference), step_size, eps, norm, clip)
    return x


def seed() -> int:
    """From torch's default generator, which a checkpoint holds."""
    return int(torch.randint(0, 2**62, (), dtype=torch.int64))


def noise(batch: Batch, eps: float, norm: float, clip: Any) -> Tensor:
    """A random point of the ball around each image. Where the batch tells the numbers of its examples, each one's
    point depends on its number, not on its place or on which process has it."""
    return ops.random_start(batch.x, eps, norm, clip, seed(), 0 if batch.index is None else batch.index)


def normal_start(batch: Batch, width: float) -> Tensor:
    """``x + width * N(0, I)``, the start of TRADES and MART: normal numbers from uniform ones by the inverse of erf."""
    flat = Batch(torch.zeros_like(batch.x), batch.y, batch.index)
    uniform = noise(flat, 1.0, INF, None).clamp(-1 + 2**-23, 1 - 2**-23)
    return batch.x + (width * math.sqrt(2)) * torch.erfinv(uniform)


def label_weights(logits: Tensor, y: Tensor) -> Tensor:
    """(B,) ``w_i / sum_j w_j``, w the label's probability (thesis, algorithm 4.1), a constant. From logarithms: where
    all probabilities are too small for a float, as of a last batch of few examples, their ratios are not."""
    return logits.detach().log_softmax(1).gather(1, y[:, None])[:, 0].softmax(0)


class Attacked(Method):
    """Base of the methods that train on examples of a ball: its radius, norm and box, and the mode of the attack.

    prepare: attacks by :func:`fastrobust.attacks.pgd` run on the model as :func:`fastrobust.attacks.prepare` makes it
    ready (eval mode; measured at the first attack, followed as the weights move). What following costs pays in long
    attacks alone: PGD-10 of the MNIST CNN is slower with it.
    """

    def __init__(
        self, eps: Scheduled = CIFAR_EPS, *, norm: float | str = INF, clip: Any = (0.0, 1.0), attack_mode: str = "eval",
        prepare: bool = False,
    ) -> None:  # fmt: skip
        self.eps: float | Callable[[float], float]
        if isinstance(eps, Sequence) and not isinstance(eps, str):
            self.eps = PerEpoch(tuple(_inputs.number(v, "eps") for v in eps))
        else:
            self.eps = eps if callable(eps) else _inputs.number(eps, "eps")
        self.norm = ck.parse_norm(norm)
        if clip is not None:
            ck.parse_clip(clip)
        self.clip = clip
        if attack_mode not in ("eval", "train"):
            raise ValueError(f"attack_mode: got {attack_mode!r}, expected 'eval' or 'train'")
        if prepare and attack_mode != "eval":
            raise ValueError(
                "prepare: got True with attack_mode='train', expected 'eval': what is made ready is the eval mode"
            )
        self.attack_mode, self.prepare = attack_mode, bool(prepare)

    def begin(self, model: nn.Module, examples: int | None, epochs: int) -> None:
        if isinstance(self.eps, PerEpoch) and len(self.eps.values) != epochs:
            raise ValueError(f"eps: got {len(self.eps.values)} radii, expected one for each of the {epochs} epochs")

    def radius(self, batch: Batch) -> float:
        return at(self.eps, batch)

    def ball(self, batch: Batch) -> dict[str, Any]:
        """The arguments of a step that say where the examples may be."""
        return {"eps": self.radius(batch), "norm": self.norm, "clip": self.clip}

    def attack(self, model: nn.Module, batch: Batch, **options: Any) -> Tensor:
        """:func:`fastrobust.attacks.pgd` on the batch; the labels were checked by the loop."""
        if self.radius(batch) == 0:
            return batch.x
        numbers = 0 if batch.index is None else batch.index
        with attacking(model, self.attack_mode):
            return attacks.pgd(
                model, batch.x, batch.y, **(self.ball(batch) | options), seed=seed(), first_example=numbers,
                model_mode="keep", check=False, prepare=self.prepare,
            )  # fmt: skip

    def settings(self) -> dict[str, Any]:
        found = super().settings()
        return found | ({"eps": repr(self.eps)} if callable(self.eps) else {})


def length(step_size: float | None, eps: float, share: float) -> float:
    """A step's length: as given, else that share of the radius, which follows a schedule of the radius."""
    return share * eps if step_size is None else step_size


def optional_length(value: float | None) -> float | None:
    return None if value is None else _inputs.number(value, "step_size")
