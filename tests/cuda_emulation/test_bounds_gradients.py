"""The gradients of the bounds family on the emulated CUDA kernels, against the definitions in float64; the op of stages
on them; and that nothing of it looks at numbers from the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastrobust.bounds.stage_margins as way
import fastrobust.ops.bounds as ops
from bounds.test_stage_margins import IMAGE, network
from cuda_emulation.test_bounds_kernels import PLACED, near, rows, wide
from cuda_emulation.test_wide_accesses import assert_same_wherever, flat, window
from fastrobust.bounds import compute_bounds
from fastrobust.ops import _library
from fastrobust.ops.bounds import _autograd as gradients
from fastrobust.ops.bounds._relu_box import relu_box, relu_box_gradient
from fastrobust.reference import bounds as reference


def gradients_of(op: Callable[..., Any], *tensors: Tensor) -> list[Tensor]:
    """Of all inputs, from fixed gradients of all results."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    total: Any = 0.0
    for k, result in enumerate(flat(op(*leaves))):
        sent = torch.linspace(-1.0, 2.0, result.numel(), dtype=torch.float64).sin().add(0.1 * k)
        total = total + (result * sent.to(result.dtype).view(result.shape)).sum()
    return list(torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("n", (5, 128, 300))
@pytest.mark.parametrize("placed", PLACED)
@pytest.mark.parametrize("k,m,lines", [(1, 1, 1), (1, 1, 2), (1, 2, 1), (1, 2, 2), (2, 2, 1), (2, 2, 2)])
def test_back_step(bounds_on_device, n, placed, k, m, lines):
    A, b, place, size = rows(placed, n, k, m)
    args = (A, b, torch.randn(lines, 3, size), torch.randn(2, 3, size))
    got = bounds_on_device(gradients_of, lambda *t: ops.linear_back_step(*t, **place), *args)
    want = gradients_of(lambda *t: reference.linear_back_step(*t, **place), *wide(args))
    for g, w in zip(got, want, strict=True):
        near(g, w)


@pytest.mark.parametrize("n", (5, 128, 300))
@pytest.mark.parametrize("placed", PLACED)
@pytest.mark.parametrize("k,m", [(1, 1), (1, 2), (2, 2)])
def test_extremes_over_a_box(bounds_on_device, n, placed, k, m):
    A, b, place, size = rows(placed, n, k, m)
    A[:, :, ::4] = 0.0
    args = (A, b, torch.randn(3, size), torch.rand(3, size))
    example = place.pop("example")

    def extremes(f: Callable[..., Any]) -> Callable[..., Any]:
        return lambda A, b, c, r: f(A, b, example, (c, r), None, math.inf, **place)

    got = bounds_on_device(gradients_of, extremes(ops.concretize_rows), *args)
    for g, w in zip(got, gradients_of(extremes(reference.concretize_rows), *wide(args)), strict=True):
        near(g, w)


@pytest.mark.parametrize("channels", (4, 5))
@pytest.mark.parametrize("sides", (1, 2))
def test_windows_wherever_they_lie(bounds_on_device, channels, sides):
    A, b, place, size = window(channels, sides)
    lines = torch.randn(sides, 3, size), torch.randn(2, 3, size)

    def back(*t: Tensor) -> list[Tensor]:
        return gradients_of(lambda *u: ops.linear_back_step(*u, **place), *t)

    for g, w in zip(assert_same_wherever(bounds_on_device, back, A, b, *lines), back(A, b, *lines), strict=True):
        near(g, w)


@pytest.mark.parametrize("count,n,less", [(0, 6, False), (7, 1, True), (300, 132, True), (300, 33, False)])
def test_picked_rows(bounds_on_device, count, n, less):
    g, plus = torch.randn(count, n), torch.randint(5, (count,))
    minus = torch.randint(5, (count,)) if less else None
    (got,) = assert_same_wherever(bounds_on_device, gradients.pick_gradient, g, plus, minus, 6)
    want = torch.zeros(6, n, dtype=torch.float64).index_add(0, plus, g.double())
    near(got, want if minus is None else want.index_add(0, minus, -g.double()))


@pytest.mark.parametrize("batch,channels,positions", [(0, 4, 2), (1, 3, 1), (3, 5, 7), (19, 8, 18), (40, 1, 12)])
@pytest.mark.parametrize("adaptive", (None, False, True))
@pytest.mark.parametrize("shared", (False, True))
@pytest.mark.parametrize("with_bias", (False, True))
def test_a_relu_behind_a_product(bounds_on_device, batch, channels, positions, adaptive, shared, with_bias):
    n = channels * positions
    c, r = torch.randn(batch, n), torch.rand(1 if shared else batch, n)
    bias = torch.randn(channels) if with_bias else None
    c[:, ::5] += 3

    def through(c: Tensor, r: Tensor, bias: Tensor | None) -> Any:
        box = relu_box(c, r, bias, channels, adaptive)
        return [t for pair in (box.lines, box.after) if pair is not None for t in pair]

    got = assert_same_wherever(bounds_on_device, through, c, r, bias)
    want = through(c, r, bias)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-6)  # of the CPU's variants some round once more
    sent = [torch.randn_like(t) for t in want]
    to_lines, to_after = (None, tuple(sent)) if adaptive is None else (tuple(sent[:2]), tuple(sent[2:]))

    def back(c: Tensor, r: Tensor, bias: Tensor | None, to_lines: Any, to_after: Any) -> Any:
        return relu_box_gradient(c, r, shared, bias, channels, bool(adaptive), to_lines, to_after)

    for after in (to_after, None) if to_lines is not None else (to_after,):
        got = assert_same_wherever(bounds_on_device, back, c, r, bias, to_lines, after)
        for g, w in zip(got, back(c, r, bias, to_lines, after), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=2e-5 * (1 + w.abs().max().item() if w.numel() else 1))


