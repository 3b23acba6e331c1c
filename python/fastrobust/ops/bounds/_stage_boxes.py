"""Intervals up the stages of a network, and the lines around their nonlinear functions."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _C
from .._library import on_cpu
from . import _lines as lines
from ._pool import PoolWindow, relax_max_pool
from ._relu_box import relu_box
from ._rows import address, dense
from ._stage import Held, Image, Link, Parameters, Stage, by_channel, channels_first, flat_of, image_of, signed
from .intervals import RELU, _interval_conv_kernel, center_linear, relu_center, to_center

_CENTER = 0


def boxes_of(
    stages: list[Stage],
    given: Parameters,
    center: Tensor,
    radius: Tensor,
    shared: bool,
    kind: str | None,
    recorded: bool,
) -> list[Held]:
    """Intervals of every stage, and lines of the ReLUs where ``kind`` ("crown", "parallel") is given."""
    held = [Held(center, radius, None, (center, radius[:1] if shared else radius))]
    for stage in stages[1:]:
        held.append(_box(stage, stages, given, held, kind, recorded))
    return held


def _box(
    stage: Stage, stages: list[Stage], given: Parameters, held: list[Held], kind: str | None, recorded: bool
) -> Held:
    if stage.kind == "max":
        return _pooled(stage, stages, held, kind)
    bias = None
    for at, sign in stage.biases:
        own = signed(given.biases[at], sign)
        bias = dense(own) if bias is None else bias + own
    joined = kind is None and not recorded and stage.kind == "relu" and len(stage.links) == 1
    if stage.box is not None:
        c, r = map(dense, given.boxes[2 * stage.box : 2 * stage.box + 2])
        return Held(c, r, bias, (c, r))
    c, r = _affine(stage, stages, given, held, bias, joined)
    if stage.kind == "linear":
        return Held(c, r, bias, (c, r))
    if stage.kind == "scale":
        return Held(c, r, bias, _scaled_box(stage, given, c, r))
    if stage.kind != "relu":
        return _activated(stage, c, r, bias, kind)
    if joined and stage.links[0].at is not None:
        return Held(c, r, bias, (c, r))
    if kind is None and not recorded:
        return Held(c, r, bias, relu_center(c, r.expand_as(c)))
    box = relu_box(c, r, bias, stage.shape[0], None if kind is None else kind == "crown")
    assert box.after is not None
    slopes, intercepts = box.lines or (None, None)
    return Held(c, r, bias, box.after, slopes, intercepts, box.living)


def _activated(stage: Stage, c: Tensor, r: Tensor, bias: Tensor | None, kind: str | None) -> Held:
    """The range of an activation other than ReLU and, where wanted, its lines in terms of the input less the bias."""
    low, up = c - r, c + r
    slopes = intercepts = None
    if kind is not None:
        told = lines.told(stage.kind, stage.params)
        slopes, intercepts = lines._kernel(low, up, *told, kind == "crown", bias)
    after = to_center(*lines.interval_activation(low, up, stage.kind, stage.params))
    return Held(c, r, bias, after, slopes, intercepts)


def _pooled(stage: Stage, stages: list[Stage], held: list[Held], kind: str | None) -> Held:
    """Max pooling: its lines speak of the neurons that ``index`` tells."""
    source, window = stage.links[0].source, stage.links[0].window
    assert window is not None
    c, r = held[source].after
    shape = stages[source].shape
    low, up = image_of(c - r, shape), image_of(c + r, shape)
    slopes = intercepts = index = None
    if kind is not None:
        found = relax_max_pool(low, up, window, kind)
        slopes, intercepts = (flat_of(t.flatten(0, 1)).view(len(t), len(c), -1) for t in found[:2])
        channel = torch.arange(shape[0], device=c.device)[:, None]
        index = (found.source * shape[0] + channel).movedim(1, 2).flatten(1).to(torch.int32)
    after = to_center(*(flat_of(max_pool(t, window)) for t in (low, up)))
    return Held(c, r, None, after, slopes, intercepts, index=index)


def max_pool(t: Tensor, window: PoolWindow) -> Tensor:
    return F.max_pool2d(t, *window[:4], ceil_mode=window.ceil_mode)


def _affine(
    stage: Stage, stages: list[Stage], given: Parameters, held: list[Held], bias: Tensor | None, joined: bool
) -> tuple[Tensor, Tensor]:
    """Centre and radius of the sum of the links; of the ReLU of a single product where that is ``joined``."""
    c: Any = None
    r: Any = None
    for link in stage.links:
        x, y = held[link.source].after
        if link.at is None:
            x, y, owned = signed(x, link.sign), y, False
        else:
            w, b, finish = (
                signed(given.weights[link.at], link.sign),
                bias if c is None else None,
                RELU if joined else _CENTER,
            )
            if link.dense:
                before = stages[link.source].shape
                x, y = center_linear(channels_first(x, before), channels_first(y, before), w, b, finish)
                owned = y.stride(0) != 0 or y.shape[0] == 1
            else:
                x, y = _interval_conv(x, y, stages[link.source].shape, stage.shape, w, b, link, finish)
                owned = True
        if c is None:
            c, r, ours = x, y, owned
        elif ours:
            c, r = c.add_(x), r.add_(y)
        else:
            c, r, ours = c + x, r + y, True
    if bias is not None and stage.links[0].at is None:
        c = (by_channel(c, stage.shape) + bias).flatten(1)
    return c, r


def _interval_conv(
    x: Tensor, y: Tensor, before: Image, shape: Image, w: Tensor, b: Tensor | None, link: Link, finish: int
) -> tuple[Tensor, Tensor]:
    """``conv.interval_convolution`` of flat maps."""
    x, w = dense(x), dense(w)
    bias = None if b is None else dense(b)
    (c, height, width), batch = before, x.shape[0]
    image = (c * height * width, width * c, c, 1)
    shared = y.stride(0) == 0 or y.shape[0] != batch
    y = dense(y[:1] if shared else y)
    if not on_cpu(x):  # the vendor's convolutions
        maps = image_of(x, before), image_of(y, before)
        x, y = _interval_conv_kernel(*maps, w, bias, link.stride, link.padding, finish, link.dilation, link.groups)
        return flat_of(x), flat_of(y)
    sizes = (batch, height, width, c, *shape[1:], shape[0], *w.shape[2:], *link.stride, *link.padding)
    strides = image, (0 if shared else image[0], *image[1:])
    out = x.new_empty(batch, math.prod(shape)), x.new_empty(batch, math.prod(shape))
    apart = (*link.dilation, link.groups)
    work = x.new_empty(_numbers(sizes, strides, apart))
    given = (x.data_ptr(), y.data_ptr(), w.data_ptr(), address(bias), work.data_ptr())
    _C.bounds_interval_conv(sizes, *strides, *given, out[0].data_ptr(), out[1].data_ptr(), finish, apart)
    return out


@functools.lru_cache(256)
def _numbers(sizes: tuple[int, ...], strides: tuple[tuple[int, ...], tuple[int, ...]], apart: tuple[int, ...]) -> int:
    """That the kernel of an interval convolution works with."""
    found: int = _C.bounds_interval_conv(sizes, *strides, 0, 1, 0, 0, 0, 0, 0, 0, apart)
    return found


def _scaled_box(stage: Stage, given: Parameters, c: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    c, r = by_channel(c, stage.shape), by_channel(r, stage.shape)
    if stage.factor is not None:
        f = given.scales[stage.factor]
        c, r = c * f, r * f.abs()
    if stage.shift is not None:
        c = c + given.scales[stage.shift]
    return c.flatten(1), r.flatten(1)
