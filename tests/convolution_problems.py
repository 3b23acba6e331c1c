"""Convolutions of every kind as hypothesis draws them, and how near float32 sums have to be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

KERNELS = [(1, 1), (3, 3), (5, 5), (7, 7), (1, 3), (5, 2)]
BATCHES = [0, 1, 3, 4, 7, 9, 16, 33]
Weights = Callable[[tuple[int, ...], float], Tensor]  # of a shape and a density


def signs(shape: tuple[int, ...], density: float) -> Tensor:
    return (torch.randint(0, 2, shape) * 2 - 1).float() * (torch.rand(shape) < density)


def close(ours: Tensor, exact: Tensor, terms: int) -> None:
    """Float32 sums of `terms` numbers of size one: within the rounding of any order of summation."""
    assert ours.shape == exact.shape
    bound = 1e-6 * (8 + terms) * max(1.0, float(exact.detach().abs().max()) if exact.numel() else 1.0)
    assert float((ours.detach().double() - exact.detach()).abs().max() if exact.numel() else 0.0) <= bound


@st.composite
def problems(draw: st.DrawFn) -> dict:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = draw(st.sampled_from(KERNELS))
    dilation = draw(st.sampled_from([1, 1, 2]))
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    least = [max(1, dilation * (k - 1) + 1 - 2 * p) for k, p in zip(kernel, padding, strict=True)]
    return {
        "batch": draw(st.sampled_from(BATCHES)),
        "size": tuple(draw(st.integers(n, n + 13)) for n in least),
        "shape": (groups * draw(st.integers(1, 9)), draw(st.integers(1, 9)), *kernel),
        "density": draw(st.sampled_from([0.0, 0.002, 0.01, 0.1, 0.5, 1.0])),
        "stride": draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "channels_last": draw(st.booleans()),
        "seed": draw(st.integers(0, 10_000)),
    }


@st.composite
def problems_of_equal_width(draw: st.DrawFn) -> dict:
    """Outputs as wide as the phases of the input, which the kernel on plain maps needs."""
    problem = draw(problems())
    kernel, dilation = problem["shape"][3], problem["dilation"]
    if dilation * (kernel - 1) % 2:
        dilation = 2
    high, wide = problem["size"]
    problem |= {
        "dilation": dilation,
        "padding": (draw(st.integers(0, 3)), dilation * (kernel - 1) // 2),
        "size": (high + dilation * problem["shape"][2], wide + 1),
    }
    return problem


def real(shape: tuple[int, ...], density: float) -> Tensor:
    """Of size one, some of them -1 or +1; the first kept one is neither."""
    w = torch.where(torch.rand(shape) < 0.2, signs(shape, 1.0), torch.randn(shape).clamp(-3, 3))
    w = w * (torch.rand(shape) < density)
    kept = w.flatten().nonzero()
    if kept.numel():
        w.view(-1)[kept[0]] = 0.625
    return w
