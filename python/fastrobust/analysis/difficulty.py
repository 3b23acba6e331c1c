"""How hard each training example is (thesis, section 4.3): recorded while training, compared, grouped, cut to
subsets."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from ..attacks._modes import undisturbed
from ..training.method import Batch, Loss, Method, Wrapped
from ..training.registry import make

Array = NDArray[Any]
SUBSETS = ("hard", "random", "easy")


class Recorder(Wrapped):
    """A training method that also keeps each example's cross-entropy and 0-1 error of every epoch.

    They come from the logits that the method answers anyway: no pass of the model is added, and the training keeps its
    bits. ``losses`` and ``errors`` are (epochs, N), NaN where an example was not in that epoch; of one that comes
    several times in an epoch the last counts. The loader must tell the numbers of its examples. Under torchrun each
    process records those it trains on. Checkpoints hold the record: ``resume=True`` goes on with it.

    Raises:
        ValueError: when training begins with a loader that does not tell how many examples it has, or a method answers
        logits that are not one row an example.
    """

    def __init__(self, method: Method | str = "pgd") -> None:
        super().__init__(make(method))
        self.needs_index = True
        self.name = f"{self.method.name}+recorder"
        self.losses = self.errors = torch.empty(0, 0)

    def begin(self, model: nn.Module, examples: int | None, epochs: int) -> None:
        if examples is None:
            raise ValueError("loader: got one that does not tell how many examples it has, expected one that does")
        device = next(model.parameters()).device
        self.losses = torch.full((epochs, examples), math.nan, device=device)
        self.errors = self.losses.clone()
        super().begin(model, examples, epochs)

    def step(self, model: nn.Module, batch: Batch, update: Callable[[Tensor], None]) -> Loss:
        found = self.method.step(model, batch, update)
        logits = found.logits.detach().float()
        if logits.dim() != 2 or len(logits) != len(batch.y):
            raise ValueError(
                f"logits: got shape {tuple(logits.shape)} of {self.method.name}, expected ({len(batch.y)}, classes)"
            )
        assert batch.index is not None
        self.losses[batch.epoch, batch.index] = F.cross_entropy(logits, batch.y, reduction="none")
        self.errors[batch.epoch, batch.index] = (logits.argmax(1) != batch.y).float()
        return found

    def settings(self) -> dict[str, Any]:
        return self.method.settings()

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses.cpu(), "errors": self.errors.cpu(), "method": self.method.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        missing = {"losses", "errors", "method"} - set(state)
        if missing:
            raise ValueError(f"state: got {sorted(state)}, expected also {sorted(missing)}")
        self.method.load_state_dict(state["method"])
        self.losses.copy_(state["losses"])
        self.errors.copy_(state["errors"])


def difficulty(losses: Tensor | ArrayLike) -> Array:
    """d(x) = P(g(x) < g(x')) + P(g(x) = g(x')) / 2 over x' in the set (4.30), (N,) float64: 0 the hardest, 1 the
    easiest.

    losses: (epochs, N), averaged over the epochs in which an example was seen, or (N,) averages. 0-1 errors do as well
    (figure 4.15).

    Raises:
        ValueError: another shape, no example, or one that was never seen.
    """
    table = _array(losses)
    table = table[None] if table.ndim == 1 else table
    if table.ndim != 2 or not table.size:
        raise ValueError(f"losses: got shape {table.shape}, expected (epochs, N) or (N,) with N > 0")
    seen = ~np.isnan(table)
    if not seen.any(axis=0).all():
        raise ValueError(f"losses: got {(~seen.any(axis=0)).sum()} examples that were never seen, expected none")
    mean = np.where(seen, table, 0.0).sum(axis=0) / seen.sum(axis=0)
    _, which, counts = np.unique(mean, return_inverse=True, return_counts=True)
    greater = len(mean) - np.cumsum(counts)
    return ((greater + 0.5 * counts) / len(mean))[which.reshape(-1)]


def d_distance(first: ArrayLike, second: ArrayLike) -> float:
    """E |d1(x) - d2(x)| over the examples (4.31): 0 of equal orders, 1/2 of reversed ones, 1/3 of independent ones.

    (The thesis prints 0.375 for independent ones; E|U - V| of independent uniform numbers is 1/3.)
    """
    a, b = _array(first), _array(second)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise ValueError(f"second: got shape {b.shape}, expected that of the first, {a.shape}, one number an example")
    return float(np.abs(a - b).mean())


def groups(values: ArrayLike, count: int = 10) -> Array:
    """The group of each example, (N,) int64: G_i = {i / count <= d < (i + 1) / count} (4.32), the last with d = 1
    too."""
    d = _array(values)
    if count < 1:
        raise ValueError(f"count: got {count}, expected at least 1")
    if d.ndim != 1 or not ((d >= 0) & (d <= 1)).all():
        raise ValueError("values: got others, expected one difficulty in [0, 1] for each example")
    return np.minimum((d * count).astype(np.int64), count - 1)


def group_means(table: Tensor | ArrayLike, group: ArrayLike, count: int = 10) -> Array:
    """Averages of an (epochs, N) table over each group (figure 4.21): (epochs, count), NaN for an empty group."""
    rows, which = np.atleast_2d(_array(table)), np.asarray(group)
    if which.shape != rows.shape[1:]:
        raise ValueError(f"group: got shape {which.shape}, expected {rows.shape[1:]}")
    seen = ~np.isnan(rows)
    out = np.full((len(rows), count), np.nan)
    for i in range(count):
        part, known = rows[:, which == i], seen[:, which == i]
        total = known.sum(axis=1)
        np.divide(np.where(known, part, 0.0).sum(axis=1), total, out=out[:, i], where=total > 0)
    return out


def subset(values: ArrayLike, labels: Tensor | ArrayLike, count: int, which: str, *, seed: int = 0) -> Array:
    """Numbers of the ``count`` hardest, easiest or random examples, as many of each class (section 4.3.2), ascending.

    Where count is no multiple of the number of classes, the first classes have one more. Equal difficulties: the lower
    number first.

    Raises:
        ValueError: no such subset, or a class with too few examples.
    """
    if which not in SUBSETS:
        raise ValueError(f"which: got {which!r}, expected one of {', '.join(SUBSETS)}")
    d, y = _array(values), np.asarray(labels)
    if y.shape != d.shape:
        raise ValueError(f"labels: got shape {y.shape}, expected {d.shape}")
    classes = np.unique(y)
    random = np.random.default_rng(seed)
    chosen = []
    for i, label in enumerate(classes):
        members = np.flatnonzero(y == label)
        wanted = count // len(classes) + (i < count % len(classes))
        if count < 0 or wanted > len(members):
            raise ValueError(f"count: got {count}, expected 0 to what class {label} has room for ({len(members)})")
        if which == "random":
            members = random.permutation(members)
        else:
            members = members[np.argsort(d[members] if which == "hard" else -d[members], kind="stable")]
        chosen.append(members[:wanted])
    return np.sort(np.concatenate(chosen))


def feature_norms(model: nn.Module, x: Tensor, *, batch_size: int = 500) -> Tensor:
    """(N,) l2 norms of what goes into the last linear layer, in eval mode (figure 4.21b: of adversarial examples,
    which the caller finds; their mean over a group is :func:`group_means`). The model is left as it was.

    Raises:
        TypeError: a model without a linear layer.
    """
    last = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not last:
        raise TypeError("model: got one without nn.Linear, expected a classifier that ends in one")
    found: list[Tensor] = []
    hook = last[-1].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].detach().flatten(1).norm(dim=1)))
    try:
        with undisturbed(model, "eval"), torch.no_grad():
            for part in x.split(batch_size):
                model(part)
    finally:
        hook.remove()
    return torch.cat(found)


class Lipschitz(NamedTuple):
    """``bound``: the product of ``norms``, the layers' l2 Lipschitz constants in order. ``residual``: the largest
    relative change of an operator norm in its last step of power iteration."""

    bound: float
    norms: Array
    residual: float


def lipschitz_bound(
    model: nn.Module, shape: tuple[int, ...], *, iterations: int = 500, tolerance: float = 1e-7, seed: int = 0
) -> Lipschitz:
    """Upper bound of the l2 Lipschitz constant of the logits (table 4.5, by AutoLip of Scaman and Virmaux).

    The product over the layers of a sequential model in eval mode: spectral norms of the convolutions and pools as maps
    of images of their size, by power iteration in float64 on a random start of ``seed``; of the others exactly.

    Args:
        model: nn.Sequential, nested ones too, of Conv2d, Linear, batch norm, pools, activations, Flatten, Dropout.
        shape: of one example, (C, H, W) or (F,).
    Raises:
        TypeError: a layer of another kind.
    """
    layers = _flat(model)
    for layer in layers:
        _constant(layer)
    first = next(model.parameters())
    x = torch.zeros(1, *shape, dtype=first.dtype, device=first.device)
    generator = torch.Generator().manual_seed(seed)
    norms, worst = [], 0.0
    with undisturbed(model, "eval"):
        for layer in layers:
            with torch.no_grad():
                size, x = tuple(x.shape), layer(x)
            known = _constant(layer)
            if known is None:
                known, change = _spectral(_linear_part(layer), size, generator, iterations, tolerance)
                worst = max(worst, change)
            norms.append(known)
    return Lipschitz(float(np.prod(norms)), np.array(norms), worst)


def _flat(model: nn.Module) -> list[nn.Module]:
    return [leaf for m in model for leaf in _flat(m)] if isinstance(model, nn.Sequential) else [model]


_ONE = (nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Softplus, nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d)
_POWER = (nn.Conv2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


def _constant(layer: nn.Module) -> float | None:
    """None for a layer that needs power iteration."""
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        raise TypeError(f"model: got padding {layer.padding_mode!r}, expected zeros")
    if isinstance(layer, _POWER):
        return None
    if isinstance(layer, nn.Linear):
        return float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2))
    if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)) and layer.running_var is not None:
        scale = (layer.running_var.double() + layer.eps).rsqrt()
        return float((scale if layer.weight is None else scale * layer.weight.detach().double()).abs().max())
    if isinstance(layer, nn.MaxPool2d):
        kernel, stride, dilation = (_pair(v) for v in (layer.kernel_size, layer.stride, layer.dilation))
        # a pixel is the largest of at most as many windows as hold it
        overlap = math.prod(-(-(d * (k - 1) + 1) // s) for k, s, d in zip(kernel, stride, dilation, strict=True))
        return math.sqrt(overlap)
    if isinstance(layer, nn.Sigmoid):
        return 0.25
    if isinstance(layer, nn.LeakyReLU):
        return max(1.0, abs(layer.negative_slope))
    if isinstance(layer, _ONE):
        return 1.0
    raise TypeError(f"model: got a layer {type(layer).__name__}, expected a sequential model of the layers listed")


def _pair(value: Any) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def _linear_part(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    if not isinstance(layer, nn.Conv2d):
        return layer
    weight = layer.weight.detach().double()
    return lambda x: F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)


def _spectral(
    apply: Callable[[Tensor], Tensor], size: tuple[int, ...], generator: torch.Generator, iterations: int,
    tolerance: float,
) -> tuple[float, float]:  # fmt: skip
    """The largest singular value, and its relative change in the last step."""
    v = torch.randn(size, generator=generator, dtype=torch.float64)
    norm, change = 0.0, math.inf
    for _ in range(iterations):
        v = (v / v.norm()).requires_grad_()
        with torch.enable_grad():
            out = apply(v)
            (back,) = torch.autograd.grad(out, v, out.detach())
        before, norm = norm, float(out.detach().norm())
        if norm == 0.0:
            return 0.0, 0.0
        change = abs(norm - before) / norm
        if change < tolerance:
            break
        v = back
    return norm, change


def plot_groups(axes: Any, means: ArrayLike, names: list[int] | None = None) -> None:
    """Figure 4.21a: the average loss of groups (0 the hardest) over the epochs, on matplotlib axes."""
    table = np.asarray(means)
    for i in range(table.shape[1]) if names is None else names:
        axes.plot(np.arange(1, len(table) + 1), table[:, i], label=f"G{i}")
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    axes.legend()


def plot_two(axes: Any, by_loss: ArrayLike, by_error: ArrayLike) -> None:
    """Figure 4.15: difficulty by average loss against difficulty by average 0-1 error."""
    axes.scatter(by_loss, by_error, s=4, alpha=0.5)
    axes.set_xlabel("difficulty by loss")
    axes.set_ylabel("difficulty by 0-1 error")


def _array(values: Any) -> Array:
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)


__all__ = [
    "Lipschitz", "Recorder", "d_distance", "difficulty", "feature_norms", "group_means", "groups", "lipschitz_bound",
    "plot_groups", "plot_two", "subset",
]  # fmt: skip
