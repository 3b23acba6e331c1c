"""Forwards of small networks around masked layers: every kind of node of a region, and what must not become one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrobust as fr

IMAGE = (3, 8, 6)
Body = Callable[["Net", Tensor], Any]


class Net(nn.Module):
    """Layers that a body may use; `body` returns what the network returns."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.point, self.down = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 8, 3, 2, 1)
        self.depth = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm, self.other = nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False)
        self.wide, self.rows, self.rows2 = nn.Linear(6 * 8 * 6, 5), nn.Linear(6, 7), nn.Linear(7, 7)
        self.small, self.halved = nn.Linear(6 * 4 * 3, 5), nn.Linear(8 * 4 * 3, 5)
        self.row_norm = nn.BatchNorm1d(7)
        self.offset, self.factor = nn.Parameter(torch.randn(1, 6, 1, 1)), nn.Parameter(torch.rand(6, 1, 1) + 0.5)
        self.column, self.image = nn.Parameter(torch.randn(8, 1)), nn.Parameter(torch.rand(1, 6, 8, 6))
        self.filters = nn.Parameter(0.3 * torch.randn(6, 6, 3, 3))
        self.up = nn.Parameter(0.3 * torch.randn(6, 6, 2, 2))
        self.slopes = nn.Parameter(torch.rand(6))
        for norm in (self.norm, self.other, self.row_norm):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 3)
            if norm.affine:
                nn.init.uniform_(norm.weight, -1, 2)
                nn.init.normal_(norm.bias)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def masked(body: Body, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return fr.nn.convert(Net(body), 0.5, 0.4).eval()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu in place": lambda x: F.relu(x * 1, inplace=True),
    "relu module": nn.ReLU(),
    "leaky": nn.LeakyReLU(0.1),
    "leaky 0": nn.LeakyReLU(0.0),
    "leaky negative": nn.LeakyReLU(-0.5),
    "leaky steep": nn.LeakyReLU(2.5),
    "leaky function": F.leaky_relu,
    "leaky in place": lambda x: F.leaky_relu_(x * 1, 0.2),
    "relu6": nn.ReLU6(),
    "relu6 function": F.relu6,
    "hardtanh": F.hardtanh,
    "hardtanh odd": nn.Hardtanh(0.25, 0.75),
    "hardtanh below": nn.Hardtanh(-2.0, -0.1),
    "silu": F.silu,
    "silu in place": nn.SiLU(True),
    "gelu": F.gelu,
    "gelu tanh": nn.GELU("tanh"),
    "hardswish": F.hardswish,
    "hardswish in place": nn.Hardswish(True),
    "elu": F.elu,
    "elu alpha": nn.ELU(0.3),
    "elu negative alpha": nn.ELU(-0.7),
    "selu": F.selu,
    "celu": nn.CELU(0.6),
    "tanh": torch.tanh,
    "tanh_": lambda x: (x * 1).tanh_(),
    "sigmoid": nn.Sigmoid(),
    "hardsigmoid": F.hardsigmoid,
    "softplus": F.softplus,
    "softplus parameters": nn.Softplus(2.0, 1.5),
    "mish": F.mish,
    "logsigmoid": F.logsigmoid,
    "softsign": F.softsign,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "tanhshrink": F.tanhshrink,
    "threshold": lambda x: F.threshold(x, 0.1, 0.1),
    "clamp": lambda x: x.clamp(-0.3, 0.4),
    "clamp below": lambda x: x.clamp(min=0.1),
    "abs": torch.abs,
    "exp": lambda x: torch.exp(0.1 * x),
    "square": torch.square,
    "pow": lambda x: x**2,
    "neg": torch.neg,
    "prelu": lambda x: F.prelu(x, torch.tensor([0.3]).to(x)),
}


