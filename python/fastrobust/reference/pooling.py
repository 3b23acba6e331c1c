"""Lines around max pooling in plain torch: the definition of ``fastrobust.ops.bounds.relax_max_pool``."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def relax_max_pool(lower: Tensor, upper: Tensor, window: Any, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """(slopes, intercepts, source) of max over windows of x in [lower, upper], both (B, C, H, W); finite ends.

    In a window let j be the input with the largest lower end, of several the one with the largest upper end, of those
    the first, M the largest upper end of the others. x_j <= max x, and max x <= max(x_j, M), which is

        x_j                                      where M <= l_j,
        at most x_j + (M - l_j)                  else ("parallel"),
        at most M + s (x_j - l_j), s = max(0, u_j - M) / (u_j - l_j)      else ("crown"): max(x_j, M) is convex in x_j.
    """
    kernel, stride, padding, dilation, ceil_mode = window
    batch, channels, height, width = lower.shape
    kept = lambda t: F.max_pool2d(t, kernel, stride, padding, dilation, ceil_mode)  # noqa: E731
    rows, columns = kept(lower[:1, :1].detach()).shape[2:]
    source = torch.empty(batch, channels, rows * columns, dtype=torch.int64)
    slopes, above = [], []
    for b in range(batch):
        for c in range(channels):
            for o in range(rows * columns):
                y0, x0 = (o // columns) * stride[0] - padding[0], (o % columns) * stride[1] - padding[1]
                taps = [
                    (y, x)
                    for y in range(y0, y0 + dilation[0] * (kernel[0] - 1) + 1, dilation[0])
                    for x in range(x0, x0 + dilation[1] * (kernel[1] - 1) + 1, dilation[1])
                    if 0 <= y < height and 0 <= x < width
                ]
                l, u = [lower[b, c, y, x] for y, x in taps], [upper[b, c, y, x] for y, x in taps]
                j = max(range(len(taps)), key=lambda t: (l[t].item(), u[t].item(), -t))
                rest = [u[t] for t in range(len(taps)) if t != j]
                M = torch.stack(rest).amax() if rest else torch.full_like(l[j], -math.inf)
                source[b, c, o] = taps[j][0] * width + taps[j][1]
                one = torch.ones_like(l[j])
                if l[j] >= M:
                    slope, offset = one, torch.zeros_like(one)
                elif kind == "parallel":
                    slope, offset = one, M - l[j]
                else:
                    slope = (u[j] - M) / (u[j] - l[j]) if u[j] > M else torch.zeros_like(one)
                    offset = M - slope * l[j]
                slopes.append(slope)
                above.append(offset)
    shape = (batch, channels, rows, columns)
    up, offsets = torch.stack(slopes).view(shape), torch.stack(above).view(shape)
    both = torch.stack([torch.ones_like(up), up]) if kind == "crown" else up[None]
    return both, torch.stack([torch.zeros_like(offsets), offsets]), source
