"""The CUDA kernels of the binary family, run on the CPU, against the CPU kernels: the same sums in the same order."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrobust as fr
from fastrobust.ops import _feature_maps, masks
from fastrobust.reference import binary as reference


@pytest.fixture
def binary_on_device(emulated_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """binary_on_device(op, ...) runs an op of the binary family on the emulated CUDA kernels."""

    def run(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as m:
            m.setattr(masks, "_C", emulated_module)
            m.setattr(masks, "stream_of", lambda device: (0, 0))
            m.setattr(_feature_maps, "_C", emulated_module)
            m.setattr(_feature_maps, "device_of", lambda x: (0, 0))
            return op(*args, **kwargs)

    return run


def signs(shape: tuple[int, ...], density: float) -> Tensor:
    return (torch.randint(0, 2, shape) * 2 - 1).float() * (torch.rand(shape) < density)


# batch, weight, map, stride, padding, dilation, groups; lanes 1, 4 and 16, one segment and several
PROBLEMS = [
    (1, (5, 3, 3, 3), (7, 6), 1, 1, 1, 1),
    (5, (6, 2, 5, 2), (9, 11), (2, 3), (2, 0), 1, 3),
    (17, (8, 32, 3, 3), (4, 4), 1, 1, 1, 1),
    (4, (4, 6, 3, 3), (8, 8), 2, 2, 2, 1),
    (3, (4, 6, 1, 1), (1, 1), 1, 0, 1, 1),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=[str(p[:3]) for p in PROBLEMS])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("channels_last", [False, True])
def test_convolution(binary_on_device, monkeypatch, problem, density, channels_last) -> None:
    monkeypatch.setenv("FASTROBUST_BINARY", "sparse")
    batch, shape, size, stride, padding, dilation, groups = problem
    packed = fr.ops.pack(signs(shape, density))
    x = torch.randn(batch, shape[1] * groups, *size)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    x.requires_grad_()
    args = (torch.randn(shape[0]), stride, padding, dilation, groups)
    plain = fr.ops.masked_conv2d(x, packed, *args)
    extra = {"scale": torch.randn(shape[0]), "residual": torch.randn(plain.shape), "relu": True}
    want = fr.ops.masked_conv2d(x, packed, *args, **extra)
    got = binary_on_device(fr.ops.masked_conv2d, x, packed, *args, **extra)
    assert torch.equal(got, want)
    grad = torch.randn(want.shape)
    (want_x,) = torch.autograd.grad(want, x, grad)
    (got_x,) = binary_on_device(torch.autograd.grad, got, x, grad)
    assert torch.equal(got_x, want_x)


def test_frozen_model(binary_on_device, monkeypatch) -> None:
    monkeypatch.setenv("FASTROBUST_BINARY", "sparse")
    frozen = fr.nn.freeze(fr.nn.convert(fr.nn.resnet18(width=2), 0.7, 0.3).eval())
    x = torch.rand(3, 3, 16, 16, requires_grad=True)
    want, got = frozen(x), binary_on_device(frozen, x)
    assert torch.equal(got, want)
    (want_x,) = torch.autograd.grad(want.sum(), x)
    (got_x,) = binary_on_device(torch.autograd.grad, got.sum(), x)
    assert torch.equal(got_x, want_x)


@pytest.mark.parametrize("size", [1, 700, 5000])
@pytest.mark.parametrize("levels", [1, 20, None])
def test_topk(binary_on_device, size, levels) -> None:
    scores = torch.randn(size)
    if levels is not None:
        scores = (scores * levels / 4).round()
    for keep in {0, 1, size // 3, size}:
        assert torch.equal(binary_on_device(fr.ops.topk_mask, scores, keep), reference.topk_mask(scores, keep))
