"""Random models of ordinary PyTorch code around masked layers, for the tests of frozen models."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

import fastrobust as fr

CHANNELS, SIDE, CLASSES = 4, 6, 3
Operation = Callable[["Network", Tensor, Tensor], Tensor]


def in_place(method: str, *args: Any) -> Operation:
    def run(m: Network, a: Tensor, b: Tensor) -> Tensor:
        getattr(a, method)(*args)
        return a

    return run


def half_overwritten(m: Network, a: Tensor, b: Tensor) -> Tensor:
    a[:, :2] = b[:, 2:]
    return a


def border_filled(m: Network, a: Tensor, b: Tensor) -> Tensor:
    a[..., 0] = 0.25
    a[:, 1:3, ::2].mul_(0.5)
    return a


def through_a_view(m: Network, a: Tensor, b: Tensor) -> Tensor:
    rows = a.view(a.shape[0], -1) if a.is_contiguous() else a.flatten(1)
    rows.clamp_(min=-0.5)
    return a


def added_in_place(m: Network, a: Tensor, b: Tensor) -> Tensor:
    a += b
    return a


def transposed_write(m: Network, a: Tensor, b: Tensor) -> Tensor:
    a.transpose(2, 3).add_(b.mean((2, 3), keepdim=True))
    return a


def written_anew(m: Network, a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros_like(a) if m.flags["zeros"] else a.new_ones(a.shape)
    out[:, ::2] = a[:, ::2]
    out[:, 1] += b[:, 0]
    return out


def by_example(m: Network, a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a[i] * (1 + 0.5 * (i % 2)) for i in range(a.shape[0])])


def flagged(m: Network, a: Tensor, b: Tensor) -> Tensor:
    if m.training or m.flags["scale"] > 1:
        return a * m.flags["scale"]
    return a


def pixels(m: Network, a: Tensor, b: Tensor) -> Tensor:
    return m.rows(a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def checked(m: Network, a: Tensor, b: Tensor) -> Tensor:
    n, c, h, w = a.shape
    assert (c, h, w) == (CHANNELS, SIDE, SIDE) and a.shape == b.shape
    return a.reshape(n, 2, c // 2, h * w).transpose(1, 2).reshape(n, c, h, w)


def normalised(m: Network, a: Tensor, b: Tensor) -> Tensor:
    mean = torch.tensor([0.1, 0.2, 0.3, 0.4], device=a.device).view(1, -1, 1, 1)
    return (a - mean) / m.spread


OPERATIONS: dict[str, Operation] = {
    **{f"conv{i}": (lambda m, a, b, i=i: m.convs[i](a)) for i in range(3)},
    "norm": lambda m, a, b: m.norms[0](a),
    "other norm": lambda m, a, b: m.norms[1](a),
    "functional norm": lambda m, a, b: F.batch_norm(a, m.norms[0].running_mean, m.norms[0].running_var),
    "relu": lambda m, a, b: torch.relu(a),
    "relu_": lambda m, a, b: F.relu_(a),
    "module relu in place": lambda m, a, b: m.relu(a),
    "alias": lambda m, a, b: a,
    "add": lambda m, a, b: a + b,
    "twice": lambda m, a, b: a + a,
    "iadd": added_in_place,
    "sub": lambda m, a, b: torch.sub(a, b, alpha=2),
    "mul_": in_place("mul_", 0.5),
    "half overwritten": half_overwritten,
    "border filled": border_filled,
    "through a view": through_a_view,
    "transposed write": transposed_write,
    "written anew": written_anew,
    "copied": lambda m, a, b: torch.empty_like(a).copy_(a),
    "gate": lambda m, a, b: a * torch.sigmoid(b.mean((2, 3), keepdim=True)),
    "shift": lambda m, a, b: a + m.spread,
    "halves": lambda m, a, b: torch.cat(a.chunk(2, 1)[::-1], 1),
    "pool": lambda m, a, b: F.max_pool2d(a, 3, 1, 1),
    "crop": lambda m, a, b: F.pad(a[:, :, 1:, :-1], (0, 1, 1, 0)),
    "flip": lambda m, a, b: a.flip(3).contiguous(memory_format=torch.channels_last),
    "detached": lambda m, a, b: a + 0.5 * b.detach(),
    "gradless": lambda m, a, b: m.gradless(a, b),
    "dropout": lambda m, a, b: F.dropout(a, 0.5, training=m.training),
    "flag": flagged,
    "by example": by_example,
    "by batch": lambda m, a, b: a * 2 if a.shape[0] > 20 or a.size(0) == 1 else a,
    "rows": pixels,
    "checked": checked,
    "normalised": normalised,
    "where": lambda m, a, b: torch.where(a > b, a, 0.5 * b),
    "silu": lambda m, a, b: F.silu(a),
    "gelu": lambda m, a, b: F.gelu(a, approximate="tanh"),
    "falling": lambda m, a, b: F.leaky_relu(a, -0.5),
    "relu6": lambda m, a, b: F.relu6(a),
    "narrow": lambda m, a, b: F.hardtanh_(a, 0.1, 0.6),
    "softplus": lambda m, a, b: F.softplus(a, 2, 3),
    "elu_": lambda m, a, b: F.elu_(a, 0.4),
    "reversed": lambda m, a, b: 1 - a / 3,
    "numbers as tensors": lambda m, a, b: a * torch.tensor(2.0, dtype=torch.float64) - torch.tensor(1),
    "computed factor": lambda m, a, b: a * (m.spread * 2) + m.spread[0],
    "pixel": lambda m, a, b: a + b.mean((-1, -2), keepdim=True),
    "average": lambda m, a, b: F.avg_pool2d(a, 3, 1, 1),
    "average inside": lambda m, a, b: F.avg_pool2d(a, 3, 1, 1, count_include_pad=False),
    "coarse": lambda m, a, b: F.interpolate(F.max_pool2d(a, 2), scale_factor=2),
    "smooth": lambda m, a, b: F.interpolate(F.adaptive_avg_pool2d(a, (2, 3)), a.shape[2:], mode="bilinear"),
    "joined": lambda m, a, b: torch.cat([a, b, a], 1)[:, 2:6],
    "joined and mixed": lambda m, a, b: F.pixel_unshuffle(F.pixel_shuffle(torch.cat([a, b], 1), 2), 2)[:, 2:6],
    "product": lambda m, a, b: a * torch.tanh(b),
    "copy": lambda m, a, b: a.clone(),
    "flat": lambda m, a, b: (a.flatten(1) + b.flatten(1)).view(-1, CHANNELS, SIDE, SIDE),
}
WRAPPINGS = ("plain", "data parallel", "hook", "patched", "nested")
RESULTS = ("logits", "tuple", "dict", "maps")


class Plan(NamedTuple):
    """A model: operations on earlier tensors, counted from the last, the seed of its numbers, how it is wrapped."""

    steps: list[tuple[str, int, int]]
    seed: int
    wrapping: str
    result: str
    training: bool


plans = st.builds(
    Plan,
    st.lists(
        st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=9
    ),
    st.integers(0, 1000),
    st.sampled_from(WRAPPINGS),
    st.sampled_from(RESULTS),
    st.booleans(),
)


class Norm(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=False)


class Network(nn.Module):
    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.flags: dict[str, Any] = {"scale": 1.5, "zeros": bool(plan.seed % 2)}
        self.first = nn.Conv2d(2, CHANNELS, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, k, padding=k // 2, bias=k == 1) for k in (3, 1, 3))
        self.norms = nn.ModuleList([nn.BatchNorm2d(CHANNELS), Norm(CHANNELS)])
        self.relu = nn.ReLU(inplace=True)
        self.rows = nn.Linear(CHANNELS, CHANNELS)
        self.head = nn.Sequential(nn.Linear(CHANNELS, CLASSES), nn.BatchNorm1d(CLASSES))
        self.spread = nn.Parameter(torch.rand(1, CHANNELS, 1, 1) + 1)
        for norm in self.norms:
            norm.running_mean.normal_()
            norm.running_var.uniform_(5, 20)

    @torch.no_grad()
    def gradless(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.tanh(self.convs[1](a)) * b

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Any:
        held = [self.first(x) * scale]
        for name, i, j in self.plan.steps:
            a, b = held[-1 - i % len(held)], held[-1 - j % len(held)]
            held.append(OPERATIONS[name](self, a, b))
        logits = self.head(held[-1].mean((2, 3)))
        if self.plan.result == "tuple":
            return logits, held[-1]
        if self.plan.result == "dict":
            return {"logits": logits, "rows": [held[-1].flatten(1), held[0]]}
        return held[-1] if self.plan.result == "maps" else logits


def network(plan: Plan) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        model: nn.Module = fr.nn.convert(Network(plan), 0.4, 0.9)
    model.train(plan.training)
    convolution = model.convs[0]
    if plan.wrapping == "hook":
        convolution.register_forward_hook(lambda module, args, out: out * 0.5)
        model.relu.register_forward_pre_hook(lambda module, args: (args[0] - 0.1,))
    elif plan.wrapping == "patched":
        plain = convolution.forward
        convolution.forward = types.MethodType(lambda self, x: plain(x) + x, convolution)
    if plan.wrapping == "data parallel":
        return nn.DataParallel(model)
    return nn.Sequential(nn.Identity(), model).train(plan.training) if plan.wrapping == "nested" else model
