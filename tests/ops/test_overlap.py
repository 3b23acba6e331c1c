"""out= shares memory with x, place by place, or with nothing: told exactly, whatever the strides."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastrobust import ops
from fastrobust.ops.pgd._overlap import meets_itself, overlap, same_places
from pgd_oracles import NORMS

BUFFER = 240
strides = st.integers(0, 13)


@st.composite
def views(draw: st.DrawFn, memory: Tensor) -> Tensor:
    """Any strided view of the memory."""
    shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    steps = [draw(strides) for _ in shape]
    last = sum(max(n - 1, 0) * s for n, s in zip(shape, steps, strict=True))
    if last >= memory.numel():
        steps, last = [0] * len(shape), 0
    return torch.as_strided(memory, shape, steps, draw(st.integers(0, memory.numel() - 1 - last)))


@given(data=st.data())
def test_overlap_against_numpys_exact_answer(data: st.DataObject) -> None:
    memory = torch.zeros(BUFFER)
    a, b = data.draw(views(memory)), data.draw(views(memory))
    assert overlap(a, b) == np.shares_memory(a.numpy(), b.numpy())
    halves = memory.view(torch.float16)  # another size of elements
    c = data.draw(views(halves))
    assert overlap(a, c) == overlap(c, a) == np.shares_memory(a.numpy(), c.numpy())


@given(data=st.data())
def test_self_overlap_by_counting(data: st.DataObject) -> None:
    t = data.draw(views(torch.arange(float(BUFFER))))
    assert meets_itself(t) == (t.unique().numel() < t.numel())
    assert same_places(t, t.view(t.shape))


def step(x: Tensor, x0: Tensor, grad: Tensor, out: Tensor, norm: float, kind: str) -> None:
    if kind == "step":
        ops.pgd_step(x, x0, grad, 0.1, 0.2, norm, out=out)
    elif kind == "per channel":
        ops.pgd_step(x, x0, grad, 0.1, 0.2, norm, (torch.zeros(x.shape[1:]), 1.0), out=out)
    elif kind == "project":
        ops.project(x, x0, 0.05, norm, out=out)
    elif kind == "fosc":
        ops.pgd_step_fosc(x, x0, grad, 0.1, 0.2, 0.0, norm, out=out)
    else:
        ops.atas_step(x, x0, grad, torch.zeros(len(x)), 0.1, 0.2, norm, out=out)


OPS = ("step", "per channel", "project", "fosc", "atas")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", OPS)
def test_clashes_are_refused_before_anything_is_written(norm: float, kind: str) -> None:
    memory = torch.rand(400)
    kept = memory.clone()
    view = lambda start, *steps: torch.as_strided(memory, (4, 3, 5), steps, start)  # noqa: E731
    free = lambda: torch.rand(4, 3, 5)  # noqa: E731
    dense, spread = (15, 5, 1), (60, 10, 2)
    clashes = {
        "shifted by one": {"x": view(0, *dense), "out": view(1, *dense)},
        "transposed in place": {"x": view(0, 15, 5, 1), "out": view(0, 1, 20, 4)},
        "strided, shifted": {"x": view(0, *spread), "out": view(2, *spread)},
        "x expanded": {"x": view(0, 0, 5, 1), "out": view(0, *dense)},
        "x0 below out": {"x0": view(0, *spread), "out": view(20, *dense)},
        "x0 is out": {"x0": view(0, *spread), "out": view(0, *spread)},
        "out expanded": {"out": view(0, 0, 5, 1)},
        "out over itself": {"out": view(0, 3, 5, 1)},
        "in place, expanded": {"x": view(0, 0, 5, 1), "out": view(0, 0, 5, 1)},
    }
    if kind != "project":
        clashes["gradient in half precision"] = {
            "grad": torch.as_strided(memory.view(torch.float16), (4, 3, 5), dense, 31),
            "out": view(0, *dense),
        }
    for name, clash in clashes.items():
        args = {"x": free(), "x0": free(), "grad": free()} | clash
        with pytest.raises(ValueError, match="^out: got memory .*expected"):
            step(**args, norm=norm, kind=kind)
        assert torch.equal(memory, kept), name


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", OPS)
def test_what_lies_between_is_not_a_clash(norm: float, kind: str) -> None:
    """Every second element to x, the others to out: their spans cross, they do not meet."""
    pair = torch.rand(4, 3, 5, 2)
    x, out = pair[..., 0], pair[..., 1]
    x0, grad = torch.rand(4, 3, 5), torch.randn(4, 3, 5)
    want = torch.empty(4, 3, 5)
    step(x, x0, grad, want, norm, kind)
    kept = x.clone()
    step(x, x0, grad, out, norm, kind)
    assert torch.equal(out, want) and torch.equal(x, kept)
    step(x, x0, grad, x, norm, kind)  # x itself, strided
    assert torch.equal(x, want)


def test_parameters_are_inputs_too() -> None:
    x, x0, grad = torch.rand(3, 4), torch.rand(3, 4), torch.randn(3, 4)
    memory = torch.full((3, 4), 0.25)
    with pytest.raises(ValueError, match="^out: got memory of eps"):
        ops.pgd_step(x, x0, grad, 0.1, memory, out=memory)
    with pytest.raises(ValueError, match="^out: got memory of step_size"):
        ops.pgd_step(x, x0, grad, memory[:, 0], 0.1, out=memory)
    with pytest.raises(ValueError, match="^out: got memory of v"):
        ops.atas_step(x, x0, grad, memory[:, 3], 0.1, math.inf, out=memory)
    assert (memory == 0.25).all()
