"""Networks with products of bounded values, softmax, attention and normalisations by their own statistics."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrobust as fr
from fastrobust.bounds import UnsupportedLayerError, compute_bounds
from fastrobust.bounds import joint as J

METHODS = ("ibp", "ibp-linear", "crown-ibp", "fast-lin", "crown")


class Of(nn.Module):
    """A function behind a linear layer and before one."""

    def __init__(self, f: Callable[[Tensor], Tensor], out: int = 8) -> None:
        super().__init__()
        self.f, self.first, self.last = f, nn.Linear(6, 8), nn.Linear(out, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.f(self.first(x)))


class Vit(nn.Module):
    """Patches, one block of attention and a perceptron with layer norms, the mean of the tokens."""

    def __init__(self, width: int = 8, heads: int = 2, functional: bool = False) -> None:
        super().__init__()
        self.embed, self.heads, self.functional = nn.Conv2d(1, width, 4, 4), heads, functional
        self.place = nn.Parameter(0.2 * torch.randn(1, 4, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.head = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.Linear(width, 4)

    def mixed(self, h: Tensor) -> Tensor:
        if not self.functional:
            return self.attention(h, h, h, need_weights=False)[0]
        q, k, v = self.qkv(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).flatten(2).transpose(1, 2) + self.place
        h = h + self.mixed(self.norm1(h))
        h = h + self.down(F.gelu(self.up(self.norm2(h))))
        return self.head(h.mean(1))


def _normed(norm: Callable[[int], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 1, 1), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), norm(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, 4),
    )  # fmt: skip


def _encoder() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (3, 4)), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten())


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "hardswish": F.hardswish,
    "mish": F.mish,
    "hardsigmoid": F.hardsigmoid,
    "exp": torch.exp,
    "square": lambda x: x**2 + x.square() + x * x,
    "positive": lambda x: (x.sigmoid() + 0.1).log() + (x.exp() + 1).sqrt() + (x * x + 1).rsqrt() + 1 / (x * x + 1),
    "product": lambda x: x * x.flip(1) * torch.tanh(x),
    "quotient": lambda x: x / (1 + x.abs()),
    "softmax": lambda x: x.softmax(1),
    "softmax of a middle dimension": lambda x: x.view(-1, 2, 2, 2).softmax(2).flatten(1),
    "var": lambda x: x * x.var(1, keepdim=True) + x.std(1, keepdim=True),
    "normalise": lambda x: F.normalize(x + 3, dim=1),
    "rms norm": lambda x: F.rms_norm(x, (8,)),
    "matmul": lambda x: (x.view(-1, 2, 4) @ x.view(-1, 4, 2) @ x.view(-1, 2, 4)).flatten(1),
    "einsum": lambda x: torch.einsum("bnd,bmd->bnm", x.view(-1, 2, 4), x.view(-1, 2, 4)).repeat(1, 2, 1).flatten(1),
    "gated": lambda x: F.glu(torch.cat([x, x.flip(1)], 1), 1),
}
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{name: (lambda f=f: Of(f), (6,)) for name, f in FUNCTIONS.items()},
    "group norm": (lambda: _normed(lambda n: nn.GroupNorm(2, n)), (1, 8, 8)),
    "instance norm": (lambda: _normed(lambda n: nn.InstanceNorm2d(n, affine=True)), (1, 8, 8)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4)), (6,)),
    "vit": (Vit, (1, 8, 8)),
    "functional vit": (lambda: Vit(functional=True), (1, 8, 8)),
    "encoder layer": (_encoder, (12,)),
}


def _model(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    make, shape = MODELS[name]
    model = make().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, torch.rand(3, *shape)


def _points(x: Tensor, eps: float, norm: float, count: int = 200) -> Tensor:
    """Corners and surfaces of the set, (count, B, ...)."""
    v = torch.randn(count, *x.shape)
    if norm == 2:
        return x + eps * v / v.flatten(2).norm(dim=2).view(count, len(x), *[1] * (x.dim() - 1))
    v[::2] = v[::2].sign()
    return x + eps * v.clamp(-1, 1)


def _attacked(model: nn.Module, x: Tensor, eps: float, norm: float, k: int, sign: int) -> Tensor:
    """The largest sign * z_k that steps along the gradient find."""
    d = torch.zeros_like(x)
    for _ in range(15):
        d.requires_grad_()
        (g,) = torch.autograd.grad(sign * model(x + d)[:, k].sum(), d)
        with torch.no_grad():
            size = g.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1)).clamp(min=1e-30)
            d = d + 0.3 * eps * (g.sign() if norm != 2 else g / size)
            if norm == 2:
                d = d * (eps / d.flatten(1).norm(dim=1).view(size.shape).clamp(min=eps))
            else:
                d = d.clamp(-eps, eps)
    return model(x + d).detach()[:, k]


@pytest.mark.parametrize("norm", [2, float("inf")])
@pytest.mark.parametrize("name", list(MODELS))
def test_bounds_hold(name: str, norm: float) -> None:
    model, x = _model(name)
    for eps in (0.003, 0.1):
        points = _points(x, eps, norm)
        with torch.no_grad():
            z = model(points.flatten(0, 1)).view(*points.shape[:2], -1)
        room = 2e-5 * (1 + z.abs().amax())
        widths = {}
        for method in METHODS:
            with torch.no_grad():
                b = compute_bounds(model, x, eps, norm=norm, method=method)
            assert torch.isfinite(b.lower).all() and torch.isfinite(b.upper).all()
            assert (b.lower <= z.amin(0) + room).all() and (b.upper >= z.amax(0) - room).all()
            for k in (0, 1):
                assert (_attacked(model, x, eps, norm, k, 1) <= b.upper[:, k] + room).all()
                assert (_attacked(model, x, eps, norm, k, -1) >= b.lower[:, k] - room).all()
            widths[method] = float((b.upper - b.lower).mean())
        if eps == 0.003:  # linear bounds follow small sets
            assert widths["crown"] <= 1.1 * widths["ibp"] + 1e-6


@pytest.mark.parametrize("name", list(MODELS))
def test_a_set_of_one_point_gives_the_output(name: str) -> None:
    model, x = _model(name)
    for method in METHODS:
        with torch.no_grad():
            b = compute_bounds(model.double(), x.double(), 0.0, method=method)
            z = model(x.double())
        assert torch.allclose(b.lower, z, atol=1e-9) and torch.allclose(b.upper, z, atol=1e-9)


@pytest.mark.parametrize("name", ["group norm", "vit", "quotient", "mish", "matmul"])
def test_margins_gradients_and_linear_maps(name: str) -> None:
    model, x = _model(name)
    y = torch.tensor([0, 1, 2])
    for method in ("crown-ibp", "crown"):
        b = compute_bounds(model, x, 0.01, method=method, labels=y, return_linear=True)
        assert b.linear is not None and b.linear.lower_A is not None and b.linear.lower_b is not None
        points = _points(x, 0.01, float("inf"), 20)
        z = model(points.flatten(0, 1)).view(20, 3, -1).detach()
        own = z.gather(2, y.view(1, 3, 1).expand(20, 3, 1))
        margins = (own - z)[:, torch.arange(4) != y.view(3, 1)].view(20, 3, 3)
        line = torch.einsum("bkn,pbn->pbk", b.linear.lower_A.detach().flatten(2), points.flatten(2))
        assert (line + b.linear.lower_b.detach() <= margins + 1e-4).all()
        b.lower.sum().backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        alone = compute_bounds(model, x, 0.01, method=method, labels=y, sides="upper")
        assert torch.allclose(alone.upper, b.upper, atol=1e-4, rtol=1e-4)


def test_gradients_are_those_of_differences() -> None:
    torch.manual_seed(1)
    model = Of(lambda x: F.layer_norm(x, (8,)) * x.softmax(1)).double().eval()
    x = torch.rand(2, 6, dtype=torch.float64, requires_grad=True)

    def lower(x: Tensor) -> Tensor:
        return compute_bounds(model, x, 0.01, method="crown-ibp").lower

    assert torch.autograd.gradcheck(lower, (x,), eps=1e-7, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("heads", [1, 3])
def test_planes_and_intervals_of_products(heads: int) -> None:
    """Against every corner, and single products against those of matrices."""
    torch.manual_seed(heads)
    a, b = torch.randn(2, heads, 3, 4).double(), torch.randn(2, heads, 4, 2).double()
    r, s = torch.rand_like(a), torch.rand_like(b)
    node = J.Product((0, 1), (heads, 3, 2), "here", matrices=True)
    low, up = node.interval([(a - r, a + r), (b - s, b + s)])
    one, other = a.unsqueeze(-1), b.unsqueeze(-3)
    first, second = ((t - v).expand(2, heads, 3, 4, 2) for t, v in ((one, r.unsqueeze(-1)), (other, s.unsqueeze(-3))))
    third, fourth = ((t + v).expand(2, heads, 3, 4, 2) for t, v in ((one, r.unsqueeze(-1)), (other, s.unsqueeze(-3))))
    flat = J.Product((0, 1), (heads, 3, 4, 2), "here")
    each = flat.interval([(first, third), (second, fourth)])
    assert torch.allclose(low, each[0].sum(3)) and torch.allclose(up, each[1].sum(3))
    (cx, cy), ends = node.relax([(a - r, a + r), (b - s, b + s)], "crown")
    for _ in range(100):
        x, y = a + r * torch.randn_like(a).sign(), b + s * torch.randn_like(b).sign()
        plane = x @ cy + cx @ y
        assert (plane + ends[0] <= x @ y).all() and (plane + ends[1] >= x @ y).all()


@pytest.mark.parametrize("width", [1e-6, 1e-2, 1.0, 30.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lines_of_softmax(width: float, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    l = (3 * torch.randn(5, 4, 6)).to(dtype)
    u = l + width * torch.rand_like(l)
    node, apart = J.Softmax((0,), (4, 6), "here"), J.Differences((0,), (4, 6, 6), "here").interval([(l, u)])
    low, up = node.interval([apart])
    slopes, ends = node.relax([apart], "crown")
    slopes, ends = slopes.double(), ends.double()
    for step in range(200):
        t = torch.rand_like(l) if step % 2 else torch.randn_like(l).sign() * 0.5 + 0.5
        x = torch.minimum(torch.maximum(l + t * (u - l), l), u).double()
        p = x.softmax(-1)
        assert (low.double() <= p * (1 + 1e-6)).all() and (up.double() >= p * (1 - 1e-6)).all()
        line = (slopes * (x.unsqueeze(-2) - x.unsqueeze(-1))).sum(-1) + ends
        assert (line[0] <= p).all() and (line[1] >= p).all()
    if width <= 1:  # the interval is the range: its ends are attained
        at = torch.where(torch.eye(6, dtype=torch.bool), u.unsqueeze(-2), l.unsqueeze(-2)).softmax(-1)
        assert torch.allclose(at.diagonal(dim1=-2, dim2=-1), up, rtol=1e-4)


@pytest.mark.parametrize("size", [2, 3, 40])
def test_range_of_normalised_values(size: int) -> None:
    torch.manual_seed(size)
    low = torch.randn(50, size).double()
    up = low + torch.rand(50, 1).double() * torch.rand_like(low)
    below, above = J.normalised_range(low, up, 1e-5)
    for step in range(300):
        d = low + (up - low) * (torch.rand_like(low) if step % 2 else torch.rand_like(low).round())
        y = d * torch.rsqrt((d * d).mean(-1, keepdim=True) + 1e-5)
        assert (below <= y).all() and (y <= above).all()
    assert (above <= size**0.5).all() and (below >= -(size**0.5)).all()


@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_masked_attention(mask: str | None) -> None:
    seen = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 1]], dtype=torch.bool)
    given: dict[str, Any] = {"is_causal": True}
    if mask is not None:
        added = torch.zeros(3, 3).masked_fill(~seen, -torch.inf) + 0.3 * torch.rand(3, 3)
        given = {"attn_mask": seen if mask == "bool" else added}

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.head = nn.Linear(4, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x.view(-1, 3, 4)).unsqueeze(1).chunk(3, -1)
            return self.head(F.scaled_dot_product_attention(q, k, v, **given).flatten(1))

    torch.manual_seed(0)
    model, x = Causal().eval(), torch.rand(2, 12)
    points = _points(x, 0.05, float("inf"))
    with torch.no_grad():
        z = model(points.flatten(0, 1)).view(200, 2, 3)
        for method in METHODS:
            b = compute_bounds(model, x, 0.05, method=method)
            assert (b.lower <= z.amin(0) + 1e-5).all() and (b.upper >= z.amax(0) - 1e-5).all()


def test_what_is_not_defined_is_refused() -> None:
    model = Of(lambda x: x / (x + 0.01)).eval()
    with pytest.raises(ValueError, match="reciprocal at .* is not bounded on the set"):
        compute_bounds(model, torch.rand(2, 6), 1.0)
    with pytest.raises(UnsupportedLayerError, match="power of 3"):
        compute_bounds(Of(lambda x: x**3).eval(), torch.rand(2, 6), 0.1)
    for name in ("vit", "group norm", "mish"):
        model, x = _model(name)
        with pytest.raises(UnsupportedLayerError, match="outward"):
            compute_bounds(model, x, 0.1, rounding="outward")
    with pytest.raises(ValueError, match="training mode or has no running statistics"):
        compute_bounds(nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten()).eval(),
                       torch.rand(1, 1, 4, 4), 0.1)  # fmt: skip


def test_best_slopes_keep_crowns_lines_and_say_so() -> None:
    model, x = _model("vit")
    options: dict[str, Any] = {"labels": torch.tensor([0, 1, 2]), "sides": "lower"}
    with torch.no_grad():
        best = compute_bounds(model, x, 0.01, method="alpha-crown", **options)
        plain = compute_bounds(model, x, 0.01, method="crown", **options)
    assert torch.equal(best.lower, plain.lower)
    told = str(fr.bounds.explain(model, x, 0.01, method="alpha-crown", **options))
    assert "slope search" in told and "CROWN's lines" in told


def test_torchs_switches_of_attention_stay_as_they_were() -> None:
    model, x = _model("vit")
    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()
    run = lambda: [compute_bounds(model, x, 0.01) for _ in range(5)]  # noqa: E731
    threads = [threading.Thread(target=run) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert before == (torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled())
    assert before == (True, True)