# ---- the op of stages ----


def bounds_and_gradients(net: nn.Module, x: Tensor, eps: Any, method: str, y: Tensor) -> list[Tensor]:
    net, x = net.to(x.dtype), x.clone().requires_grad_()
    found = compute_bounds(net, x, eps, method=method, labels=y, clip=(0.0, 1.0), check="none")
    wanted = [x, *net.parameters()]
    grads = torch.autograd.grad((found.lower * 2 - found.upper).sum(), wanted, allow_unused=True)
    grads = (torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True))
    return [found.lower, found.upper, *grads]


@pytest.mark.parametrize("name", ("residual", "dense", "mixed"))
@pytest.mark.parametrize("method", ("ibp", "crown-ibp", "ibp-linear"))
def test_stages(bounds_on_device, monkeypatch, name, method):
    net, x, y, taken = network(name), torch.rand(3, *IMAGE), torch.tensor([0, 3, 1]), []
    real = way.stage_margins
    monkeypatch.setattr(way, "stage_margins", lambda *a, **k: (taken.append(1), real(*a, **k))[1])
    got = bounds_on_device(bounds_and_gradients, net, x, 0.05, method, y)
    assert taken == [1]
    for g, w in zip(got, bounds_and_gradients(net, x.double(), 0.05, method, y), strict=True):
        assert (g.double() - w).abs().max() <= 1e-4 * (w.abs().max() + 1e-2)


class NoLook(TorchDispatchMode):
    """Refuses what waits for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if any(
            word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal.default")
        ):
            raise AssertionError(f"{name}: the host waits for the device")
        return func(*args, **(kwargs or {}))


def call_of_stages(
    monkeypatch: pytest.MonkeyPatch, net: nn.Module, x: Tensor, method: str, y: Tensor
) -> Callable[..., Any]:
    """The op of stages as compute_bounds calls it, and the gradients of what it was given."""
    calls: list[Any] = []
    real = way.stage_margins
    with monkeypatch.context() as m:
        m.setattr(way, "stage_margins", lambda *a, **k: (calls.append((a, k)), real(*a, **k))[1])
        compute_bounds(net, x, 0.05, method=method, labels=y, clip=(0.0, 1.0), check="none")
    ((args, kwargs),) = calls
    given = next(a for a in args if hasattr(a, "weights"))
    return lambda: torch.autograd.grad(
        sum(t.sum() for t in flat(real(*args, **kwargs))), given.weights, retain_graph=True, allow_unused=True
    )


@pytest.mark.parametrize("name", ("residual", "dense", "mixed"))
@pytest.mark.parametrize("method", ("ibp", "crown-ibp", "ibp-linear"))
def test_no_pass_waits_for_the_device(bounds_on_device, monkeypatch, name, method):
    net, x, y = network(name), torch.rand(3, *IMAGE), torch.tensor([0, 3, 1])
    call = call_of_stages(monkeypatch, net, x, method, y)
    monkeypatch.setattr(_library, "_dispatch_modes", lambda: 0)  # the kernels are called although a mode looks on

    def watched() -> list[Any]:
        with pytest.raises(AssertionError, match="waits for the device"), NoLook():
            bool(torch.ones(()) > 0)
        with NoLook():
            return call()

    for got, want in zip(bounds_on_device(watched), call(), strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            assert (got - want).abs().max() <= 1e-4 * (want.abs().max() + 1e-2)
    A, b, place, _ = rows("minus", 12, 1, 2)
    args = (A, b, torch.randn(2, 3, 12), torch.randn(2, 3, 12))

    def step() -> list[Tensor]:
        with NoLook():
            return gradients_of(lambda *t: ops.linear_back_step(*t, **place), *args)

    assert len(bounds_on_device(step)) == 4
