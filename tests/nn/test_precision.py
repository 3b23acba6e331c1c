"""Types under autocast and another default type, on every path; what does not fit never reaches the compiled code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrobust as fr
from fastrobust import nn as fnn
from fastrobust.reference.binary import PackedWeight

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(params=["sparse", "lanes", "auto", "dense"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTROBUST_BINARY", request.param)
    return request.param


@pytest.fixture
def wide():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def signs(*shape: int) -> Tensor:
    return torch.randn(shape).sign() * (torch.rand(shape) < 0.3)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("last", [False, True])
def test_functions_are_float32_under_autocast(path: str, dtype: torch.dtype, last: bool) -> None:
    w, x, bias = signs(7, 5, 3, 3), torch.randn(3, 5, 9, 9), torch.randn(7)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    packed, flat = fr.ops.pack(w), fr.ops.pack(w.flatten(1))
    rows = torch.randn(4, 45)

    def everything() -> list[Tensor]:
        fused = fr.ops.masked_conv2d(x, packed, bias, padding=1, relu=True)
        return [fused, fr.ops.masked_conv2d(x, packed), fr.ops.masked_linear(rows, flat)]

    for _ in range(2):
        want = everything()
        given = x.clone(memory_format=torch.preserve_format).requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            ours = everything()
            (grad,) = torch.autograd.grad(fr.ops.masked_conv2d(given, packed).square().sum(), given)
            halves = fr.ops.masked_conv2d(x.to(dtype), packed, bias.to(dtype), padding=1, relu=True)
            linear = fr.ops.masked_linear(rows.to(dtype), flat, residual=torch.zeros(4, 7, dtype=dtype))
        assert all(map(torch.equal, ours, want))
        exact = x.double().requires_grad_()
        torch.testing.assert_close(
            grad.double(),
            torch.autograd.grad(F.conv2d(exact, w.double()).square().sum(), exact)[0],
            rtol=1e-4,
            atol=1e-3,
        )
        rounded = fr.ops.masked_conv2d(x.to(dtype).float(), packed, bias.to(dtype).float(), padding=1, relu=True)
        assert torch.equal(halves, rounded) and linear.dtype == torch.float32
        assert torch.equal(linear, fr.ops.masked_linear(rows.to(dtype).float(), flat))
    with pytest.raises(TypeError, match="x: expected float32"):
        fr.ops.masked_conv2d(x.to(dtype), packed)


@pytest.mark.parametrize("rate", [0.2, 0.9])
@pytest.mark.parametrize("dtype", HALF)
def test_models_under_autocast(path: str, rate: float, dtype: torch.dtype) -> None:
    """Plain layers between give half precision, masked ones float32, forward and backward, frozen or not."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2), nn.Flatten(), nn.Linear(8 * 16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 5),
    )  # fmt: skip
    model = fnn.convert(net, rate, 1.0, first_dense=True, init="signed_constant").eval()
    x = torch.rand(5, 3, 10, 10)
    dense, given = fnn.dense_copy(model), x.clone().requires_grad_()
    want = dense(given)
    (want_grad,) = torch.autograd.grad(want.square().sum(), given)

    def errors(f) -> list[float]:
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            results = [f(given), f(x.to(dtype))]
            results.append(torch.autograd.grad(results[0].square().sum(), given)[0])
        assert f is dense or results[0].dtype == results[1].dtype == torch.float32
        return [float((a - b).norm() / b.norm()) for a, b in zip(results, (want, want, want_grad), strict=True)]

    # Torch's own network under autocast, which rounds in more places, is the yardstick.
    theirs = errors(dense)
    for f in (model, fnn.freeze(model)):
        assert all(ours < 2 * e + 0.01 for ours, e in zip(errors(f), theirs, strict=True))


def test_magnitudes_and_biases_whatever_the_default_type(path: str) -> None:
    model = fnn.convert(
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)), 0.5, 1.0, init="signed_constant"
    )
    x = torch.randn(2, 3, 9, 9)
    want = model(x)
    torch.set_default_dtype(torch.float64)
    try:
        got = model(x), fnn.freeze(model.eval())(x), fnn.dense_copy(model)(x), fnn.compact(model)(x)
        assert all(g.dtype == torch.float32 for g in got)
        for g in got:
            torch.testing.assert_close(g, want, rtol=1e-4, atol=1e-4)
    finally:
        torch.set_default_dtype(torch.float32)