def pools() -> dict[str, Callable[[Tensor], Tensor]]:
    mp, ap = F.max_pool2d, F.avg_pool2d
    return {
        "max 2": lambda h: mp(h, 2),
        "max 3/2": lambda h: mp(h, 3, 2, 1),
        "max 3/1": lambda h: mp(h, 3, 1, 1),
        "max odd": lambda h: mp(h, (2, 3), (1, 2), (1, 0)),
        "max dilated": lambda h: mp(h, 2, 1, 1, 2),
        "max ceil": lambda h: mp(h, 3, 2, ceil_mode=True),
        "max ceil padded": lambda h: mp(h, 3, 4, 1, ceil_mode=True),
        "max indices": lambda h: torch.add(
            *(t.to(h.dtype) * s for t, s in zip(mp(h, 2, return_indices=True), (1, 0.0), strict=True))
        ),
        "max unpool": lambda h: F.max_unpool2d(*mp(h, 2, return_indices=True), 2),
        "avg 2": lambda h: ap(h, 2),
        "avg 3/1": lambda h: ap(h, 3, 1, 1),
        "avg odd": lambda h: ap(h, (3, 2), (2, 1), (1, 0)),
        "avg not padded": lambda h: ap(h, 3, 2, 1, count_include_pad=False),
        "avg ceil": lambda h: ap(h, 3, 2, 1, ceil_mode=True),
        "avg divisor": lambda h: ap(h, 2, divisor_override=3),
        "avg ceil exact": lambda h: ap(h, 2, ceil_mode=True),
        "global": lambda h: F.adaptive_avg_pool2d(h, 1),
        "divisors": lambda h: F.adaptive_avg_pool2d(h, (4, 3)),
        "other divisors": lambda h: F.adaptive_avg_pool2d(h, (2, 6)),
        "no divisors": lambda h: F.adaptive_avg_pool2d(h, (3, 4)),
        "one row": lambda h: F.adaptive_avg_pool2d(h, (1, None)),
        "adaptive max": lambda h: F.adaptive_max_pool2d(h, (3, 2)),
        "global max": lambda h: h.amax((2, 3), keepdim=True),
        "whole": lambda h: ap(h, h.shape[2:]),
        "whole max": lambda h: mp(h, h.shape[2:]),
        "squares": lambda h: F.avg_pool2d(h * h, 2).sqrt(),
    }


MEANS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda h: h.mean((2, 3)),
    "mean kept": lambda h: h.mean((2, 3), keepdim=True),
    "mean back": lambda h: h.mean((-1, -2)),
    "mean list": lambda h: h.mean([3, 2], True),
    "mean typed": lambda h: h.mean((2, 3), dtype=torch.float32 if h.dtype == torch.float32 else None),
    "mean double": lambda h: h.mean((2, 3), dtype=torch.float64).to(h.dtype),
    "mean twice": lambda h: h.mean(3).mean(2),
    "mean channels": lambda h: h.mean(1, keepdim=True),
    "mean line": lambda h: h.mean(3, keepdim=True),
    "mean flat": lambda h: h.flatten(2).mean(2),
    "sum": lambda h: h.sum((2, 3)) / 48,
    "mean all but": lambda h: h.mean((1, 2, 3), keepdim=True),
    "std": lambda h: h.std((2, 3)),
}


def number(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype)


