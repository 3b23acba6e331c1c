"""Bounds are never violated: every method, activation, norm and layer kind, by sampling and by attack."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from combinations import combinations
from fastrobust.bounds import compute_bounds

from .nets import NETS, ONE_PASS, make, margins, points_of_set

SETS = {
    "linf-clip": (math.inf, lambda x: 0.1, (0.0, 1.0)),
    "linf-element": (math.inf, lambda x: torch.rand_like(x) * 0.1, None),
    "l2": (2.0, lambda x: 0.3, None),
    "l2-element-clip": (2.0, torch.rand_like, (0.0, 1.0)),
    "l1-clip": (1.0, lambda x: 0.8, (0.0, 1.0)),
    "l3-example": (3.0, lambda x: torch.linspace(0, 0.3, len(x), dtype=x.dtype), (0.0, 1.0)),
    "zero": (math.inf, lambda x: 0.0, None),
}


def worst_points(
    net: torch.nn.Module, x: Tensor, eps: Tensor | float, clip: tuple[float, float] | None, y: Tensor
) -> Tensor:
    """l-infinity PGD on each margin, both ways: (2 (K - 1), B, ...)."""
    out = []
    for j in range(4):
        for sign in (1, -1):
            z = x.clone()
            for _ in range(10):
                z.requires_grad_(True)
                loss = sign * margins(net(z), y)[:, j].sum()
                (g,) = torch.autograd.grad(loss, z)
                z = torch.maximum(torch.minimum(z.detach() - 0.25 * eps * g.sign(), x + eps), x - eps)
                z = z if clip is None else z.clamp(*clip)
            out.append(z.detach())
    return torch.stack(out)


@pytest.mark.parametrize("name", list(NETS))
@pytest.mark.parametrize("which", list(SETS))
def test_sampled_and_attacked_points_lie_inside(name: str, which: str) -> None:
    net, shape = make(name)
    net = net.double()
    x, y = torch.rand(3, *shape, dtype=torch.float64), torch.tensor([0, 3, 4])
    p, radius, clip = SETS[which]
    eps = radius(x)
    points = points_of_set(x, eps, p, clip, 300)
    if p == math.inf:
        points = torch.cat([points, worst_points(net, x, eps, clip, y)])
    with torch.no_grad():
        z = net(points.flatten(0, 1)).view(*points.shape[:2], -1)
        m = margins(z, y)
        for method in ONE_PASS:
            plain = compute_bounds(net, x, eps, norm=p, clip=clip, method=method)
            assert (plain.lower <= z.amin(0) + 1e-9).all() and (plain.upper >= z.amax(0) - 1e-9).all(), method
            found = compute_bounds(
                net, x, eps, norm=p, clip=clip, method=method, labels=y, return_linear=method != "ibp"
            )
            assert (found.lower <= m.amin(0) + 1e-9).all() and (found.upper >= m.amax(0) - 1e-9).all(), method
            if found.linear is not None:
                for s in range(0, len(points), 41):
                    assert (found.linear.lower_at(points[s]) <= m[s] + 1e-9).all(), method
                    assert (found.linear.upper_at(points[s]) >= m[s] - 1e-9).all(), method


@pytest.mark.parametrize("name", ["mlp-relu", "cnn", "residual", "mixed"])
@pytest.mark.parametrize("method", ["crown", "fast-lin", "crown-ibp"])
def test_intersection_never_loosens_and_stays_sound(name: str, method: str) -> None:
    net, shape = make(name, 3)
    x, y = torch.rand(3, *shape), torch.tensor([1, 0, 2])
    with torch.no_grad():
        one = compute_bounds(net, x, 0.1, clip=(0, 1), method=method, labels=y)
        ibp = compute_bounds(net, x, 0.1, clip=(0, 1), method="ibp", labels=y)
        both = compute_bounds(net, x, 0.1, clip=(0, 1), method=method, labels=y, intersect=True)
        m = margins(net(points_of_set(x, 0.1, math.inf, (0, 1), 500).flatten(0, 1)).view(500, 3, -1), y)
    slack = 1e-4 * (one.upper - one.lower).abs().max()
    assert (both.lower >= ibp.lower - slack).all() and (both.upper <= ibp.upper + slack).all()
    assert (both.upper - both.lower).mean() <= (one.upper - one.lower).mean() + slack
    assert (both.lower <= m.amin(0) + 1e-5).all() and (both.upper >= m.amax(0) - 1e-5).all()


@pytest.mark.parametrize("name", list(NETS))
def test_float32_equals_float64(name: str) -> None:
    net, shape = make(name)
    x, y = torch.rand(3, *shape), torch.tensor([0, 3, 4])
    with torch.no_grad():
        for (p, radius, clip), method, sides in combinations(SETS.values(), ONE_PASS, ("both", "lower")):
            eps = radius(x)
            wide = eps.double() if isinstance(eps, Tensor) else eps
            got = compute_bounds(net.float(), x, eps, norm=p, clip=clip, method=method, labels=y, sides=sides)
            want = compute_bounds(
                net.double(), x.double(), wide, norm=p, clip=clip, method=method, labels=y, sides=sides
            )
            scale = want.lower.abs().max()
            assert (got.lower - want.lower).abs().max() <= 5e-5 * scale, (p, method)
            if sides == "both":
                assert (got.upper - want.upper).abs().max() <= 5e-5 * scale, (p, method)
            else:
                assert got.upper is None


@pytest.mark.parametrize("method", ONE_PASS)
def test_chunks_batches_and_memory_caps_change_nothing(method: str) -> None:
    net, shape = make("cnn", 1)
    x, y = torch.rand(16, *shape), torch.randint(0, 5, (16,))
    with torch.no_grad():
        whole = compute_bounds(net, x, 0.05, clip=(0, 1), method=method, labels=y).lower
        for size in (1, 3, 7):
            part = compute_bounds(net, x[:size], 0.05, clip=(0, 1), method=method, labels=y[:size]).lower
            torch.testing.assert_close(part, whole[:size], rtol=1e-5, atol=1e-5)
        capped = compute_bounds(net, x, 0.05, clip=(0, 1), method=method, labels=y, max_memory=1 << 14).lower
        torch.testing.assert_close(capped, whole, rtol=1e-5, atol=1e-5)
        empty = compute_bounds(net, x[:0], 0.05, clip=(0, 1), method=method, labels=y[:0])
    assert empty.lower.shape == (0, 4) and empty.upper is not None and empty.upper.shape == (0, 4)


def test_spec_rows_equal_labels() -> None:
    net, shape = make("cnn")
    x, y = torch.rand(2, *shape), torch.tensor([1, 4])
    eye = torch.eye(5)
    rows = torch.stack([torch.stack([eye[k] - eye[j] for j in range(5) if j != k]) for k in y.tolist()])
    with torch.no_grad():
        for method in ONE_PASS:
            a = compute_bounds(net, x, 0.05, method=method, labels=y)
            b = compute_bounds(net, x, 0.05, method=method, spec=rows)
            torch.testing.assert_close(a.lower, b.lower, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(a.upper, b.upper, rtol=1e-4, atol=1e-5)


def test_intermediate_bounds_hold() -> None:
    net, shape = make("cnn")
    x = torch.rand(2, *shape)
    with torch.no_grad():
        found = compute_bounds(net, x, 0.05, method="crown", return_intermediate=True).intermediate
        assert set(found) == {"0", "2", "5"}
        points = points_of_set(x, 0.05, math.inf, None, 200).flatten(0, 1)
        for name, upto in (("0", 1), ("2", 3), ("5", 6)):
            z = net[:upto](points).unflatten(0, (200, 2))
            low, up = found[name]
            assert (low <= z.amin(0) + 1e-5).all() and (up >= z.amax(0) - 1e-5).all()
