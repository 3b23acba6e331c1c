"""Lines around max pooling. Definition: :mod:`fastrobust.reference.pooling`."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _C
from .. import _checks as ck
from .._library import define, nothing_intercepts
from ._rows import dense


class PoolWindow(NamedTuple):
    """The geometry of torch's max_pool2d, per axis (height, width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """The size of the pooled image; ValueError where a window has nothing of the image in it."""
        return _output_size(self, height, width)


class PoolLines(NamedTuple):
    slopes: Tensor  # (1 or 2, B, C, ho, wo)
    intercepts: Tensor  # (2, B, C, ho, wo)
    source: Tensor  # (B, C, ho * wo) int64


@functools.lru_cache(maxsize=256)
def _output_size(window: PoolWindow, height: int, width: int) -> tuple[int, int]:
    found = []
    for axis, size in enumerate((height, width)):
        k, s, p, d = window.kernel[axis], window.stride[axis], window.padding[axis], window.dilation[axis]
        room = size + 2 * p - d * (k - 1) - 1
        n = (-(-room // s) if window.ceil_mode else room // s) + 1
        if window.ceil_mode and (n - 1) * s >= size + p:
            n -= 1  # windows begin inside the image or its padding on the left
        starts = range(-p, n * s - p, s)
        if n < 1 or not all(any(0 <= start + d * i < size for i in range(k)) for start in starts):
            raise ValueError(f"window: got {window} for {height} x {width}, expected windows that reach into the image")
        found.append(n)
    return found[0], found[1]


def _positions(height: int, width: int, window: PoolWindow, device: torch.device) -> tuple[Tensor, Tensor]:
    """Flat positions (windows, taps) that each window reads, and where they lie outside the image (the position there
    is another)."""
    axes, lost = [], []
    for axis, (size, count) in enumerate(zip((height, width), window.output_size(height, width), strict=True)):
        start = torch.arange(count, device=device) * window.stride[axis] - window.padding[axis]
        at = start[:, None] + torch.arange(window.kernel[axis], device=device) * window.dilation[axis]
        lost.append((at < 0) | (at >= size))
        axes.append(at.clamp(0, size - 1))
    (y, x), (no_y, no_x) = axes, lost
    index = (y[:, None, :, None] * width + x[None, :, None, :]).reshape(-1, y.shape[1] * x.shape[1])
    return index, (no_y[:, None, :, None] | no_x[None, :, None, :]).reshape(index.shape)


@functools.lru_cache(maxsize=64)
def _kept_positions(height: int, width: int, window: PoolWindow, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return _positions(height, width, window, device)


def _positions_of(image: Tensor, window: PoolWindow) -> tuple[Tensor, Tensor]:
    found = _kept_positions if nothing_intercepts() else _positions
    height, width = image.shape[2:]
    return found(height, width, window, image.device)


def relax_max_pool(lower: Tensor, upper: Tensor, window: PoolWindow, kind: str = "parallel") -> PoolLines:
    """Lines around max pooling on the box [lower, upper]: with x_j the input that an output follows (``source``),

        slopes[0] x_j + intercepts[0] <= max over the window <= slopes[-1] x_j + intercepts[1].

    j has the largest lower end of its window, of equal ones the largest upper end. Below lies x_j itself. With M the
    largest upper end of the others, where M > l_j, above lie x_j + M - l_j ("parallel") and the chord of max(x_j, M)
    over [l_j, u_j] ("crown": two slopes), which is nowhere above the constant max(M, u_j); where M <= l_j both are x_j.

    lower, upper: (B, C, H, W) float32 or float64, lower <= upper. Returns slopes (1 or 2, B, C, ho, wo), intercepts
    (2, B, C, ho, wo), source (B, C, ho * wo) int64, flat positions in H * W. Where the interval of x_j is not finite
    the chord is horizontal; NaN in x_j or M gives NaN. Differentiable; no host synchronisation.

    ValueError or TypeError: shapes, dtypes or devices differ; not four dimensions; a window outside the image; an
    unknown kind.
    """
    lower = ck.check_state(lower, "lower")
    ck.check_like(upper, "upper", lower, "lower")
    if lower.dim() != 4:
        raise ValueError(f"lower: got shape {tuple(lower.shape)}, expected (B, C, H, W)")
    if kind not in ("parallel", "crown"):
        raise ValueError(f"kind: got {kind!r}, expected 'parallel' or 'crown'")
    size = window.output_size(*lower.shape[2:])
    source, rival = _picks(lower, upper, [n for pair in window[:4] for n in pair], window.ceil_mode)
    l, u = lower.flatten(2).gather(2, source), upper.flatten(2).gather(2, source)
    others = upper.flatten(2).gather(2, rival.clamp(min=0)).masked_fill(rival < 0, -math.inf)
    clear = others <= l  # not with NaN
    one, zero = torch.ones_like(l), torch.zeros_like(l)
    if kind == "crown":
        chord = ~clear & (u > others) & (u - l).isfinite()
        start, end = torch.where(chord, l, zero), torch.where(chord, u, zero)
        slope = torch.where(chord, (u - others) / torch.where(chord, end - start, one), zero)
        # through the higher of the ends, which differ by rounding alone
        above = torch.maximum(others - slope * start, u - slope * end)
        slopes = torch.stack([one, torch.where(clear, one, slope)])
    else:
        above, slopes = others - l, one.unsqueeze(0)
    intercepts = torch.stack([zero, torch.where(clear, zero, above)])
    return PoolLines(slopes.unflatten(3, size), intercepts.unflatten(3, size), source)


def _picks_in_torch(lower: Tensor, upper: Tensor, window: PoolWindow) -> tuple[Tensor, Tensor]:
    index, outside = _positions_of(lower, window)
    low, high = (t.flatten(2)[..., index.flatten()].unflatten(2, index.shape) for t in (lower, upper))
    low, high = low.masked_fill(outside, -math.inf), high.masked_fill(outside, -math.inf)
    rank = torch.where(low == low.amax(3, keepdim=True), high, -math.inf)
    first = outside.to(torch.uint8).argmin(1)[:, None]  # where no end is above -inf
    tap = rank.argmax(3, keepdim=True)
    tap = torch.where(rank.gather(3, tap) == -math.inf, first, tap)
    taken = outside.expand(low.shape).scatter(3, tap, True)
    other = high.masked_fill(taken, -math.inf).argmax(3, keepdim=True)
    index = index.expand(low.shape)
    rival = torch.where(taken.gather(3, other), taken.to(torch.uint8).argmin(3, keepdim=True), other)
    rival = torch.where(taken.all(3, keepdim=True), -1, index.gather(3, rival))
    return index.gather(3, tap).squeeze(3), rival.squeeze(3)


def _window(sizes: list[int], ceil_mode: bool) -> PoolWindow:
    kernel, stride, padding, dilation = zip(sizes[::2], sizes[1::2], strict=True)
    return PoolWindow(kernel, stride, padding, dilation, ceil_mode)


def _picks_kernel(lower: Tensor, upper: Tensor, sizes: list[int], ceil_mode: bool) -> tuple[Tensor, Tensor]:
    window = _window(sizes, ceil_mode)
    if not lower.is_cpu:
        return _picks_in_torch(lower, upper, window)
    lower, upper = dense(lower), dense(upper)
    out = window.output_size(*lower.shape[2:])
    source, rival = (torch.empty(*lower.shape[:2], out[0] * out[1], dtype=torch.int64) for _ in range(2))
    _C.bounds_pool_picks(
        lower.dtype == torch.float64, lower.data_ptr(), upper.data_ptr(), source.data_ptr(), rival.data_ptr(),
        planes=lower.shape[0] * lower.shape[1], size=lower.shape[2:], out=out, kernel=window.kernel,
        stride=window.stride, padding=window.padding, dilation=window.dilation,
    )  # fmt: skip
    return source, rival


def _picks_fake(lower: Tensor, upper: Tensor, sizes: list[int], ceil_mode: bool) -> tuple[Tensor, Tensor]:
    shape = (*lower.shape[:2], math.prod(_window(sizes, ceil_mode).output_size(*lower.shape[2:])))
    return lower.new_empty(shape, dtype=torch.int64), lower.new_empty(shape, dtype=torch.int64)


_picks = define(
    "bounds_pool_picks",
    "(Tensor lower, Tensor upper, int[] sizes, bool ceil_mode) -> (Tensor, Tensor)",
    _picks_kernel,
    _picks_fake,
)


def above_level(values: Tensor, level: Tensor, window: PoolWindow) -> Tensor:
    """Where (B, C, H, W) a value exceeds the level (B, C, ho, wo) of a window that it is in."""
    index, outside = _positions_of(values, window)
    told = level.flatten(2).unsqueeze(3).masked_fill(outside, math.inf)
    least = torch.full_like(values, math.inf, memory_format=torch.contiguous_format).flatten(2)
    least = least.scatter_reduce(2, index.flatten().expand(*least.shape[:2], -1), told.flatten(2), "amin")
    return values > least.view(values.shape)