AFFINES: dict[str, Body] = {
    "times number": lambda m, h: h * 2,
    "number times": lambda m, h: 0.5 * h,
    "minus number": lambda m, h: h - 0.3,
    "number minus": lambda m, h: 1 - h,
    "divided": lambda m, h: h / 3,
    "number divided": lambda m, h: 1 / (h * h + 1),
    "plus parameter": lambda m, h: h + m.offset,
    "minus parameter": lambda m, h: h - m.offset,
    "parameter minus": lambda m, h: m.offset - h,
    "times factor": lambda m, h: h * m.factor,
    "divided by factor": lambda m, h: h / m.factor,
    "factor divided": lambda m, h: m.factor / (h * h + 1),
    "normalised": lambda m, h: (h - m.offset) / m.factor,
    "computed": lambda m, h: h * (m.factor * 2),
    "exponential": lambda m, h: h * m.factor.exp(),
    "0-dim": lambda m, h: h * number(1.5, torch.float32) + number(-0.25, torch.float32),
    "0-dim double": lambda m, h: (h - number(0.1, torch.float64)) / number(3, torch.float64),
    "0-dim int": lambda m, h: h * number(3, torch.int64) - number(2, torch.int32),
    "0-dim bool": lambda m, h: h * number(1, torch.bool) + number(1, torch.bool),
    "0-dim half": lambda m, h: h + number(0.5, torch.float16),
    "one": lambda m, h: h * torch.full((1,), 0.5).to(h) + torch.ones(1, 1, 1, 1).to(h),
    "bool": lambda m, h: h + True,
    "double vector": lambda m, h: (h * m.factor.double()).to(h.dtype),
    "half vector": lambda m, h: h * torch.tensor([1.0, 2, 0.5, 3, 1, 0.25], dtype=torch.float16).view(6, 1, 1),
    "int vector": lambda m, h: h * torch.arange(1, 7).view(6, 1, 1),
    "alpha": lambda m, h: torch.add(h, m.offset, alpha=2),
    "alpha sub": lambda m, h: torch.sub(h, 0.5, alpha=3),
    "rsub": lambda m, h: torch.rsub(h, 2.0),
    "rsub alpha": lambda m, h: torch.rsub(h, 2.0, alpha=3),
    "rsub tensor": lambda m, h: torch.rsub(h, m.offset),
    "rounded": lambda m, h: h + torch.div(h, 0.5, rounding_mode="floor"),
    "truncated": lambda m, h: h + torch.div(h, m.factor, rounding_mode="trunc"),
    "column": lambda m, h: h + m.column,
    "image": lambda m, h: h * m.image - m.image,
    "swapped": lambda m, h: torch.mul(m.factor, h),
    "addcmul": lambda m, h: torch.addcmul(m.offset, h, m.factor),
    "lerp": lambda m, h: torch.lerp(h, m.image, 0.3),
    "divided by 0": lambda m, h: torch.sigmoid(torch.nan_to_num(h.detach() / 0.0, 0, 1, -1)) + h,
    "times 0": lambda m, h: h * 0 + h.sigmoid(),
    "tiny": lambda m, h: h * 1e-30 * 1e30,
    "in place": lambda m, h: (h * 1).mul_(2).add_(m.offset).sub_(0.5).div_(3),
    "fill": lambda m, h: h + torch.zeros_like(h),
    "filled": lambda m, h: h + h.new_full((h.shape[0], 6, 1, 1), 0.5),
}

JOINS: dict[str, Body] = {
    "act + x": lambda m, h: F.silu(m.b(h)) + h,
    "act(conv + x)": lambda m, h: F.gelu(m.b(h) + h),
    "x + act": lambda m, h: h + F.relu6(m.b(h)),
    "act(x + conv)": lambda m, h: F.elu(h + m.b(h)),
    "norm(conv + x)": lambda m, h: m.norm(m.b(h) + h),
    "norm(act)": lambda m, h: m.other(F.silu(m.b(h))),
    "(conv + x) 2": lambda m, h: (m.b(h) + h) * 2,
    "conv 2 + x": lambda m, h: m.b(h) * 2 + h,
    "three": lambda m, h: m.b(h) + h + m.point(h),
    "two convolutions": lambda m, h: torch.relu(m.norm(m.b(h)) + m.other(m.point(h))),
    "twice": lambda m, h: (g := m.b(h)) + g,
    "minus": lambda m, h: m.b(h) - h,
    "alpha": lambda m, h: torch.add(m.b(h), h, alpha=0.5),
    "pixel inside": lambda m, h: torch.tanh(m.b(h) + m.point(h).mean((2, 3), keepdim=True)),
    "pixel first": lambda m, h: h.mean((2, 3), True) + m.b(h),
    "pixel outside": lambda m, h: torch.tanh(m.b(h) + h.amax((2, 3), keepdim=True)),
    "pixel alone": lambda m, h: h.amax((2, 3), keepdim=True) + F.adaptive_avg_pool2d(h, 1),
    "channel": lambda m, h: m.b(h) + h.mean(1, keepdim=True),
    "line": lambda m, h: m.b(h) + h.mean(2, keepdim=True),
    "one example": lambda m, h: m.b(h) + torch.zeros(1, 6, 8, 6).to(h),
    "excitation": lambda m, h: h * torch.sigmoid(m.point(F.silu(m.point(F.adaptive_avg_pool2d(h, 1))))),
    "rows excite": lambda m, h: h * torch.sigmoid(h.mean((2, 3)))[:, :, None, None],
    "excited": lambda m, h: m.b(h) * h.amax((2, 3), True).sigmoid() + h,
    "maximum": lambda m, h: torch.maximum(m.b(h), h),
    "minimum self": lambda m, h: torch.minimum(h, 0.5 * h),
    "product": lambda m, h: m.b(h) * h,
    "square": lambda m, h: (g := m.b(h)) * g,
    "quotient": lambda m, h: m.b(h) / (h * h + 1),
    "detached": lambda m, h: m.b(h) + h.detach(),
    "read twice": lambda m, h: m.b(g := F.silu(m.point(h))) + m.depth(g) + g,
    "dense": lambda m, h: m.point(c := m.b(h)) + c * h + m.norm(c),
    "in place": lambda m, h: m.b(h).add_(h).relu_(),
    "cut": lambda m, h: m.b(h) + m.point(h.detach()),
    "cat": lambda m, h: torch.cat([m.b(h), m.point(h)], 1)[:, 3:9],
    "cat four": lambda m, h: torch.cat([h, m.b(h), m.point(h), m.depth(h)], -3).unflatten(1, (4, 6)).sum(1),
    "cat same": lambda m, h: m.depth(F.relu(torch.cat([g := m.b(h), g], 1)).unfold(1, 6, 6).sum(1).permute(0, 3, 1, 2)),
    "cat width": lambda m, h: m.b(torch.cat([h, m.b(h)], 3)),
    "cat batch": lambda m, h: m.b(torch.cat([h, m.b(h)], 0)).chunk(2)[1] + h,
    "cat constant": lambda m, h: torch.cat([m.b(h)[:, :3], m.image[:, :3].expand(h.shape[0], -1, -1, -1)], 1),
    "chunks": lambda m, h: torch.add(*m.b(h).chunk(2, 1)).repeat(1, 2, 1, 1),
    "slice": lambda m, h: m.b(F.pad(m.b(h)[:, :, 1:, :-1], (0, 1, 1, 0))),
    "split": lambda m, h: torch.cat([F.relu(p) for p in m.b(h).split(2, 1)], 1),
    "shuffle": lambda m, h: m.b(h).view(-1, 2, 3, 8, 6).transpose(1, 2).reshape(-1, 6, 8, 6),
    "flip": lambda m, h: m.b(m.b(h).flip(3)),
    "roll": lambda m, h: m.b(h.roll(1, 2)),
    "permuted": lambda m, h: m.b(m.b(h).transpose(2, 3)).transpose(2, 3),
    "clone": lambda m, h: m.b(m.b(h).clone()) + h,
    "contiguous": lambda m, h: m.b(m.b(h).contiguous(memory_format=torch.channels_last)) + h,
}

