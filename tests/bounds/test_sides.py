"""One side alone: the upper bounds of rows are minus the lower bounds of their negatives."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from fastrobust.bounds import Bounds, compute_bounds
from fastrobust.bounds.auto_lirpa import BoundedModule, BoundedTensor, PerturbationLpNorm

from .nets import NETS, ONE_PASS, make, margins, points_of_set

KINDS = ("plain", "labels", "spec", "spec of an example")


def rows(kind: str, batch: int, classes: int, like: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = {"spec": (3, classes), "spec of an example": (batch, 3, classes)}
    if kind in shape:
        return {"spec": torch.randn(shape[kind], generator=generator).to(like)}
    return {"labels": torch.randint(classes, (batch,), generator=generator)} if kind == "labels" else {}


def same(a: Tensor, b: Tensor, exactly: bool) -> None:
    if exactly:
        assert torch.equal(a, b)
    else:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()) if b.numel() else 0.0)


@pytest.mark.parametrize("name", ["mlp-relu", "mlp-tanh", "cnn", "residual", "mixed", "conv1d"])
@pytest.mark.parametrize("method", ONE_PASS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_side_is_that_of_both(name: str, method: str, kind: str) -> None:
    net, shape = make(name, 2)
    x = torch.rand(3, *shape)
    given = rows(kind, 3, 6 if name == "mixed" else 5, x)
    for options in ({"norm": math.inf, "clip": (0, 1)}, {"norm": 2.0}, {"norm": 2.0, "clip": (0, 1)}):
        with torch.no_grad():
            both = compute_bounds(net, x, 0.05, method=method, **options, **given)
            lower = compute_bounds(net, x, 0.05, method=method, sides="lower", **options, **given)
            upper = compute_bounds(net, x, 0.05, method=method, sides="upper", **options, **given)
        assert lower.upper is None and upper.lower is None and upper.upper is not None and both.upper is not None
        same(lower.lower, both.lower, False)
        same(upper.upper, both.upper, False)


def flipped(b: Bounds) -> Tensor:
    assert b.upper is not None
    return -b.upper


@pytest.mark.parametrize("name", ["mlp-relu", "cnn", "residual"])
@pytest.mark.parametrize("method", ONE_PASS)
@pytest.mark.parametrize("batch", [1, 3, 7, 16])
def test_upper_bounds_are_minus_the_lower_ones_of_minus_the_rows_bit_for_bit(
    name: str, method: str, batch: int
) -> None:
    net, shape = make(name, 1)
    x, spec = torch.rand(batch, *shape), torch.randn(batch, 4, 5)
    with torch.no_grad():
        for rounding in ("nearest", "outward"):
            up = compute_bounds(net, x, 0.05, method=method, spec=spec, sides="upper", rounding=rounding)
            low = compute_bounds(net, x, 0.05, method=method, spec=-spec, sides="lower", rounding=rounding)
            assert torch.equal(flipped(up), low.lower)


@pytest.mark.parametrize("method", ONE_PASS)
@pytest.mark.parametrize("kind", KINDS)
def test_outward_rounding(method: str, kind: str) -> None:
    net, shape = make("residual", 1)
    x = torch.rand(2, *shape)
    given = rows(kind, 2, 5, x)
    with torch.no_grad():
        both = compute_bounds(net, x, 0.03, method=method, rounding="outward", **given)
        up = compute_bounds(net, x, 0.03, method=method, rounding="outward", sides="upper", **given).upper
        z = net(points_of_set(x, 0.03, math.inf, None, 200).flatten(0, 1)).view(200, 2, -1)
    assert up is not None and both.upper is not None
    torch.testing.assert_close(up, both.upper, rtol=1e-6, atol=1e-6)
    if kind == "plain":
        assert (z.amax(0) <= up).all()
    if kind == "labels":
        assert (margins(z, given["labels"]).amax(0) <= up + 1e-6).all()


@pytest.mark.parametrize("name", list(NETS))
def test_upper_bounds_hold(name: str) -> None:
    net, shape = make(name, 4)
    net, x, y = net.double(), torch.rand(2, *shape, dtype=torch.float64), torch.tensor([1, 3])
    with torch.no_grad():
        z = net(points_of_set(x, 0.1, math.inf, (0, 1), 600).flatten(0, 1)).view(600, 2, -1)
        for method in ONE_PASS:
            plain = compute_bounds(net, x, 0.1, clip=(0, 1), method=method, sides="upper")
            assert plain.upper is not None and (plain.upper >= z.amax(0) - 1e-9).all()
            m = compute_bounds(net, x, 0.1, clip=(0, 1), method=method, labels=y, sides="upper", intersect=True)
            assert m.upper is not None and (m.upper >= margins(z, y).amax(0) - 1e-9).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rounding", ["nearest", "outward"])
@pytest.mark.parametrize("method", ["crown-ibp", "fast-lin", "crown"])
def test_linear_bounds_of_one_side(kind: str, rounding: str, method: str) -> None:
    net, shape = make("cnn", 1)
    x = torch.rand(3, *shape)
    given = rows(kind, 3, 5, x)
    with torch.no_grad():
        options = dict(method=method, rounding=rounding, return_linear=True, **given)
        both, up = compute_bounds(net, x, 0.05, **options), compute_bounds(net, x, 0.05, sides="upper", **options)
        if kind in ("plain", "labels"):
            none = {**options, **{k: v[:0] for k, v in given.items()}}
            empty = compute_bounds(net, x[:0], 0.05, sides="upper", **none).upper
            assert empty is not None and empty.shape == (0, 4 if kind == "labels" else 5)
    assert both.linear is not None and up.linear is not None and up.linear.lower_A is None and up.linear.lower_b is None
    torch.testing.assert_close(up.linear.upper_A, both.linear.upper_A, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(up.linear.upper_b, both.linear.upper_b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(up.linear.upper_at(x), both.linear.upper_at(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="lower_at"):
        up.linear.lower_at(x)


@pytest.mark.parametrize("method", ONE_PASS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_upper_bounds(method: str, kind: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))
    net = net.double()
    x = 0.2 + 0.6 * torch.rand(2, 1, 4, 4, dtype=torch.float64)
    given = rows(kind, 2, 3, x)
    eps = torch.tensor([0.05, 0.1], dtype=torch.float64, requires_grad=True)

    def f(x: Tensor, eps: Tensor) -> Tensor:
        up = compute_bounds(net, x, eps, method=method, sides="upper", **given).upper
        assert up is not None
        return up

    assert torch.autograd.gradcheck(f, (x.requires_grad_(True), eps), atol=1e-5)
    one, two = (compute_bounds(net, x, eps, method=method, sides=s, **given).upper for s in ("upper", "both"))
    assert one is not None and two is not None
    for a, b in zip(*(torch.autograd.grad(t.sum(), list(net.parameters())) for t in (one, two)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", ["IBP", "CROWN-IBP", "CROWN"])
def test_the_adapter_asks_for_what_is_asked(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastrobust.bounds import auto_lirpa

    net, shape = make("cnn")
    x = torch.rand(2, *shape)
    asked: list[str] = []
    whole = auto_lirpa.compute_bounds

    def noted(*args: object, **options: object) -> Bounds:
        asked.append(str(options["sides"]))
        return whole(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(auto_lirpa, "compute_bounds", noted)
    model, bounded = BoundedModule(net, x), BoundedTensor(x, PerturbationLpNorm(norm=math.inf, eps=0.05))
    with torch.no_grad():
        low, up = model.compute_bounds(x=(bounded,), method=method)
        none, alone = model.compute_bounds(x=(bounded,), method=method, bound_lower=False)
        below, nothing = model.compute_bounds(x=(bounded,), method=method, bound_upper=False)
        if method != "IBP":
            got = model.compute_bounds(x=(bounded,), method=method, bound_lower=False, return_A=True)[2]
            kept = got[model.output_name[0]][model.input_name[0]]
            assert kept["lA"] is None and kept["lbias"] is None and kept["uA"].shape == (2, 5, *shape)
    assert asked[:3] == ["both", "upper", "lower"] and none is None and nothing is None
    same(alone, up, False)
    same(below, low, False)


def test_an_unknown_side_is_refused() -> None:
    net, shape = make("cnn")
    with pytest.raises(ValueError, match="sides"):
        compute_bounds(net, torch.rand(1, *shape), 0.1, sides="left")


@pytest.mark.parametrize("name", ["mlp-relu", "cnn", "residual"])
@pytest.mark.parametrize("method", ONE_PASS)
def test_the_default_dtype_does_not_matter(name: str, method: str) -> None:
    net, shape = make(name)
    net.requires_grad_(False)
    x, y = torch.rand(2, *shape), torch.tensor([1, 3])
    want = compute_bounds(net, x, 0.03, method=method, labels=y)
    torch.set_default_dtype(torch.float64)
    try:
        got = compute_bounds(net, x, 0.03, method=method, labels=y)
        outward = compute_bounds(net, x, 0.03, method=method, labels=y, rounding="outward")
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.lower.dtype == outward.lower.dtype == torch.float32
    assert torch.equal(got.lower, want.lower) and torch.equal(flipped(got), flipped(want))
    assert (outward.lower <= want.lower + 1e-5).all()
