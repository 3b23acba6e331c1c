"""Results of float32 tensors do not depend on torch's default dtype, which decides what `torch.empty(n)` is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrobust as fr


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


def _network() -> Any:
    torch.manual_seed(0)
    model = fr.nn.convert(fr.nn.small_cnn(), rate=0.9, gamma=0.1)
    return fr.nn.freeze(model.eval())


def _frozen(frozen: Any) -> Callable[[], Tensor]:
    x = torch.linspace(0, 1, 16 * 28 * 28).view(16, 1, 28, 28)

    def run() -> Tensor:
        image = x.clone().requires_grad_()
        out = frozen(image)
        return torch.cat([out.detach().flatten(), torch.autograd.grad(out.sum(), image)[0].flatten()])

    return run


def _convolution(density: float, stride: int) -> Callable[[], Tensor]:
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 64, 3, 3, generator=g).sign() * (torch.rand(64, 64, 3, 3, generator=g) < density)
    packed, x = fr.ops.pack(weight), torch.randn(16, 64, 16, 16, generator=g)

    def run() -> Tensor:
        image = x.clone().requires_grad_()
        with torch.no_grad():
            fr.ops.masked_conv2d(image, packed, stride=stride, padding=1)
        again = fr.ops.masked_conv2d(x, packed, stride=stride, padding=1)  # by heart
        out = fr.ops.masked_conv2d(image, packed, stride=stride, padding=1)
        return torch.cat([again.flatten(), torch.autograd.grad(out.sum(), image)[0].flatten()])

    return run


def _attack(loss: str, norm: str) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 10)).eval()
    x, y = torch.rand(7, 3, 4, 4), torch.arange(7)
    return lambda: fr.attacks.pgd(model, x, y, eps=0.5, steps=3, norm=norm, loss=loss, seed=1)


def _steps(norm: str, dtype: torch.dtype, clip: Any) -> Callable[[], Tensor]:
    g = torch.Generator().manual_seed(3)
    x, x0, grad = (torch.rand(4, 3, 5, 5, generator=g, dtype=dtype) for _ in range(3))
    v, eps = torch.rand(4, generator=g, dtype=dtype), [0.1, 0.2, 0.3, 0.4]

    def run() -> Tensor:
        box = tuple(torch.as_tensor(side, dtype=torch.float64) for side in clip)
        y = fr.ops.pgd_step(x, x0, grad - 0.5, 0.1, eps, norm, box)
        moved, value, _ = fr.ops.pgd_step_fosc(y, x0, grad - 0.5, 0.1, v, 0.5, norm, box)
        ascended, average, alpha = fr.ops.atas_step(moved, x0, grad - 0.5, v, 0.1, 0.3, norm, box)
        start = fr.ops.random_start(x0, eps, norm, box, seed=5)
        kept = (ascended, start, fr.ops.project(x, x0, 0.1, norm, box), value, average, alpha)
        assert all(t.dtype == dtype for t in kept)
        return torch.cat([t.flatten() for t in kept])

    return run


def _losses(dtype: torch.dtype) -> Callable[[], Tensor]:
    g = torch.Generator().manual_seed(4)
    z, r, y = torch.randn(5, 8, generator=g, dtype=dtype), torch.randn(5, 8, generator=g, dtype=dtype), torch.arange(5)

    def run() -> Tensor:
        found = []
        for f in (
            lambda z: fr.ops.cross_entropy(z, y), lambda z: fr.ops.margin_loss(z, y), lambda z: fr.ops.dlr_loss(z, y),
            lambda z: fr.ops.dlr_targeted_loss(z, y, y + 3), lambda z: fr.ops.kl_divergence(z, r),
        ):  # fmt: skip
            leaf = z.clone().requires_grad_()
            (first,) = torch.autograd.grad(f(leaf).value.sum(), leaf, create_graph=True)
            second = torch.func.grad(lambda z: f(z).value.square().sum())(z)  # noqa: B023
            (again,) = torch.autograd.grad((first * first).sum() + 0 * leaf.sum(), leaf)
            found += [*f(z), first.detach(), again, second]
        assert all(t.dtype == dtype for t in found)
        return torch.cat([t.flatten() for t in found])

    return run


def _mask() -> Callable[[], Tensor]:
    scores = torch.linspace(-1, 1, 1000)
    return lambda: fr.ops.topk_mask(scores, 17)


def _distance() -> Callable[[], Tensor]:
    a, b = torch.linspace(-1, 1, 90).view(3, 30), -torch.tensor([1.0, 2.0, 3.0])
    return lambda: fr.ops.polyhedral_distance(a, b, -0.5, 0.5, "Linf")  # type: ignore[return-value]


def _bounds(method: str, **options: Any) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(200, 10)]
    model, x, y = nn.Sequential(*layers).eval(), torch.rand(7, 1, 14, 14), torch.arange(7)

    def run() -> Tensor:
        with torch.no_grad():
            plain = fr.bounds.compute_bounds(model, x, 0.05, method=method, labels=y, **options).lower
        recorded = fr.bounds.compute_bounds(model, x, 0.05, method=method, labels=y, **options).lower
        grads = torch.autograd.grad(recorded.sum(), list(model.parameters()))
        return torch.cat([plain.flatten(), recorded.detach().flatten(), *(g.flatten() for g in grads)])

    return run


CASES: dict[str, Callable[[], Callable[[], Tensor]]] = {
    "frozen network": lambda: _frozen(_network()),
    "sparse convolution": lambda: _convolution(0.05, 1),
    "plain maps": lambda: _convolution(0.002, 2),
    "dense convolution": lambda: _convolution(0.9, 1),
    "cross entropy": lambda: _attack("ce", "Linf"),
    "margin": lambda: _attack("margin", "L2"),
    "l1": lambda: _attack("ce", "L1"),
    **{method: lambda method=method: _bounds(method, clip=(0, 1)) for method in fr.bounds.METHODS},  # type: ignore[misc]
    "crown over a ball": lambda: _bounds("crown", norm="L2"),
    "top k": _mask,
    "distance": _distance,
    **{
        f"steps {norm} {dtype}": lambda norm=norm, dtype=dtype: _steps(norm, dtype, (0.0, 1.0))  # type: ignore[misc]
        for norm in ("Linf", "L2", "L1")
        for dtype in (torch.float32, torch.float64)
    },
    **{
        f"boxes {norm} {dtype}": lambda norm=norm, dtype=dtype: _steps(norm, dtype, ([[[0.0]], [[0.1]], [[0.0]]], 1.0))  # type: ignore[misc]
        for norm in ("Linf", "L2", "L1")
        for dtype in (torch.float32, torch.float64)
    },
    "losses": lambda: _losses(torch.float32),
    "losses in float64": lambda: _losses(torch.float64),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_results_of_float32_tensors(case: str, dtype: torch.dtype) -> None:
    # Prepared under the usual default; used under both, each by an object that has cached nothing.
    usual, other = CASES[case](), CASES[case]()
    expected = usual()
    torch.set_default_dtype(dtype)
    got = other()
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)