OTHERS: dict[str, Body] = {
    "nearest": lambda m, h: m.b(F.interpolate(m.b(h), scale_factor=2)),
    "nearest size": lambda m, h: m.b(F.interpolate(h, (5, 9))),
    "exact": lambda m, h: F.interpolate(m.b(h), (5, 9), mode="nearest-exact"),
    "bilinear": lambda m, h: m.b(F.interpolate(m.b(h), scale_factor=2, mode="bilinear")),
    "aligned": lambda m, h: F.interpolate(m.b(h), (11, 5), mode="bilinear", align_corners=True),
    "bicubic": lambda m, h: F.interpolate(m.b(h), (11, 5), mode="bicubic"),
    "antialias": lambda m, h: F.interpolate(m.b(h), (4, 5), mode="bilinear", antialias=True),
    "plain convolution": lambda m, h: m.b(F.relu(F.conv2d(h, m.filters, padding=1))),
    "plain strided": lambda m, h: m.b(F.conv2d(h, m.filters, m.slopes, 2, 1)),
    "plain grouped": lambda m, h: F.conv2d(m.b(h), m.filters[:, :2], None, 1, 2, 2, 3),
    "same": lambda m, h: F.conv2d(m.b(h), m.filters[..., :2], padding="same"),
    "computed filters": lambda m, h: F.conv2d(
        m.b(F.conv2d(h, m.filters - m.filters.mean(), padding=1)), m.filters * 2, padding=1
    ),
    "transposed": lambda m, h: m.b(F.conv_transpose2d(m.b(h), m.up, stride=2)),
    "transposed padded": lambda m, h: F.conv_transpose2d(m.b(h), m.filters, m.slopes, 2, 1, 1),
    "padded": lambda m, h: m.b(F.pad(m.b(h), (1, 2, 0, 1))),
    "padded value": lambda m, h: F.pad(m.b(h), (1, -2), value=0.5),
    "reflected": lambda m, h: m.b(F.pad(m.b(h), (1, 1, 2, 1), mode="reflect")),
    "replicated": lambda m, h: F.pad(m.b(h), (1, 1, 2, 1), mode="replicate"),
    "circular": lambda m, h: m.b(F.pad(h, (1, 1, 1, 1), mode="circular")),
    "padded channels": lambda m, h: m.b(h) + F.pad(h[:, :4], (0, 0, 0, 0, 1, 1)),
    "shuffled": lambda m, h: F.pixel_shuffle(torch.cat([m.b(h), h], 1), 2),
    "unshuffled": lambda m, h: F.pixel_unshuffle(m.b(h), 2),
    "shuffled by 1": lambda m, h: m.b(F.pixel_shuffle(m.b(h), 1)),
    "prelu": lambda m, h: m.b(F.prelu(m.b(h), m.slopes)),
    "softmax": lambda m, h: m.b(h.softmax(1)),
    "normalize": lambda m, h: m.b(F.normalize(h)),
    "group norm": lambda m, h: m.b(F.group_norm(m.b(h), 2)),
    "instance norm": lambda m, h: F.instance_norm(m.b(h)),
    "local": lambda m, h: F.local_response_norm(m.b(h), 3),
    "dropout": lambda m, h: m.b(F.dropout(h, 0.5, False)),
    "where": lambda m, h: torch.where(m.image > 0.5, m.b(h), h),
    "einsum": lambda m, h: torch.einsum("nchw,oc->nohw", m.b(h), m.filters[:, :, 0, 0]),
    "attention": lambda m, h: (
        (F.softmax(h.flatten(2).transpose(1, 2) @ m.b(h).flatten(2) / 3, -1) @ h.flatten(2).transpose(1, 2))
        .transpose(1, 2)
        .reshape(h.shape)
    ),
    "same layer twice": lambda m, h: m.b(torch.sin(m.b(h) * (m.factor * 2))) * (m.factor * 3),
    "computed scales": lambda m, h: torch.sin(m.b(torch.sin(m.b(h) * (m.offset * 2))) * (m.offset * 0.5)),
    "same filters twice": lambda m, h: F.conv2d(
        torch.sin(m.b(F.conv2d(torch.sin(m.b(h)), m.filters * 1.5, padding=1))), m.filters * 0.5, padding=1
    ),
}

