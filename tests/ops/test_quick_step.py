"""The short way of pgd_step: which tensors it takes, and that it changes nothing but the time."""

from __future__ import annotations

import math

import pytest
import torch

from fastrobust import _C, ops
from fastrobust.ops.pgd import steps as pgd

WAYS = {"table": _C.pgd_quick_step, "attributes": pgd._step_by_attributes}
HAS_TABLE = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
if not HAS_TABLE:  # an older torch: the other way alone
    del WAYS["table"]
needs_table = pytest.mark.skipif(not HAS_TABLE, reason="this torch has no table of DLPack's C functions")
way = pytest.mark.parametrize("take", WAYS.values(), ids=WAYS)


def inputs(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    x0 = torch.rand(shape, generator=g)
    x = (x0 + 0.02 * torch.randn(shape, generator=g)).clamp(0, 1)
    return x, x0, torch.randn(shape, generator=g)


def run(take, x, x0, grad, out, norm=0) -> bool:
    return take(x, x0, grad, out, norm, 0.01, 0.03, 0.0, 1.0)


def test_table_is_used_where_torch_has_it() -> None:
    if not HAS_TABLE:
        assert pgd._quick_step is pgd._step_by_attributes
        assert tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
        return
    assert _C.learn_tensor_type(torch.Tensor) and pgd._quick_step is _C.pgd_quick_step


@needs_table
@pytest.mark.parametrize("other", [int, torch.nn.Parameter(torch.zeros(1)), "Tensor", None])
def test_types_without_the_table_are_not_learnt(other) -> None:
    assert not _C.learn_tensor_type(other)
    x, x0, grad = inputs(3, 5)
    assert run(_C.pgd_quick_step, x, x0, grad, torch.empty_like(x))  # what was learnt before stays


@way
@pytest.mark.parametrize("norm", [math.inf, 2])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (7, 2, 3, 4), (16, 784), (0, 4), (4, 0), (2, 1, 1)])
def test_equal_to_the_registered_op(take, norm, shape) -> None:
    x, x0, grad = inputs(*shape)
    out = torch.full_like(x, 7.0)
    assert run(take, x, x0, grad, out, 0 if norm == math.inf else 1)
    every = torch.ones(shape[0], dtype=torch.bool)
    assert torch.equal(out, ops.pgd_step(x, x0, grad, 0.01, 0.03, norm, active=every))
    assert torch.equal(out, ops.pgd_step(x, x0, grad, 0.01, 0.03, norm))


def unusual(t: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "subclass":
        return torch.nn.Parameter(t)
    if kind == "strided":
        return torch.stack([t, t], -1)[..., 0]
    if kind == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if kind == "negated":
        return torch._neg_view(-t)
    if kind == "float64":
        return t.double()
    if kind == "int32":
        return (100 * t).int()
    if kind == "half":
        return t.half()
    if kind == "other shape":
        return t.reshape(t.shape[0], -1)
    if kind == "scalar":
        return t.flatten()[0].clone()
    return {"number": 0.5, "none": None, "meta": t.to("meta")}[kind]


@way
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize(
    "kind",
    ["subclass", "strided", "channels_last", "negated", "float64", "int32", "half", "number", "none", "meta"]
    + ["other shape", "scalar"],
)
def test_anything_else_is_left_to_the_long_way(take, place, kind) -> None:
    x, x0, grad = inputs(3, 2, 4, 5)
    out = torch.full_like(x, 7.0)
    given = [x, x0, grad, out]
    given[place] = unusual(given[place], kind)
    copies = [t.clone() if isinstance(t, torch.Tensor) else t for t in given]
    assert not run(take, *given)
    for a, b in zip(given, copies, strict=True):  # nothing was written
        if isinstance(a, torch.Tensor) and not a.is_meta:
            assert torch.equal(a, b)


@way
def test_overlapping_memory_is_refused(take) -> None:
    x, x0, grad = inputs(4, 8)
    store = torch.zeros(40)
    with pytest.raises(ValueError, match="out: got memory that overlaps"):
        run(take, x, store[:32].view(4, 8), grad, store[8:].view(4, 8))
    assert not store.any()


@way
def test_a_tensor_that_requires_grad_is_read(take) -> None:
    """Steps are not differentiable: the graph of what comes in does not matter."""
    x, x0, grad = inputs(4, 8)
    expected, out = torch.empty_like(x), torch.empty_like(x)
    assert run(take, x, x0, grad, expected) and run(take, x.clone().requires_grad_(), x0, grad, out)
    assert torch.equal(out, expected) and not out.requires_grad
