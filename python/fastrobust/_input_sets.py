"""What is known of input sets {x + d : ||d||_p <= eps} and their clips, by the definitions of the bounds and by what
ships."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def dual_exponent(p: float) -> float:
    """q with 1/p + 1/q = 1."""
    if p == 1:
        return math.inf
    return 1.0 if p == math.inf else p / (p - 1.0)


def eps_like(eps: float | Tensor, x: Tensor) -> Tensor:
    """eps (scalar, (B,) or x's shape) as a tensor that broadcasts against x."""
    if not isinstance(eps, Tensor) and isinstance(eps, (int, float)):
        return torch.full((), eps, dtype=x.dtype, device=x.device)  # no copy from the host, unlike as_tensor
    e = torch.as_tensor(eps, dtype=x.dtype, device=x.device)
    if e.dim() == 1 and x.dim() != 1 and e.shape[0] == x.shape[0]:
        return e.view(-1, *[1] * (x.dim() - 1))
    return e


# (low, high): two numbers, or two tensors that broadcast to x
Clip = tuple[float, float] | tuple[Tensor, Tensor] | None


def input_box(x: Tensor, eps: float | Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """The smallest box around the input set: [x - eps, x + eps], cut at ``clip``."""
    e = eps_like(eps, x)
    if clip is None:
        return x - e, x + e
    low, high = (c.to(x) if isinstance(c, Tensor) else c for c in clip)
    return (x - e).clamp(min=low), (x + e).clamp(max=high)


def _power_sum_root(s: Tensor, q: float) -> Tensor:
    """s ** (1 / q) with a zero derivative at 0."""
    positive = s > 0
    return torch.where(positive, torch.where(positive, s, torch.ones_like(s)).pow(1.0 / q), torch.zeros_like(s))


def _largest(t: Tensor, keep: int) -> Tensor:
    """The largest of t >= 0 over all but the first ``keep`` dimensions, 1 where it is 0 or not finite; a constant."""
    t = t.detach().flatten(keep)
    top = t.amax(-1) if t.shape[-1] else t.new_zeros(t.shape[:-1])
    return torch.where((top > 0) & top.isfinite(), top, 1.0)


def row_norm(w: Tensor, q: float, times: Tensor | float = 1.0) -> Tensor:
    """times ||w||_q over all but the first dimension, for w >= 0: powers of numbers that are at most 1 do not overflow,
    and those that vanish do not count."""
    w = w.flatten(1)
    if q == math.inf:
        return times * (w.amax(1) if w.shape[1] else w.sum(1))
    if q == 1:
        return times * w.sum(1)
    top = _largest(w, 1)
    return (times * top) * _power_sum_root((w / top[:, None]).pow(q).sum(1), q)


def dual_norm(
    e: Tensor, weight: Tensor, q: float, layer: Callable[[Tensor, Tensor], Tensor], conv: tuple[Any, ...]
) -> Tensor:
    """||e * w||_q for every row w of a layer: a product (``conv`` empty) or a convolution with these arguments."""
    if q == 1:
        return layer(e, weight.abs())
    if q != math.inf:
        # Small e may meet large w: powers in float64 of numbers up to 1, none of them so small that a product of two
        # vanishes
        wide, w = e.double(), weight.double().abs()
        least = torch.finfo(torch.float64).tiny ** (0.5 / q)

        def powers(t: Tensor, top: Tensor) -> Tensor:
            return torch.where(t > 0, (t / top).clamp(min=least), 0.0).pow(q)

        top_e = _largest(wide, 1).view(-1, *[1] * (e.dim() - 1))
        top_w = _largest(w, 1)
        shape = (-1, *[1] * (w.dim() - 1))
        size = _power_sum_root(layer(powers(wide, top_e), powers(w, top_w.view(shape))), q)
        # out channels: the last dimension of a product, the second of a convolution
        return (size * top_e * (top_w.view(-1, 1, 1) if conv else top_w)).to(e.dtype)
    if conv:
        return _max_conv2d(e, weight.abs(), *conv)
    return (
        torch.stack([(row.unsqueeze(-2) * weight.abs()).amax(-1) for row in e])
        if len(e)
        else e.new_zeros(*e.shape[:-1], len(weight))
    )


def _max_conv2d(e: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
    """max instead of sum of weight * e over each window."""
    kh, kw = weight.shape[2:]
    pad = (padding, padding) if isinstance(padding, int) else tuple(padding)
    step = (stride, stride) if isinstance(stride, int) else tuple(stride)
    dil = (dilation, dilation) if isinstance(dilation, int) else tuple(dilation)
    cols = F.unfold(e, (kh, kw), dil, pad, step)  # (B, C kh kw, L)
    b, _, length = cols.shape
    out_h = (e.shape[2] + 2 * pad[0] - dil[0] * (kh - 1) - 1) // step[0] + 1
    cols = cols.view(b, groups, 1, cols.shape[1] // groups, length)
    w = weight.flatten(1).view(1, groups, weight.shape[0] // groups, -1, 1)
    return (cols * w).amax(3).view(b, weight.shape[0], out_h, length // out_h)