ROWS: dict[str, Body] = {
    "flatten": lambda m, h: m.wide(m.b(h).flatten(1)),
    "view": lambda m, h: m.wide(F.relu(m.b(h)).contiguous().view(h.shape[0], -1)),
    "reshape": lambda m, h: m.wide(torch.reshape(m.b(h), (-1, 288))),
    "flatten pooled": lambda m, h: m.small(F.max_pool2d(F.silu(m.b(h)), 2).flatten(1)),
    "flatten averaged": lambda m, h: m.small(torch.flatten(F.avg_pool2d(m.b(h), 2), 1)),
    "flatten last": lambda m, h: m.wide(m.b(h.contiguous(memory_format=torch.channels_last)).flatten(1)),
    "flatten strided": lambda m, h: m.halved(F.silu(m.down(h)).flatten(1)),
    "permuted rows": lambda m, h: m.wide(m.b(h).permute(0, 2, 3, 1).reshape(-1, 288)),
    "flat pixels": lambda m, h: m.wide(m.b(h).flatten(1)[:, :, None, None].flatten(1)),
    "flatten twice": lambda m, h: m.wide(F.silu(g := m.b(h).flatten(1))) + g[:, :5],
    "flat sum": lambda m, h: m.wide(m.b(h).flatten(1) + h.flatten(1)),
    "flat product": lambda m, h: m.wide(m.b(h).flatten(1) * 0.5 - 0.25),
    "rows": lambda m, h: m.rows(m.b(h).mean((2, 3))),
    "chain": lambda m, h: m.rows2(F.gelu(m.row_norm(m.rows(h.mean((2, 3)))))),
    "residual rows": lambda m, h: torch.relu(m.rows2(r := F.elu(m.rows(h.mean((2, 3))))) + r),
    "norm rows": lambda m, h: m.row_norm(m.rows2(F.silu(m.rows(h.amax((2, 3)))))),
    "vector": lambda m, h: m.rows(h.mean((2, 3)) * m.slopes - m.slopes),
    "pixels as rows": lambda m, h: m.rows(m.b(h).permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "cat rows": lambda m, h: m.rows2(torch.cat([m.rows(h.mean((2, 3)))[:, :4], m.wide(m.b(h).flatten(1))[:, :3]], 1)),
    "cat whole rows": lambda m, h: torch.cat([m.wide(m.b(h).flatten(1)), m.rows(h.mean((2, 3)))], 1),
    "softmax rows": lambda m, h: m.rows(h.mean((2, 3))).softmax(1),
    "tokens": lambda m, h: m.rows(h.flatten(2).transpose(1, 2)).mean(1),
    "mixed sum": lambda m, h: (
        m.rows(h.mean((2, 3)))[:, :, None, None] + m.rows(h.mean((2, 3), True).flatten(1))[:, :, None, None]
    ),
}

OUTPUTS: dict[str, Body] = {
    "maps": lambda m, x: F.silu(m.b(F.relu(m.a(x)))),
    "inner": lambda m, x: (h := m.a(x), F.relu(m.b(h)), h),
    "rows and maps": lambda m, x: {"a": (h := m.b(m.a(x))), "b": [m.wide(h.flatten(1)), h.flatten(1)]},
    "copies": lambda m, x: ((h := m.b(m.a(x))), h.clone(), h.contiguous()),
    "input too": lambda m, x: (x, m.a(x)),
    "view": lambda m, x: m.b(m.a(x))[:, 2:4],
    "inner smooth": lambda m, x: ((h := F.silu(m.a(x))), m.b(h)),
    "inner pooled": lambda m, x: ((h := F.max_pool2d(m.a(x), 2)), m.b(h), F.max_pool2d(h, 2)),
    "inner exp": lambda m, x: ((h := torch.exp(0.1 * m.a(x))), m.b(h)),
    "mean": lambda m, x: ((h := m.a(x).mean((2, 3))), m.rows(h)),
    "concatenated": lambda m, x: ((h := torch.cat([m.a(x), m.b(m.a(x))], 1)), h[:, :6] + 1),
}


def _after(f: Callable[[Tensor], Tensor]) -> list[tuple[str, Body]]:
    return [
        ("act", lambda m, x: f(m.a(x))),
        ("norm act conv", lambda m, x: m.b(f(m.norm(m.a(x))))),
        ("act norm", lambda m, x: m.point(m.other(f(m.b(m.a(x)))) + 0.5)),
        ("add act", lambda m, x: m.b(f(m.b(h := m.a(x)) + h))),
        ("act add", lambda m, x: m.b(f(m.b(h := m.a(x))) + h)),
        ("twice", lambda m, x: f(f(m.norm(m.a(x)))) + f(m.a(x))),
        ("depth", lambda m, x: m.down(f(m.depth(f(m.a(x)))))),
    ]


def bodies() -> dict[str, Body]:
    """Everything by name."""
    found: dict[str, Body] = {}
    for name, f in ACTIVATIONS.items():
        found |= {f"{name}: {how}": body for how, body in _after(f)}
    for name, f in {**pools(), **MEANS}.items():
        found[f"{name}: of a sum"] = lambda m, x, f=f: f(m.norm(m.a(x)))
        found[f"{name}: of an activation"] = lambda m, x, f=f: f(F.silu(m.b(h := m.a(x)) + h))
        if name in pools() and name not in ("global", "whole", "whole max", "global max"):
            found[f"{name}: between"] = lambda m, x, f=f: m.b(f(torch.tanh(m.a(x))))
            found[f"{name}: of the image"] = lambda m, x, f=f: m.a(f(x)) + 1
    for kind, group in (("constants", AFFINES), ("joined", JOINS), ("others", OTHERS), ("rows", ROWS)):
        for name, g in group.items():
            found[f"{kind}: {name}"] = lambda m, x, g=g: g(m, F.silu(m.norm(m.a(x))))
            if kind in ("constants", "joined"):
                found[f"{kind}: {name}, sum"] = lambda m, x, g=g: m.point(g(m, m.b(m.a(x))))
                found[f"{kind}: {name}, pooled"] = lambda m, x, g=g: F.max_pool2d(F.gelu(g(m, m.a(x))), 2, 2, 1)
    for name, g in OUTPUTS.items():
        found[f"output: {name}"] = g
    return found
