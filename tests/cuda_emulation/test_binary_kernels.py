"""The CUDA kernels of the binary family, run on the CPU, against the CPU kernels: the same sums in the same order."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import fastrobust as fr
import region_bodies
from fastrobust.nn import _choice
from fastrobust.ops.binary import _feature_maps, masks
from fastrobust.reference import binary as reference
from feature_maps import ACTS, act_ids, finished, pooled


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
@pytest.mark.parametrize("valued", [False, True])
def test_convolution(binary_on_device, monkeypatch, problem, density, channels_last, valued) -> None:
    monkeypatch.setenv("FASTROBUST_BINARY", "sparse")
    batch, shape, size, stride, padding, dilation, groups = problem
    packed = fr.ops.pack(signs(shape, density) * (torch.rand(shape) if valued else 1))
    assert (packed.values is not None) == (valued and packed.kept > 0)
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


@pytest.mark.parametrize("init", ["binary", "given"])
def test_frozen_model(binary_on_device, monkeypatch, init) -> None:
    monkeypatch.setenv("FASTROBUST_BINARY", "sparse")
    frozen = fr.nn.freeze(fr.nn.convert(fr.nn.resnet18(width=2), 0.7, 0.3, init=init).eval())
    x = torch.rand(3, 3, 16, 16, requires_grad=True)
    want, got = frozen(x), binary_on_device(frozen, x)
    assert torch.equal(got, want)
    (want_x,) = torch.autograd.grad(want.sum(), x)
    (got_x,) = binary_on_device(torch.autograd.grad, got.sum(), x)
    assert torch.equal(got_x, want_x)


# Of every kind of node some, and of activations those that keep their arguments, their derivatives and their sides.
NODES = [
    "relu6: depth", "leaky negative: act add", "leaky steep: twice", "hardtanh odd: norm act conv", "gelu: add act",
    "mish: act", "elu negative alpha: twice", "softplus parameters: act norm", "hardswish: add act",
    "max 3/2: between", "max odd: of the image", "max ceil padded: of an activation", "avg 3/1: between",
    "divisors: of a sum", "mean: of an activation", "global: of a sum", "constants: normalised, sum",
    "joined: pixel inside", "joined: excitation, sum", "joined: cat four", "joined: dense, sum", "joined: read twice",
    "others: bilinear", "others: transposed", "rows: flatten pooled", "rows: flat sum", "rows: residual rows",
    "output: inner", "output: inner pooled", "output: concatenated",
]  # fmt: skip


@pytest.mark.parametrize("name", NODES)
@pytest.mark.parametrize("lanes", [1, 4, 16])
def test_nodes_of_regions(binary_on_device, monkeypatch, name, lanes) -> None:
    """Forward without and with a gradient, and the gradient, in the fast layout wherever it can be."""

    def parts(self: _choice.Chooser, batch: int) -> tuple[_choice.Part, ...]:
        found = [node.cost(batch, self.sizes, self.sizes[i], lanes) for i, node in enumerate(self.nodes)]
        paths = ["dense" if math.isinf(e.sparse) else "sparse" for e in found]
        choices = tuple(dataclasses.replace(e, path=p) for e, p in zip(found, paths, strict=True))
        return (_choice.Part(batch, lanes, choices, 0.0),)

    monkeypatch.setattr(_choice.Chooser, "parts", parts)
    model = region_bodies.masked(region_bodies.bodies()[name])
    x = torch.rand(5, *region_bodies.IMAGE, requires_grad=True)
    found = []
    for run in (lambda op, *args: op(*args), binary_on_device):
        frozen = fr.nn.freeze(model, check="none")  # programs are of one device
        with torch.no_grad():
            without = tree_leaves(run(frozen, x))
        outs = tree_leaves(run(frozen, x))
        total = sum((o * torch.linspace(-1, 2, o.numel()).view(o.shape)).sum() for o in outs)
        found.append((*without, *outs, run(torch.autograd.grad, total, x)[0]))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * float(want.detach().abs().max()))


@pytest.mark.parametrize("act", ACTS, ids=act_ids)
@pytest.mark.parametrize("lanes", [1, 4])
def test_what_follows_a_sum(binary_on_device, act, lanes) -> None:
    size = (3, 2, 5, 40)
    maps = _feature_maps.Maps(*size, lanes, 41, 1, 1)
    x, gate, (scale, shift, post) = 4 * torch.randn(size), 4 * torch.randn(size), torch.randn(3, 2)
    found = []
    for run in (lambda op, *args, **kwargs: op(*args, **kwargs), binary_on_device):
        pre, slopes = torch.empty(size), torch.zeros(size)
        after = {"scale": scale, "shift": shift, "post": post, "pre": pre, "slopes": slopes}
        out = run(finished, x, maps, act=act, gate=gate, gate_act=ACTS[-1], **after)
        found.append((out, pre, slopes, run(finished, x, maps, act=ACTS[1], gate=gate, gate_act=act)))
    for want, got in zip(*found, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("lanes", [1, 8])
@pytest.mark.parametrize("window", [(3, 3, 2, 2, 1, 1, 1, 1), (2, 3, 1, 2, 0, 1, 2, 1)], ids=str)
def test_max_pooling(binary_on_device, lanes, window) -> None:
    x = torch.randn(5, 2, 9, 12).round()
    x[0, 0, 2, 3:5] = torch.nan
    height, width = (
        (s + 2 * window[4 + d] - window[6 + d] * (window[d] - 1) - 1) // window[2 + d] + 1
        for d, s in enumerate((9, 12))
    )
    source = _feature_maps.Maps(5, 2, 9, 12, lanes, 13, 1, 1)
    target = _feature_maps.Maps(5, 2, height, width, lanes, width + 2, 0, 2)
    args = (x, torch.randn(target.size), source, target, window)
    for want, got in zip(pooled(*args), binary_on_device(pooled, *args), strict=True):
        assert torch.equal(got.float().nan_to_num(9), want.float().nan_to_num(9))


@pytest.mark.parametrize("size", [1, 700, 5000])
@pytest.mark.parametrize("levels", [1, 20, None])
def test_topk(binary_on_device, size, levels) -> None:
    scores = torch.randn(size)
    if levels is not None:
        scores = (scores * levels / 4).round()
    for keep in {0, 1, size // 3, size}:
        assert torch.equal(binary_on_device(fr.ops.topk_mask, scores, keep), reference.topk_mask(scores, keep))