def test_layers_and_models_of_float64(path: str, wide: None) -> None:
    layer = fnn.BinaryMaskedConv2d(3, 5, 3, bias=True, keep=60, init="signed_constant")
    assert {t.dtype for t in layer.state_dict().values() if isinstance(t, Tensor)} == {torch.float64, torch.int8}
    model = fnn.convert(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 49, 4)), 0.5, 1.0)
    x = torch.randn(2, 3, 9, 9)
    y = model(x)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, fnn.dense_copy(model)(x), rtol=1e-12, atol=1e-12)
    # Scores of one type and images of another: the result has that of the images.
    single = model(x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), y, rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert all(p.grad.dtype == torch.float64 for p in model.parameters())


def test_layers_refuse_half_precision() -> None:
    with pytest.raises(TypeError, match="dtype: got torch.bfloat16, expected float32"):
        fnn.BinaryMaskedLinear(3, 4, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="model: 0 has torch.bfloat16 weights, expected float32"):
        fnn.convert(nn.Sequential(nn.Linear(3, 4)).bfloat16(), 0.5, 1.0)


WRONG = {
    "scale of float64": {"scale": torch.ones(6, dtype=torch.float64)},
    "shift too short": {"shift": torch.ones(5)},
    "residual of another size": {"residual": torch.ones(2, 6, 4, 3)},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_registered_ops_check_for_themselves(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTROBUST_BINARY", "sparse")
    packed = fr.ops.pack(signs(6, 4, 3, 3))
    given = {"scale": None, "shift": None, "residual": None, **WRONG[wrong]}
    with pytest.raises(TypeError, match=f"{next(iter(WRONG[wrong]))}: expected"):
        torch.ops.fastrobust.masked_conv2d(
            torch.ones(2, 4, 6, 6), packed.ptr, packed.index, packed.values, packed.shape, (1, 1), (0, 0), (1, 1), 1,
            given["scale"], given["shift"], given["residual"], False,
        )  # fmt: skip


def test_registered_ops_refuse_maps_that_do_not_fit() -> None:
    packed = fr.ops.pack(signs(6, 4, 3, 3))
    lists = packed.ptr, packed.index, packed.values, packed.shape, (1, 1), (0, 0), (1, 1), 1
    with pytest.raises(ValueError, match=r"x: expected \(N, 4, H, W\)"):
        torch.ops.fastrobust.masked_conv2d(torch.ones(2, 3, 6, 6), *lists, None, None, None, False)
    with pytest.raises(ValueError, match=r"grad: expected \(2, 6, 4, 4\)"):
        torch.ops.fastrobust.masked_conv2d_input_grad(torch.ones(2, 6, 4, 5), *lists, 6, 6)
    with pytest.raises(TypeError, match="x: expected a strided"):
        fr.ops.masked_conv2d(torch.ones(2, 4, 6, 6).to_sparse(), PackedWeight(packed.shape, packed.ptr, packed.index))


def test_batch_statistics_of_another_type_are_refused_by_frozen_models() -> None:
    model = fnn.convert(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), 0.5, 1.0).eval()
    model[1].double()
    # As by the model itself: a frozen model sees what runs.
    for f in (model, fnn.freeze(model)):
        with pytest.raises(RuntimeError, match="mixed dtype"):
            f(torch.rand(2, 2, 5, 5))


def test_negated_views_are_resolved(path: str) -> None:
    packed = fr.ops.pack(signs(6, 4, 3, 3))
    x, scale = torch.randn(2, 4, 6, 6), torch.rand(6)
    negated = torch._neg_view(-scale)
    assert torch.equal(fr.ops.masked_conv2d(x, packed, scale=negated), fr.ops.masked_conv2d(x, packed, scale=scale))
    w = torch._neg_view(signs(6, 4))
    assert torch.equal(fr.ops.pack(w).to_dense(), w.resolve_neg())


class Wrapped(Tensor):
    """A tensor without memory of its own."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        unwrapped = torch.utils._pytree.tree_map_only(Wrapped, lambda t: t.inner, (args, kwargs or {}))
        return func(*unwrapped[0], **unwrapped[1])


def test_subclasses_without_memory_of_their_own(path: str) -> None:
    packed, x = fr.ops.pack(signs(6, 4, 3, 3)), torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(fr.ops.masked_conv2d(Wrapped(x), packed), fr.ops.masked_conv2d(x, packed))
            layer = fnn.BinaryMaskedConv2d(4, 6, 3, keep=20)
            assert torch.equal(layer(Wrapped(x)), layer(x))
