"""What robust subnetworks look like, and how much they keep (thesis, section 5.1)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..attacks._modes import undisturbed
from ..nn.convert import convert
from ..nn.masked import MaskedLayer, masked_layers
from ..training.loop import train
from ..training.method import Method
from ..training.subnetwork import score_optimizer

Array = NDArray[Any]


class Kept(NamedTuple):
    """Of one layer: weights ``kept`` of ``total``, and by output channel and by input channel (of its group)."""

    kept: int
    total: int
    outputs: Array
    inputs: Array


def kept_weights(model: nn.Module) -> dict[str, Kept]:
    """What every masked layer of a model keeps (figure 5.2), by its name."""
    found = {}
    for name, layer in _masked(model).items():
        counts = _counts(layer).sum(axis=2)
        found[name] = Kept(int(counts.sum()), layer.scores.numel(), counts.sum(axis=1), counts.sum(axis=0))
    return found


def pattern(layer: MaskedLayer, *, inputs_first: bool = False) -> Array:
    """A mask as a picture (figure 5.3): bool (r_out * kh, r_in * kw); with inputs_first (r_in * kh, r_out * kw), as the
    second of two layers is drawn beside the first (figure 5.4)."""
    mask = layer.mask().cpu().numpy()
    mask = mask.reshape(*mask.shape, *[1] * (4 - mask.ndim))
    mask = mask.transpose(1, 0, 2, 3) if inputs_first else mask
    rows, columns, height, width = mask.shape
    return mask.transpose(0, 2, 1, 3).reshape(rows * height, columns * width)


class Aligned(NamedTuple):
    """Channels between two layers: empty as ``outputs`` of the first, as ``inputs`` of the second, as ``both``, and how
    many ``expected`` would be both if the one did not depend on the other."""

    outputs: int
    inputs: int
    both: int
    expected: float


def aligned(first: MaskedLayer, second: MaskedLayer) -> Aligned:
    """Whether the channels that a layer leaves out are those that the next one does not look at (figure 5.4)."""
    out, seen = _counts(first).sum(axis=(1, 2)) == 0, _counts(second).sum(axis=(0, 2)) == 0
    if out.shape != seen.shape:
        raise ValueError(f"second: got {len(seen)} input channels, expected the {len(out)} outputs of the first")
    return Aligned(int(out.sum()), int(seen.sum()), int((out & seen).sum()), float(out.sum() * seen.sum() / len(out)))


def random_channels(shape: Sequence[int], keep: int, *, draws: int = 500, seed: int = 0) -> tuple[Array, Array]:
    """Kept weights by output and by input channel, largest first, averaged over random masks (figure 5.2's
    reference)."""
    size = math.prod(shape)
    if not 0 <= keep <= size or draws < 1:
        raise ValueError(f"keep: got {keep} and {draws} draws, expected 0 to {size} and at least 1")
    random = np.random.default_rng(seed)
    rows, columns = np.zeros(shape[0]), np.zeros(shape[1])
    for _ in range(draws):
        mask = np.zeros(size, dtype=np.int64)
        mask[random.choice(size, keep, replace=False)] = 1
        counts = mask.reshape(shape[0], shape[1], -1).sum(axis=2)
        rows += np.sort(counts.sum(axis=1))[::-1]
        columns += np.sort(counts.sum(axis=0))[::-1]
    return rows / draws, columns / draws


class Flops(NamedTuple):
    """Operations for one example: forward in train and in eval mode, and backward."""

    training: float
    evaluation: float
    backward: float


def block_flops(kept: float, total: int, outputs: int, pixels: int, *, binary: bool) -> Flops:
    """Of a convolution - batch norm - ReLU block, by table 5.1.

    kept: (1 - r) c^2 r_in r_out; total: c^2 r_in r_out; outputs: r_out; pixels: s^2 of a feature map.
    """
    times = 1 if binary else 2
    forward, maps = times * kept * pixels, pixels * outputs
    return Flops(forward + 11 * maps, forward + 4 * maps, (times + 2) * kept * pixels + 4 * maps + (not binary) * total)


def flops(model: nn.Module, shape: tuple[int, ...], *, binary: bool) -> Flops:
    """The sum of :func:`block_flops` over a model's masked layers for one example of that shape; a linear layer is a
    block of one pixel. The model is left as it was."""
    layers, pixels = _masked(model), {}

    def look(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, out: pixels.update({name: math.prod(out.shape[2:])})

    hooks = [layer.register_forward_hook(look(name)) for name, layer in layers.items()]
    try:
        with undisturbed(model, "eval"), torch.no_grad():
            scores = next(iter(layers.values())).scores
            model(torch.zeros(1, *shape, dtype=scores.dtype, device=scores.device))
    finally:
        for hook in hooks:
            hook.remove()
    parts = [
        block_flops(layer.keep, layer.scores.numel(), len(layer.scores), pixels[name], binary=binary)
        for name, layer in layers.items()
        if name in pixels
    ]
    return Flops(*(sum(part) for part in zip(*parts, strict=True)))


class Optimum(NamedTuple):
    """``best``: every allocation that is largest, by trying all; ``margin``: how far they are from breaking what the
    theorem says, over all of them and all pairs of layers; ``holds``: whether none breaks it."""

    best: Array
    margin: float
    holds: bool


def theorem_5_1(sizes: Sequence[int], kept: int) -> Optimum:
    """Most subnetworks: the m that maximise prod C(n_i, m_i) have |m_j/n_j - m_k/n_k| < 1/n_j + 1/n_k (5.3)."""
    best = _best(sizes, kept, lambda m: math.prod(math.comb(n, k) for n, k in zip(sizes, m, strict=True)))
    share, unit = best / np.array(sizes), 1 / np.array(sizes)
    pairs = list(itertools.combinations(range(len(sizes)), 2))
    margin = min(
        (float((unit[j] + unit[k] - abs(share[:, j] - share[:, k])).min()) for j, k in pairs), default=math.inf
    )
    return Optimum(best, margin, margin > 1e-12)


def theorem_5_2(sizes: Sequence[int], kept: int) -> Optimum:
    """Most paths: the m that maximise prod m_i have m_j = n_j, or m_j >= m_k - 1 for every k."""
    if kept < len(sizes):
        raise ValueError(f"kept: got {kept}, expected at least one weight for each of {len(sizes)} layers")
    best = _best(sizes, kept, math.prod)
    free = best < np.array(sizes)
    margins = (best + 1 - best.max(axis=1, keepdims=True))[free]
    margin = float(margins.min()) if margins.size else math.inf
    return Optimum(best, margin, margin >= 0)


def equal_width(build: Callable[[int], nn.Module], weights: int) -> int:
    """The largest width whose dense network has at most that many weights in its layers (table 5.6).

    build: from a width to a network, which grows with it. The caller's random numbers are left alone.
    """
    low, high = 0, 1
    with torch.random.fork_rng(devices=[]):
        while _weights(build(high)) <= weights:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if _weights(build(middle)) <= weights else (low, middle)
    if not low:
        raise ValueError(f"weights: got {weights}, expected at least the {_weights(build(1))} of width 1")
    return low


def study(
    model: nn.Module,
    loader: Iterable[Any],
    settings: Iterable[Mapping[str, Any]],
    judge: Callable[[nn.Module], float],
    *,
    epochs: int,
    method: Method | str = "edge-popup",
    lr: float = 0.1,
    seed: int = 0,
    callbacks: Any = (),
) -> Array:
    """judge(subnetwork) of subnetworks of one model, trained from one seed, for each setting: options of
    :func:`fastrobust.nn.convert` (rate, gamma: table 5.2; score_range: 5.3; init: 5.4). The model is left as it was.

    Rates fall by a cosine from ``lr``, as in the thesis. ``callbacks`` are those of :func:`fastrobust.training.train`
    (figure 5.1: judge after each epoch).
    """
    found = []
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        for options in settings:
            torch.manual_seed(seed)
            masked = convert(model, **options)
            optimizer = score_optimizer(masked, lr)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs))
            train(masked, loader, method, epochs=epochs, optimizer=optimizer, scheduler=schedule, callbacks=callbacks)
            found.append(float(judge(masked)))
    return np.array(found)


def grid(rates: Sequence[float], gammas: Sequence[float], **options: Any) -> list[dict[str, Any]]:
    """The settings of table 5.2 for :func:`study`, row by row: reshape its answer to (rates, gammas)."""
    return [{"rate": r, "gamma": g, **options} for r in rates for g in gammas]


def plot_pattern(axes: Any, layer: MaskedLayer, *, inputs_first: bool = False) -> None:
    """Figures 5.3 and 5.4, on matplotlib axes."""
    axes.imshow(pattern(layer, inputs_first=inputs_first), cmap="Blues", interpolation="nearest", aspect="auto")
    axes.set_xlabel("outputs" if inputs_first else "inputs")
    axes.set_ylabel("inputs" if inputs_first else "outputs")


def plot_channels(axes: Any, learned: Array, random: Array) -> None:
    """Figure 5.2: kept weights by channel, largest first, beside those of a random mask."""
    axes.plot(np.sort(learned)[::-1], color="tab:red", label="learned")
    axes.plot(random, color="tab:blue", label="random")
    axes.set_xlabel("channel")
    axes.set_ylabel("kept weights")
    axes.legend()


def _masked(model: nn.Module) -> dict[str, MaskedLayer]:
    found = masked_layers(model)
    if not found:
        raise ValueError("model: got no masked layer, expected one of fastrobust.nn.convert")
    return found


def _counts(layer: MaskedLayer) -> Array:
    mask = layer.mask().cpu().numpy()
    return mask.reshape(*mask.shape[:2], -1).astype(np.int64)


def _weights(model: nn.Module) -> int:
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))


def _allocations(sizes: Sequence[int], kept: int) -> Iterator[tuple[int, ...]]:
    """Every m with 0 <= m_i <= n_i and that sum."""
    if not sizes:
        if kept == 0:
            yield ()
        return
    for m in range(max(0, kept - sum(sizes[1:])), min(sizes[0], kept) + 1):
        for rest in _allocations(sizes[1:], kept - m):
            yield (m, *rest)


def _best(sizes: Sequence[int], kept: int, value: Callable[[tuple[int, ...]], int]) -> Array:
    if not sizes or min(sizes) < 1 or not 0 <= kept <= sum(sizes):
        raise ValueError(f"kept: got {kept} of layers of {list(sizes)}, expected 0 to the sum of positive sizes")
    top = -1
    best: list[tuple[int, ...]] = []
    for m in _allocations(sizes, kept):
        here = value(m)
        if here > top:
            top, best = here, []
        if here == top:
            best.append(m)
    return np.array(best)


__all__ = [
    "Aligned", "Flops", "Kept", "Optimum", "aligned", "block_flops", "equal_width", "flops", "grid", "kept_weights",
    "pattern", "plot_channels", "plot_pattern", "random_channels", "study", "theorem_5_1", "theorem_5_2",
]  # fmt: skip
