"""10^5 points per network and input set (a quarter of them by default), sampled and attacked, lie inside the bounds of
every method.

Values are found in float32 where the network is convolutional; the extreme points are evaluated again in float64, and
it is those values that are compared.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from combinations import THOROUGH
from fastrobust.bounds import compute_bounds

from .nets import NETS, ONE_PASS, make, margins, points_of_set

COUNT = 100_000 if THOROUGH else 25_000
EXAMPLES = 2
SETS = {
    "linf-clip": (math.inf, lambda x: 0.1, (0.0, 1.0)),
    "linf-some-elements": (math.inf, lambda x: 0.2 * torch.rand_like(x) * (torch.rand_like(x) < 0.5), None),
    "l2-clip": (2.0, lambda x: 0.5, (0.0, 1.0)),
    "l2-element": (2.0, lambda x: torch.rand_like(x), None),
    "l1-clip": (1.0, lambda x: 1.5, (0.0, 1.0)),
    "l3-example": (3.0, lambda x: torch.linspace(0.1, 0.4, len(x), dtype=x.dtype), (0.0, 1.0)),
    "point": (math.inf, lambda x: 0.0, (0.0, 1.0)),
}


def spread_over(eps: Tensor | float, x: Tensor) -> Tensor:
    e = torch.as_tensor(eps, dtype=x.dtype)
    return (e.view(-1, *[1] * (x.dim() - 1)) if e.dim() == 1 else e).expand_as(x)


def attacked(net: nn.Module, x: Tensor, eps: Tensor, p: float, clip: tuple[float, float] | None, y: Tensor) -> Tensor:
    """Every iterate of projected gradient descent on every margin, both ways, from random starts: (T, *x.shape)."""
    steps, jobs = 10, 2 * 4
    starts = COUNT // 2 // (steps * jobs * len(x))
    v = torch.randn(jobs, starts, *x.shape, dtype=x.dtype) * 0.3
    sign = torch.tensor([1.0, -1.0], dtype=x.dtype).repeat(4).view(jobs, 1, 1)
    which = torch.arange(4).repeat_interleave(2)
    found = []
    for _ in range(steps):
        v = v / v.flatten(3).norm(p=p, dim=3).clamp(min=1).view(jobs, starts, len(x), *[1] * (x.dim() - 1))
        point = x + eps * v
        point = point if clip is None else point.clamp(*clip)  # towards x: shorter, so inside the ball as well
        found.append(point.flatten(0, 1))
        leaf = point.detach().requires_grad_(True)
        m = margins(net(leaf.flatten(0, 2)).view(jobs, starts, len(x), -1), y)
        loss = (sign * m[torch.arange(jobs), ..., which]).sum()
        (g,) = torch.autograd.grad(loss, leaf)
        g = g * eps
        if p == math.inf:
            v = v - 0.4 * g.sign()
        else:
            v = v - 0.4 * g / g.flatten(3).norm(dim=3).clamp(min=1e-30).view(jobs, starts, len(x), *[1] * (x.dim() - 1))
    return torch.cat(found).detach()


def extremes(net: nn.Module, exact: nn.Module, points: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum over the points of outputs and margins, in float64: (B, K + K - 1) each."""

    def values(f: nn.Module, t: Tensor) -> Tensor:
        z = f(t.flatten(0, 1)).view(*t.shape[:2], -1)
        return torch.cat([z, margins(z, y)], 2)

    z = torch.cat([values(net, part) for part in points.split(10_000)])
    ends = []
    for at in (z.argmin(0), z.argmax(0)):  # (B, V): each value's own extreme point
        picked = torch.stack([points[at[b], b] for b in range(points.shape[1])], 1)  # (V, B, *shape)
        again = values(exact, picked.double())
        ends.append(torch.stack([again[v, :, v] for v in range(again.shape[0])], 1))
    return ends[0], ends[1]


USUAL = ("linf-clip", "l2-clip")
CASES = [
    pytest.param(n, s, marks=[] if n in ("mlp-relu", "mlp-tanh") or s in USUAL else pytest.mark.thorough)
    for n in NETS
    for s in SETS
    if n.startswith("mlp") or s in (*USUAL, "linf-some-elements")
]


@pytest.mark.parametrize("name,which", CASES)
def test_no_point_lies_outside(name: str, which: str) -> None:
    net, shape = make(name)
    first = next(m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Conv1d)))
    with torch.no_grad():  # neurons that are constant, and constant 0
        first.weight[0].zero_()
        assert first.bias is not None
        first.bias[0] = 0.0
    exact = copy.deepcopy(net).double()
    quick = exact if name.startswith("mlp") else net
    x = torch.rand(EXAMPLES, *shape, dtype=torch.float64)
    x[0] = (4 * x[0]).round() / 4  # some pixels on the faces of the box
    y = torch.tensor([0, 3])
    p, radius, clip = SETS[which]
    eps = radius(x)
    dtype = next(quick.parameters()).dtype
    wide = spread_over(eps, x)
    sampled = points_of_set(x.to(dtype), wide.to(dtype), p, clip, COUNT // 2 // EXAMPLES)
    points = torch.cat([sampled, attacked(quick, x.to(dtype), wide.to(dtype), p, clip, y)])
    assert points.shape[0] * EXAMPLES >= 0.999 * COUNT
    slack = 1e-9 if dtype == torch.float64 else 1e-5  # float32 points leave the set by their rounding
    with torch.no_grad():
        low, up = extremes(quick, exact, points, y)
        for method in ONE_PASS:
            plain = compute_bounds(exact, x, eps, norm=p, clip=clip, method=method)
            found = compute_bounds(
                exact, x, eps, norm=p, clip=clip, method=method, labels=y, return_linear=method != "ibp"
            )
            assert plain.upper is not None and found.upper is not None
            lower, upper = torch.cat([plain.lower, found.lower], 1), torch.cat([plain.upper, found.upper], 1)
            assert (lower <= low + slack).all() and (upper >= up - slack).all(), method
            if found.linear is not None:
                some = points[:: max(1, len(points) // 2000)].double()
                m = margins(exact(some.flatten(0, 1)).view(*some.shape[:2], -1), y)
                flat = some.flatten(2)
                below = torch.einsum("bsn,tbn->tbs", found.linear.lower_A.flatten(2), flat) + found.linear.lower_b
                assert (below <= m + slack).all(), method
                above = torch.einsum("bsn,tbn->tbs", found.linear.upper_A.flatten(2), flat) + found.linear.upper_b
                assert (above >= m - slack).all(), method
