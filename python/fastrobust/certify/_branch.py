"""Lower bounds of a ReLU chain under fixed neurons: beta-CROWN (Wang et al. 2021) in float64, many subproblems a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

_IDLE = (nn.Identity, nn.Dropout, nn.Flatten)


def chain(model: nn.Module) -> list[nn.Module] | None:
    """The layers of a Sequential of Linear, Conv2d, ReLU and Flatten that ends in a Linear, or None."""
    if type(model) is not nn.Sequential or model._forward_hooks or model._forward_pre_hooks:
        return None
    layers: list[nn.Module] = []
    for part in model:
        if type(part) is nn.Sequential:
            inner = chain_parts(part)
            if inner is None:
                return None
            layers += inner
        else:
            layers.append(part)
    return layers if layers and type(layers[-1]) is nn.Linear and all(map(_known, layers)) else None


def chain_parts(part: nn.Sequential) -> list[nn.Module] | None:
    if part._forward_hooks or part._forward_pre_hooks or any(type(m) is nn.Sequential for m in part):
        return None
    return list(part)


def _known(m: nn.Module) -> bool:
    if m._forward_hooks or m._forward_pre_hooks or m.training and type(m) is nn.Dropout:
        return False
    if type(m) is nn.Conv2d:
        return m.padding_mode == "zeros" and not isinstance(m.padding, str)
    if type(m) is nn.Flatten:
        return m.start_dim == 1 and m.end_dim == -1
    return type(m) in (nn.Linear, nn.ReLU, nn.Identity, nn.Dropout)


@dataclass
class Affine:
    """z -> W z + b on flat vectors of given inner shapes."""

    layer: Any
    before: tuple[int, ...]
    after: tuple[int, ...]

    def __post_init__(self) -> None:
        self.weight: Tensor
        self.bias: Tensor | None
        self.weight = self.layer.weight.detach().double()
        b = self.layer.bias
        self.bias = None if b is None else b.detach().double()

    def forward(self, z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = z.reshape(-1, *self.before)
        if isinstance(self.layer, nn.Linear):
            out = nn.functional.linear(z, weight, bias)
        else:
            m = self.layer
            out = nn.functional.conv2d(z, weight, bias, m.stride, m.padding, m.dilation, m.groups)
        return out.flatten(1)

    def interval(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        mid, half = (
            self.forward((lo + hi) / 2, self.weight, self.bias),
            self.forward((hi - lo) / 2, self.weight.abs(), None),
        )
        return mid - half, mid + half

    def backward(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """(N, S, out) -> (N, S, in) and the constant (N, S)."""
        n, s = a.shape[:2]
        if isinstance(self.layer, nn.Linear):
            return a @ self.weight, (a @ self.bias if self.bias is not None else a.new_zeros(n, s))
        m = self.layer
        rows = a.reshape(n * s, *self.after)
        below = conv2d_input((n * s, *self.before), self.weight, rows, m.stride, m.padding, m.dilation, m.groups)
        const = (rows.sum((2, 3)) @ self.bias).reshape(n, s) if self.bias is not None else a.new_zeros(n, s)
        return below.reshape(n, s, -1), const


class Chain:
    """Alternating affine maps and ReLUs; ``maps[k]`` is followed by a ReLU except the last."""

    def __init__(self, layers: list[nn.Module], x: Tensor):
        self.maps: list[Affine] = []
        z = x[:1].detach()
        relu = True
        for m in layers:
            out = m(z)
            if type(m) in (nn.Linear, nn.Conv2d):
                if not relu or type(m) is nn.Linear and z.dim() != 2:
                    raise ValueError("model: got two linear layers in a row, expected ReLUs between them")
                self.maps.append(Affine(m, tuple(z.shape[1:]), tuple(out.shape[1:])))
                relu = False
            elif type(m) is nn.ReLU:
                if not self.maps:
                    raise ValueError("model: got a ReLU on the input, expected a linear layer first")
                relu = True
            z = out

    def intervals(self, lo: Tensor, hi: Tensor, known: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        out = []
        for k, m in enumerate(self.maps[:-1]):
            low, up = m.interval(lo, hi)
            if k < len(known):
                low, up = torch.maximum(low, known[k][0]), torch.minimum(up, known[k][1])
            out.append((low, up))
            lo, hi = low.clamp(min=0), up.clamp(min=0)
        return out

    def lower(
        self,
        a: Tensor,
        lo: Tensor,
        hi: Tensor,
        bounds: Any,
        upto: int,
        alpha: Any = None,
        beta: Any = None,
        split: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Lower bounds (N, S) of a @ (output of map ``upto``), and the coefficients of x."""
        const = a.new_zeros(a.shape[:2])
        for k in range(upto, -1, -1):
            a, c = self.maps[k].backward(a)
            const = const + c
            if k == 0:
                break
            low, up = bounds[k - 1]
            crossing = (low < 0) & (up > 0)
            slope = torch.where(crossing, up / torch.where(crossing, up - low, 1), (low >= 0).to(a.dtype))
            under = torch.where(crossing, (up > -low).to(a.dtype) if alpha is None else alpha[k - 1], slope)
            shift = torch.where(crossing, -slope * low, 0)
            neg, pos = a.clamp(max=0), a.clamp(min=0)
            const = const + (neg * shift.unsqueeze(1)).sum(-1)
            a = neg * slope.unsqueeze(1) + pos * under.unsqueeze(1)
            if beta is not None:  # s z >= 0 on this side of the split: subtracting beta s z only lowers the minimum
                a = a - (beta[k - 1] * split[k - 1]).unsqueeze(1)
        mid, half = ((lo + hi) / 2).unsqueeze(1), ((hi - lo) / 2).unsqueeze(1)
        return const + (a * mid).sum(-1) - (a.abs() * half).sum(-1), a

    def root(self, lo: Tensor, hi: Tensor) -> list[tuple[Tensor, Tensor]]:
        found: list[tuple[Tensor, Tensor]] = []
        for k, _m in enumerate(self.maps[:-1]):
            found = self.intervals(lo, hi, found)[: k + 1]
            if k:
                size = found[k][0].shape[1]
                for j in range(0, size, 256):
                    eye = torch.eye(size, dtype=lo.dtype, device=lo.device)[j : j + 256].expand(len(lo), -1, -1)
                    low = self.lower(eye, lo, hi, found, k)[0]
                    up = -self.lower(-eye, lo, hi, found, k)[0]
                    found[k][0][:, j : j + 256] = torch.maximum(found[k][0][:, j : j + 256], low)
                    found[k][1][:, j : j + 256] = torch.minimum(found[k][1][:, j : j + 256], up)
        return found
